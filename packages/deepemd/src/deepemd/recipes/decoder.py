"""The sixth kind of pair: shapes and what a half-trained auto-encoder makes of them (2.9)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deepemd.api import emd_loss
from deepemd.data.pairs import PairSpec, attach_label, make_pair, scaled
from deepemd.examples.autoencoder import PointAutoencoder


class DecoderPairs:
    """Snapshots of an auto-encoder in training, as a source of pairs.

    Args:
        n_points: N of the clouds.
        seed: of the auto-encoder's training.
        snapshots: how many are kept.
        every: steps between them.
        spec: the mixture that the shapes come from.

    Pair ``i`` is a pure function of the arguments and ``i``.

    >>> DecoderPairs(8, seed=0, snapshots=2, every=1).pair(0)["index"].shape
    torch.Size([8])
    """

    def __init__(
        self, n_points: int, *, seed: int = 0, snapshots: int = 8, every: int = 50,
        spec: PairSpec | None = None,
    ) -> None:  # fmt: skip
        self.n_points, self.seed, self.spec = n_points, seed, spec
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = PointAutoencoder(3, n_points)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        self.models: list[PointAutoencoder] = []
        pool = torch.stack([self._shape(np.random.default_rng((seed, 1, k))) for k in range(64)])
        choose = np.random.default_rng((seed, 3))
        for step in range((snapshots - 1) * every + 1):
            if step % every == 0:
                copy = PointAutoencoder(3, n_points)
                copy.load_state_dict(model.state_dict())
                self.models.append(copy.eval())
            x = pool[torch.from_numpy(choose.integers(len(pool), size=16))]
            optimizer.zero_grad()
            emd_loss(model(x), x, method="chamfer").backward()
            optimizer.step()

    def _shape(self, rng: np.random.Generator) -> Tensor:
        x, y, _ = make_pair(rng, self.n_points, spec=self.spec)
        return scaled(x, y)["x"]

    def pair(self, i: int) -> dict[str, Tensor]:
        """Return labelled pair ``i``: a shape, and its reconstruction by one of the snapshots."""
        rng = np.random.default_rng((self.seed, 2, i))
        x = self._shape(rng)
        model = self.models[int(rng.integers(len(self.models)))]
        with torch.no_grad():
            y = model(x[None])[0]
        return attach_label(scaled(x.double().numpy(), y.double().numpy()))
