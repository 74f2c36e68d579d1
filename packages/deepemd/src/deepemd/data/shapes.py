"""Synthetic shapes: unions of simple surfaces and solids under random affine maps (spec 2.9)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rng = np.random.Generator


def _circle(angle: Array) -> tuple[Array, Array]:
    return np.cos(angle), np.sin(angle)


def _sphere(n: int, rng: Rng, _p: Array) -> Array:
    x = rng.standard_normal((n, 3))
    out: Array = x / np.linalg.norm(x, axis=1, keepdims=True)
    return out


def _box(n: int, rng: Rng, _p: Array) -> Array:
    x = rng.uniform(-1, 1, (n, 3))
    face = rng.integers(3, size=n)
    x[np.arange(n), face] = np.where(rng.random(n) < 0.5, -1.0, 1.0)
    return x


def _torus(n: int, rng: Rng, p: Array) -> Array:
    minor = 0.15 + 0.35 * p[0]
    (a, b), (c, d) = _circle(rng.uniform(0, 2 * np.pi, n)), _circle(rng.uniform(0, 2 * np.pi, n))
    ring = 1 + minor * c
    return np.stack([ring * a, ring * b, minor * d], 1)


def _cylinder(n: int, rng: Rng, _p: Array) -> Array:
    a, b = _circle(rng.uniform(0, 2 * np.pi, n))
    return np.stack([a, b, rng.uniform(-1, 1, n)], 1)


def _cone(n: int, rng: Rng, _p: Array) -> Array:
    radius = np.sqrt(rng.random(n))
    a, b = _circle(rng.uniform(0, 2 * np.pi, n))
    return np.stack([radius * a, radius * b, 1 - 2 * radius], 1)


def _plane(n: int, rng: Rng, _p: Array) -> Array:
    return np.concatenate([rng.uniform(-1, 1, (n, 2)), np.zeros((n, 1))], 1)


def _curve(n: int, rng: Rng, p: Array) -> Array:
    t = rng.uniform(-1, 1, n)
    a, b = _circle((2 + 8 * p[0]) * t + 6.0 * p[2])
    radius = 0.2 + 0.8 * p[1]
    return np.stack([radius * a, radius * b, t], 1)


def _blob(n: int, rng: Rng, _p: Array) -> Array:
    return 0.5 * rng.standard_normal((n, 3))


def _superquadric(n: int, rng: Rng, p: Array) -> Array:
    x = rng.standard_normal((n, 3))
    power = 2.0 / (0.3 + 2.0 * p[0])
    norm = (np.abs(x) ** power).sum(1, keepdims=True) ** (1 / power)
    out: Array = x / np.maximum(norm, 1e-12)
    return out


PRIMITIVES: dict[str, Callable[[int, Rng, Array], Array]] = {
    "sphere": _sphere,
    "box": _box,
    "torus": _torus,
    "cylinder": _cylinder,
    "cone": _cone,
    "plane": _plane,
    "curve": _curve,
    "blob": _blob,
    "superquadric": _superquadric,
}


class Sampler(Protocol):
    """Anything that points can be drawn from, again and again."""

    def sample(self, n: int, rng: Rng) -> Array:
        """Draw ``n`` points, (n, 3) float64, in random order."""
        ...


@dataclass(frozen=True)
class Shape:
    """A union of primitives, each with its affine map and its share of the points.

    :meth:`sample` draws from it as often as wanted, independently.
    """

    kinds: tuple[str, ...]
    maps: Array
    shifts: Array
    shares: Array
    params: Array

    def sample(self, n: int, rng: Rng) -> Array:
        """Draw ``n`` points, (n, 3) float64, in random order."""
        counts = rng.multinomial(n, self.shares)
        parts = [
            PRIMITIVES[kind](int(count), rng, self.params[c]) @ self.maps[c] + self.shifts[c]
            for c, (kind, count) in enumerate(zip(self.kinds, counts, strict=True))
            if count
        ]
        points = np.concatenate(parts)
        return points[rng.permutation(n)]


def random_rotation(rng: Rng) -> Array:
    """Draw a rotation of space, uniformly; a (3, 3) orthogonal matrix of determinant 1."""
    raw, r = np.linalg.qr(rng.standard_normal((3, 3)))
    q: Array = raw * np.sign(np.diagonal(r))
    if np.linalg.det(q) < 0:
        q[:, 0] = -q[:, 0]
    return q


def random_shape(
    rng: Rng, *, planar: bool = False, kinds: tuple[str, ...] = tuple(PRIMITIVES)
) -> Shape:
    """Draw a union of one to four primitives.

    Args:
        rng: the source of randomness.
        planar: flatten it into the plane z = 0, for 2-D clouds.
        kinds: the primitives to draw from (all of :data:`PRIMITIVES`).

    >>> shape = random_shape(np.random.default_rng(0))
    >>> shape.sample(100, np.random.default_rng(1)).shape
    (100, 3)
    """
    count = int(rng.integers(1, 5))
    chosen = tuple(kinds[i] for i in rng.integers(len(kinds), size=count))
    maps = np.empty((count, 3, 3))
    for c in range(count):
        stretch = np.exp(rng.uniform(np.log(0.15), 0.0, 3)) * rng.uniform(0.4, 1.0)
        maps[c] = np.diag(stretch) @ random_rotation(rng)
    shifts = rng.uniform(-0.8, 0.8, (count, 3)) * (count > 1)
    if planar:
        maps[:, :, 2] = 0.0
        shifts[:, 2] = 0.0
    if rng.random() < 0.5:
        shares = rng.dirichlet(np.full(count, 2.0))
    else:  # about in proportion to the surface
        size = np.linalg.norm(maps, axis=(1, 2)) ** 2
        shares = size / size.sum()
    return Shape(chosen, maps, shifts, shares, rng.random((count, 3)))
