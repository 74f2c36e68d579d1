"""The stream of training batches: batch ``i`` is a pure function of the seed and ``i``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from deepemd.data.pairs import PairSpec, labelled, make_pair
from deepemd.recipes.decoder import DecoderPairs


class BatchStream(Dataset[dict[str, Tensor]]):
    """Batches of labelled pairs of one size each, the size drawn per batch (curriculum of 2.9).

    Args:
        steps: length of the run, over which the size weights go from ``first`` to ``last``, linearly.
        sizes: the values of N to draw from.
        first, last: weights of the sizes at the first and at the last step.
        points: points of X per batch; a batch holds ``points // N`` pairs.
        seed: of the run.
        spec: the mixture of pairs.
        decoder: share of pairs of the kind ``decoder`` (:class:`~deepemd.recipes.decoder.DecoderPairs`,
            whose auto-encoder is trained here, once per size).
        rank, world: of the processes that share each batch, every ``world``-th pair to each. The pairs of all
            of them together do not depend on their number as long as it divides ``points // N``.

    >>> stream = BatchStream(10, sizes=(8, 16), first=(1, 0), last=(0, 1), points=32, seed=0)
    >>> stream[0]["x"].shape, stream[9]["x"].shape
    (torch.Size([4, 8, 3]), torch.Size([2, 16, 3]))
    """

    def __init__(
        self,
        steps: int,
        *,
        sizes: Sequence[int],
        first: Sequence[float],
        last: Sequence[float],
        points: int,
        seed: int,
        spec: PairSpec | None = None,
        decoder: float = 0.0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not len(sizes) == len(first) == len(last):
            raise ValueError(f"sizes, first and last differ in length: {sizes}, {first}, {last}")
        self.steps, self.sizes, self.points, self.seed = steps, tuple(sizes), points, seed
        self.first, self.last = np.array(first, float), np.array(last, float)
        self.spec, self.decoder, self.rank, self.world = spec, decoder, rank, world
        self.decoders = (
            {n: DecoderPairs(n, seed=seed, spec=spec) for n in self.sizes} if decoder else {}
        )

    def __len__(self) -> int:
        return self.steps

    def size(self, step: int) -> int:
        """Return N of one batch."""
        rng = np.random.default_rng((self.seed, step))
        share = step / max(self.steps - 1, 1)
        weights = (1 - share) * self.first / self.first.sum() + share * self.last / self.last.sum()
        return self.sizes[int(rng.choice(len(self.sizes), p=weights / weights.sum()))]

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        n = self.size(step)
        rng = np.random.default_rng((self.seed, step, 1))
        count = max(self.points // n // self.world, 1) * self.world
        pairs = []
        for k in range(count):
            mine = k % self.world == self.rank
            if self.decoder and rng.random() < self.decoder:
                if mine:
                    pairs.append(self.decoders[n].pair(step * count + k))
            else:
                x, y = make_pair(rng, n, spec=self.spec)[:2]
                if mine:  # the labels are what takes time
                    pairs.append(labelled(x, y))
        return {key: torch.stack([pair[key] for pair in pairs]) for key in pairs[0]}
