"""Pairs of clouds such as a loss meets them, from a half-trained generator to a finished one (2.9)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from deepemd.data.labels import exact_matching
from deepemd.data.shapes import Array, Rng, Sampler, random_rotation, random_shape
from deepemd.data.unseen import unseen_shape

DEFAULT_WEIGHTS: dict[str, float] = {
    "resample": 0.25,
    "jitter": 0.2,
    "collapse": 0.2,
    "deform": 0.15,
    "other": 0.15,
}


@dataclass(frozen=True)
class PairSpec:
    """What pairs to draw.

    Args:
        weights: relative frequency of each kind (a key of :data:`KINDS`); the sixth kind of the
            mixture, ``decoder``, comes from a model in training: see
            :func:`deepemd.recipes.decoder_pairs`.
        planar: share of pairs in the plane z = 0 (2-D clouds; the network reads them with a zero).
        rotate: turn each pair by one random rotation (about z where planar).
        shapes: ``"train"``, unions of primitives, or ``"unseen"``, the shapes of
            :mod:`deepemd.data.unseen` that no checkpoint was trained on.
    """

    weights: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_WEIGHTS))
    planar: float = 0.2
    rotate: bool = True
    shapes: str = "train"

    def __post_init__(self) -> None:
        unknown = sorted(set(self.weights) - set(KINDS))
        if unknown:
            raise ValueError(f"unknown kinds {unknown}; there are {', '.join(KINDS)}")
        if not sum(self.weights.values()) > 0 or min(self.weights.values()) < 0:
            raise ValueError(f"weights must be at least 0 with a positive sum, got {self.weights}")
        if self.shapes not in ("train", "unseen"):
            raise ValueError(f"shapes must be 'train' or 'unseen', got {self.shapes!r}")

    def draw(self, rng: Rng, planar: bool) -> Sampler:
        """Draw a shape."""
        if self.shapes == "unseen":
            return unseen_shape(rng, planar=planar)
        return random_shape(rng, planar=planar)


def _radius(x: Array) -> float:
    return float(np.linalg.norm(x - x.mean(0), axis=1).max()) or 1.0


def _noise(rng: Rng, n: int, planar: bool) -> Array:
    noise = rng.standard_normal((n, 3))
    if planar:
        noise[:, 2] = 0.0
    return noise


def _resize(x: Array, n: int, rng: Rng) -> Array:
    """Choose n rows, without repetition where there are enough."""
    if n <= len(x):
        return x[rng.permutation(len(x))[:n]]
    return x[rng.integers(len(x), size=n)]


@dataclass(frozen=True)
class Source:
    """What a kind of pair is made from: the shape, the randomness and the mixture."""

    shape: Sampler
    rng: Rng
    planar: bool
    spec: PairSpec


def _resample(x: Array, m: int, s: Source) -> Array:
    return s.shape.sample(m, s.rng)


def _jitter(x: Array, m: int, s: Source) -> Array:
    sigma = _radius(x) * np.exp(s.rng.uniform(np.log(0.003), np.log(0.5)))
    moved: Array = _resize(x, m, s.rng) + sigma * _noise(s.rng, m, s.planar)
    return moved


def _collapse(x: Array, m: int, s: Source) -> Array:
    """What a decoder gives early on: shrunk towards its centre, a plane, a line, or a few clusters."""
    y = s.shape.sample(m, s.rng)
    centre = y.mean(0)
    amount = s.rng.random()
    target = np.broadcast_to(centre, y.shape)
    mode = s.rng.integers(4)
    if mode in (1, 2):  # the main plane or line
        _, _, axes = np.linalg.svd(y - centre, full_matrices=False)
        axes = axes[: 3 - mode]
        target = centre + (y - centre) @ axes.T @ axes
    elif mode == 3:
        seeds = y[s.rng.integers(m, size=int(s.rng.integers(2, 9)))]
        target = seeds[np.argmin(((y[:, None] - seeds) ** 2).sum(-1), 1)]
    y = amount * y + (1 - amount) * target
    return y + _radius(x) * s.rng.uniform(0.0, 0.15) * _noise(s.rng, m, s.planar)


def _deform(x: Array, m: int, s: Source) -> Array:
    """A random affine map, a smooth displacement, a lost and doubled part, or another density."""
    mode = s.rng.integers(4)
    if mode == 2:
        normal = _noise(s.rng, 1, s.planar)[0]
        kept = x[np.argsort(x @ normal)[: max(1, int(len(x) * s.rng.uniform(0.5, 0.95)))]]
        return _resize(kept, m, s.rng) + 0.005 * _noise(s.rng, m, s.planar)
    y = s.shape.sample(m, s.rng)
    centre, radius = y.mean(0), _radius(y)
    if mode == 0:
        change = np.eye(3) + 0.25 * s.rng.standard_normal((3, 3))
        y = centre + (y - centre) @ change + 0.1 * radius * s.rng.standard_normal(3)
    elif mode == 1:
        wave = s.rng.standard_normal((3, 3)) * s.rng.uniform(0.5, 2.0) / radius
        y = y + radius * s.rng.uniform(0.05, 0.3) * np.sin(
            (y - centre) @ wave + s.rng.uniform(0, 6, 3)
        )
    else:
        pool = s.shape.sample(3 * m, s.rng)
        weight = np.exp(
            s.rng.uniform(-1.5, 1.5) * (pool - centre) @ _noise(s.rng, 1, s.planar)[0] / radius
        )
        y = pool[s.rng.choice(3 * m, size=m, replace=False, p=weight / weight.sum())]
    if s.planar:
        y[:, 2] = 0.0
    return y


def _other(x: Array, m: int, s: Source) -> Array:
    return s.spec.draw(s.rng, s.planar).sample(m, s.rng)


KINDS: dict[str, Callable[[Array, int, Source], Array]] = {
    "resample": _resample,
    "jitter": _jitter,
    "collapse": _collapse,
    "deform": _deform,
    "other": _other,
}


def make_pair(
    rng: Rng, n: int, m: int | None = None, spec: PairSpec | None = None
) -> tuple[Array, Array, str]:
    """Draw one pair.

    Args:
        rng: the source of randomness.
        n, m: sizes of the two clouds; ``m`` is ``n`` where it is not given.
        spec: the mixture (default :class:`PairSpec`).

    Returns:
        Two clouds (n, 3) and (m, 3) in float64, and the kind of the pair.

    >>> x, y, kind = make_pair(np.random.default_rng(0), 8)
    >>> x.shape, y.shape, kind in KINDS
    ((8, 3), (8, 3), True)
    """
    spec = PairSpec() if spec is None else spec
    m = n if m is None else m
    planar = bool(rng.random() < spec.planar)
    names = tuple(spec.weights)
    weights = np.array([spec.weights[name] for name in names], dtype=np.float64)
    kind = names[int(rng.choice(len(names), p=weights / weights.sum()))]
    shape = spec.draw(rng, planar)
    x = shape.sample(n, rng)
    y = KINDS[kind](x, m, Source(shape, rng, planar, spec))
    if rng.random() < 0.5 and n == m:
        x, y = y, x
    if spec.rotate:
        turn = random_rotation(rng)
        if planar:
            angle = rng.uniform(0, 2 * np.pi)
            c, s = np.cos(angle), np.sin(angle)
            turn = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
        x, y = x @ turn, y @ turn
    return x, y[rng.permutation(m)], kind


class PairDataset(Dataset[dict[str, Tensor]]):
    """Labelled pairs; item ``i`` is a pure function of ``(seed, i)``, in whatever process it is made.

    Args:
        spec: the mixture, or None for the default one.
        n_points: points per cloud.
        seed: of the whole set.
        size: number of items.

    Each item holds ``x`` and ``y`` (N, 3) float32, centred and scaled as the network wants them,
    ``index`` (N,) int64, the exact matching, and ``distance``, the exact EMD.

    >>> PairDataset(None, 16, seed=0)[3]["index"].sort().values.equal(torch.arange(16))
    True
    """

    def __init__(
        self, spec: PairSpec | None = None, n_points: int = 64, seed: int = 0, size: int = 1 << 20
    ) -> None:
        self.spec = PairSpec() if spec is None else spec
        self.n_points, self.seed, self.size = n_points, seed, size

    def __len__(self) -> int:
        return self.size

    def pair(self, i: int) -> dict[str, Tensor]:
        """Return ``x`` and ``y`` of item ``i`` without solving for its label."""
        if not 0 <= i < self.size:
            raise IndexError(f"item {i} of {self.size}")
        x, y, _ = make_pair(np.random.default_rng((self.seed, i)), self.n_points, spec=self.spec)
        return scaled(x, y)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return attach_label(self.pair(i))


def scaled(x: Array, y: Array) -> dict[str, Tensor]:
    """Centre and scale one pair as the network wants it, in float32."""
    both = np.concatenate([x, y])
    both = both - both.mean(0)
    both = (both / (np.linalg.norm(both, axis=1).max() or 1.0)).astype(np.float32)
    return {
        "x": torch.from_numpy(both[: len(x)].copy()),
        "y": torch.from_numpy(both[len(x) :].copy()),
    }


def attach_label(pair: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the exact matching and distance of a pair."""
    index, distance = exact_matching(pair["x"].numpy(), pair["y"].numpy())
    label = {
        "index": torch.from_numpy(index),
        "distance": torch.tensor(distance, dtype=torch.float32),
    }
    return {**pair, **label}


def labelled(x: Array, y: Array) -> dict[str, Tensor]:
    """Centre and scale one pair, round it to float32, and attach its exact matching."""
    return attach_label(scaled(x, y))
