"""Shapes that no checkpoint was trained on, for testing out of distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from deepemd.data.shapes import Array, Rng, random_rotation


def _trefoil(n: int, rng: Rng) -> Array:
    t = rng.uniform(0, 2 * np.pi, n)
    knot = [np.sin(t) + 2 * np.sin(2 * t), np.cos(t) - 2 * np.cos(2 * t), -np.sin(3 * t)]
    return np.stack(knot, 1) / 3 + 0.05 * rng.standard_normal((n, 3))


def _moebius(n: int, rng: Rng) -> Array:
    t, w = rng.uniform(0, 2 * np.pi, n), rng.uniform(-0.4, 0.4, n)
    r = 1 + w * np.cos(t / 2)
    return np.stack([r * np.cos(t), r * np.sin(t), w * np.sin(t / 2)], 1)


def _swiss_roll(n: int, rng: Rng) -> Array:
    t = 1.5 * np.pi * (1 + 2 * rng.random(n))
    return np.stack([t * np.cos(t), t * np.sin(t), 10 * rng.uniform(-1, 1, n)], 1) / 14


def _galaxy(n: int, rng: Rng) -> Array:
    arm, r = rng.integers(3, size=n), np.sqrt(rng.random(n))
    angle = 2 * np.pi * arm / 3 + 3 * r
    disc = np.stack([r * np.cos(angle), r * np.sin(angle), np.zeros(n)], 1)
    return disc + 0.04 * rng.standard_normal((n, 3))


def _lattice(n: int, rng: Rng) -> Array:
    """The edges of a cube divided into eight."""
    x = rng.integers(-1, 2, (n, 3)).astype(np.float64)
    along = rng.integers(3, size=n)
    x[np.arange(n), along] = rng.uniform(-1, 1, n)
    return x


def _table(n: int, rng: Rng) -> Array:
    """A top and four legs."""
    leg = rng.random(n) < 0.4
    top = np.concatenate([rng.uniform(-1, 1, (n, 2)), rng.uniform(0.9, 1.0, (n, 1))], 1)
    corner = rng.choice([-0.9, 0.9], (n, 2)) + 0.05 * rng.standard_normal((n, 2))
    legs = np.concatenate([corner, rng.uniform(-1, 0.9, (n, 1))], 1)
    return np.where(leg[:, None], legs, top)


UNSEEN: dict[str, Callable[[int, Rng], Array]] = {
    "trefoil": _trefoil,
    "moebius": _moebius,
    "swiss_roll": _swiss_roll,
    "galaxy": _galaxy,
    "lattice": _lattice,
    "table": _table,
}


@dataclass(frozen=True)
class UnseenShape:
    """One of :data:`UNSEEN` under an affine map."""

    kind: str
    matrix: Array

    def sample(self, n: int, rng: Rng) -> Array:
        """Draw ``n`` points, (n, 3) float64, in random order."""
        return UNSEEN[self.kind](n, rng) @ self.matrix


def unseen_shape(rng: Rng, *, planar: bool = False) -> UnseenShape:
    """Draw one of :data:`UNSEEN`, stretched and turned; ``planar`` flattens it.

    >>> unseen_shape(np.random.default_rng(0)).sample(5, np.random.default_rng(1)).shape
    (5, 3)
    """
    kind = tuple(UNSEEN)[int(rng.integers(len(UNSEEN)))]
    matrix = np.diag(rng.uniform(0.5, 1.0, 3)) @ random_rotation(rng)
    if planar:
        matrix[:, 2] = 0.0
    return UnseenShape(kind, matrix)
