"""Which simulated points the surrogate sees, how much each counts, and on what common level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mi_surrogates.design.trust import Region

Floats = NDArray[np.float64]
Point = tuple[Floats, float, float, int]  # θ, value, standard error, iteration
RATIOS = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # τ²/σ² that are tried


def features(z: Floats, most: int) -> Floats:
    """Return 1 and the powers of z (P, F) that leave at most `most` columns: linear, squares, products.

    Example:
        >>> features(np.ones((5, 2)), 3).shape, features(np.ones((5, 2)), 9).shape
        ((5, 3), (5, 6))
    """
    dim = z.shape[1]
    columns = [np.ones((len(z), 1)), z]
    if 1 + 2 * dim <= most:
        columns.append(z**2)
    if 1 + dim + dim * (dim + 1) // 2 <= most:
        i, j = np.triu_indices(dim, 1)
        columns.append(z[:, i] * z[:, j])
    return np.concatenate(columns, 1)


@dataclass(frozen=True)
class Levels:
    """What the values of several iterations are made of, beside a smooth function of the design.

    Attributes:
        offsets: (P,) what all values of a point's iteration have in common.
        noise: standard deviation of the rest, NaN where there are too few points to tell.
        signal: standard deviation of the smooth function over the points.
    """

    offsets: Floats
    noise: float = math.nan
    signal: float = 0.0


def levels(z: Floats, value: Floats, weight: Floats, block: NDArray[np.int64]) -> Levels:
    """Split values into a smooth function, an offset of each iteration, and noise.

    All designs of an iteration see the same random events, and a network that goes on learning lifts all
    its values: both shift a whole iteration, and would bend a surrogate that mixes iterations. The model is
    value = X(z) β + b_iteration + e with X quadratic (or linear, for few points), b ~ N(0, τ²) and
    e ~ N(0, σ²/weight); τ²/σ² is that of the highest restricted likelihood, so that the offsets vanish
    where there is nothing in common.

    Args:
        z: (P, F) designs.
        value: (P,) objective.
        weight: (P,) positive.
        block: (P,) iteration of each point.

    Example:
        >>> z = np.random.default_rng(0).normal(size=(40, 1))
        >>> block = np.repeat([0, 1], 20)
        >>> b = levels(z, z[:, 0] + 0.3 * block, np.ones(40), block).offsets
        >>> bool(abs(b[-1] - b[0] - 0.3) < 0.01)
        True
    """
    labels, index = np.unique(block, return_inverse=True)
    x = features(z, (len(value) - len(labels)) // 2)
    freedom = len(value) - x.shape[1]
    if freedom < 3:
        return Levels(np.zeros_like(value))
    scale = float(value.std()) or 1.0
    y = (value - value.mean()) / scale
    weight = weight / weight.mean()
    size = np.bincount(index, weight)
    sum_y = np.bincount(index, weight * y)
    sum_x = np.stack([np.bincount(index, weight * column) for column in x.T], 1)
    xx, xy, yy = (x.T * weight) @ x, x.T @ (weight * y), float(weight @ y**2)
    ridge = 1e-9 * np.trace(xx) / len(xx) * np.eye(len(xx))
    best, found = math.inf, Levels(np.zeros_like(value))
    for ratio in RATIOS if len(labels) > 1 else (0.0,):
        # (I + τ²/σ² s sᵀ)⁻¹ = I − shrink s sᵀ in each iteration, s = √weight
        shrink = ratio / (1 + ratio * size)
        inner = xx - (sum_x.T * shrink) @ sum_x + ridge
        right = xy - sum_x.T @ (shrink * sum_y)
        beta = np.linalg.solve(inner, right)
        rest = max(yy - float(shrink @ sum_y**2) - float(beta @ right), 1e-12 * yy)
        criterion = float(np.log1p(ratio * size).sum() + np.linalg.slogdet(inner)[1])
        criterion += freedom * math.log(rest or 1.0)
        if criterion < best:
            best = criterion
            offsets = shrink * (sum_y - sum_x @ beta)
            noise, signal = math.sqrt(rest / freedom), float((x @ beta).std())
            found = Levels(scale * offsets[index], scale * noise, scale * signal)
    return found


@dataclass(frozen=True)
class Neighbours:
    """The points a surrogate is fitted to, float64.

    Attributes:
        z: (P, F) designs, standardised by the region.
        value: (P,) objective, freed of the iterations' offsets.
        stderr: (P,) standard errors.
        weight: (P,) of each point.
        noise: of a value, as seen from its neighbours; NaN if not known.
        signal: spread of the smooth part of the values.
    """

    z: Tensor
    value: Tensor
    stderr: Tensor
    weight: Tensor
    noise: float
    signal: float

    def fit(self, surrogate: nn.Module) -> None:
        """Fit a surrogate, in its own precision; errors only count where all are known."""
        dtype = next((each.dtype for each in surrogate.buffers()), torch.float64)
        stderr = self.stderr.to(dtype) if bool((self.stderr > 0).all()) else None
        z, value, weight = (each.to(dtype) for each in (self.z, self.value, self.weight))
        surrogate.fit(z, value, stderr, weight)  # type: ignore[operator]


def neighbours(points: Sequence[Point], region: Region, iteration: int, reuse: int) -> Neighbours:
    """Return this iteration's points and near ones of the last `reuse` iterations.

    An earlier point counts with exp(−d²/2F) where its Mahalanobis distance d is at most 2.5 √F.

    Example:
        >>> region = Region(np.zeros(1), np.eye(1))
        >>> points = [(np.ones(1), 5.0, 0.1, 0), (np.zeros(1), 6.0, 0.1, 1), (np.ones(1), 5.0, 0.1, 1)]
        >>> neighbours(points, region, 1, reuse=0).z.tolist()
        [[0.0], [1.0]]
    """
    dim = region.center.size
    rows = []
    for theta, value, stderr, when in points:
        if (age := iteration - when) > reuse:
            continue
        distance = region.distance(theta)
        if age and distance > 2.5 * math.sqrt(dim):
            continue
        weight = math.exp(-(distance**2) / (2 * dim)) if reuse else 1.0
        rows.append((*region.to_z(theta), value, stderr, max(weight, 1e-3), when))
    table = np.array(rows)
    z, (values, stderrs, weights, whens) = table[:, :dim], table[:, dim:].T
    split = levels(z, values, weights, whens.astype(np.int64))
    arrays = (z, values - split.offsets, stderrs, weights)
    a, b, c, d = (torch.from_numpy(np.ascontiguousarray(each)) for each in arrays)
    return Neighbours(a, b, c, d, split.noise, split.signal)
