"""Figures of merit of a set of trade-offs, all for minimisation."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["hypervolume", "nondominated", "spearman", "uniformity", "uniformity_entropy"]

Array = NDArray[np.float64]


def _points(name: str, points: Any) -> Array:
    if hasattr(points, "detach"):
        points = points.detach().cpu().numpy()
    array = np.asarray(points, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"{name} must be (points, tasks), got shape {array.shape}")
    if np.isnan(array).any():
        raise ValueError(f"{name} holds NaN")
    return array


def nondominated(points: Any) -> NDArray[np.bool_]:
    """Return which points no other point dominates (no worse everywhere, better somewhere).

    Args:
        points: ``(m, T)`` objectives to minimise. Equal points do not dominate one another.

    Raises:
        ValueError: NaN, or not a matrix.

    Example:
        >>> nondominated([[.2, .8], [.5, .5], [.6, .6]]).tolist()
        [True, True, False]
    """
    array = _points("points", points)
    worse: Any = (array[None] <= array[:, None]).all(-1) & (array[None] < array[:, None]).any(-1)
    mask: NDArray[np.bool_] = ~worse.any(1)
    return mask


def hypervolume(points: Any, ref: Any, backend: Literal["own", "pymoo"] = "own") -> float:
    """Return the volume between the points and a reference point that all should be below.

    Exact: a sort and sweep for two objectives, a sweep over a grid of coordinates for three and
    four, and the recursion on exclusive volumes (WFG) above.

    Args:
        points: ``(m, T)`` objectives to minimise; those not below ``ref`` count for nothing.
        ref: ``(T,)`` reference point.
        backend: ``"pymoo"`` uses pymoo's implementation (faster for many points and T > 4).

    Raises:
        ValueError: NaN, or a reference of another length.

    Example:
        >>> round(hypervolume([[.2, .8], [.5, .5], [.8, .2]], [1, 1]), 12)
        0.37
    """
    array = _points("points", points)
    bound = np.asarray(ref, dtype=np.float64)
    if bound.shape != (array.shape[1],) or np.isnan(bound).any():
        raise ValueError(
            f"ref must be {array.shape[1]} numbers, got shape {bound.shape}: {bound.tolist()}"
        )
    if backend not in ("own", "pymoo"):
        raise ValueError(f"backend must be 'own' or 'pymoo', got {backend!r}")
    inside = array[(array < bound).all(1)]
    if not len(inside):
        return 0.0
    if backend == "pymoo":
        return _by_pymoo(inside, bound)
    # distances below the reference: larger is better, and a box is a plain product
    gains = np.unique(bound - inside[nondominated(inside)], axis=0)
    return float(_volume(gains))


def _by_pymoo(points: Array, ref: Array) -> float:
    try:
        from pymoo.indicators.hv import HV
    except ImportError as error:
        raise ImportError("backend='pymoo' needs pymoo: pip install \"palora[moo]\"") from error
    return float(HV(ref_point=ref)(points))


def _volume(gains: Array) -> float:
    """The volume of the union of boxes [0, gain]."""
    tasks = gains.shape[1]
    if tasks == 1:
        return float(gains.max())
    if tasks == 2:
        return _area(gains)
    if tasks == 3:
        return _sweep(np.column_stack([gains, np.ones(len(gains))]))
    if tasks == 4:
        return _sweep(gains)
    return _recursion(gains)


def _area(gains: Array) -> float:
    order = gains[np.argsort(-gains[:, 0], kind="stable")]
    best = np.maximum.accumulate(order[:, 1])
    before = np.concatenate([[0.0], best[:-1]])
    return float((order[:, 0] * (best - before)).sum())


def _sweep(gains: Array) -> float:
    """Three objectives on a grid of two coordinates, the fourth swept from its largest value.

    ``height[i, j]`` is the largest third gain of the points whose box covers grid cell (i, j);
    each new point raises a corner block, by which the volume so far grows.
    """
    order = gains[np.argsort(-gains[:, 3], kind="stable")]
    xs, ys = np.unique(order[:, 0]), np.unique(order[:, 1])
    dx, dy = np.diff(xs, prepend=0.0), np.diff(ys, prepend=0.0)
    height = np.zeros((len(xs), len(ys)))
    total = volume = 0.0
    levels = np.append(order[:, 3], 0.0)
    for k, (x, y, z, _) in enumerate(order):
        i, j = np.searchsorted(xs, x) + 1, np.searchsorted(ys, y) + 1
        block = height[:i, :j]
        raised = np.maximum(z - block, 0.0)
        volume += float(dx[:i] @ raised @ dy[:j])
        np.maximum(block, z, out=block)
        total += volume * (levels[k] - levels[k + 1])
    return total


def _recursion(gains: Array) -> float:
    """WFG: each point's volume less what the points after it share with it."""
    order = gains[np.argsort(-gains[:, -1], kind="stable")]
    total = 0.0
    for k, point in enumerate(order):
        total += float(point.prod())
        rest = np.minimum(order[k + 1 :], point)
        if len(rest):
            kept = np.unique(rest[nondominated(-rest)], axis=0)
            total -= _recursion(kept) if len(kept) > 1 else float(kept[0].prod())
    return total


def _ranks(values: Array) -> Array:
    """Ranks from 1, ties sharing their mean rank."""
    order = np.argsort(values, kind="stable")
    ranks = np.empty(len(values))
    ranks[order] = np.arange(1, len(values) + 1)
    for value in np.unique(values):
        same = values == value
        ranks[same] = ranks[same].mean()
    return ranks


def _correlation(a: Array, b: Array) -> float:
    a, b = _ranks(a), _ranks(b)
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / norm) if norm else float("nan")


def spearman(
    losses: Any, prefs: Any = None, kind: Literal["preference", "losses"] = "preference"
) -> Array:
    """Return Spearman's rank correlation of each task's preference with its loss; ideal −1.

    Args:
        losses: ``(m, T)``.
        prefs: ``(m, T)``; not used by ``kind="losses"``.
        kind: ``"preference"``: per task, λ_t with L_t, shape ``(T,)``: does turning the dial
            towards a task lower its loss? ``"losses"``: of each pair of tasks, L_t with L_u, the
            quantity of the authors' code, shape ``(T(T−1)/2,)``.

    Returns:
        The correlations; NaN where one side is constant.

    Example:
        >>> spearman([[1., 3.], [2., 2.], [3., 1.]], [[1., 0.], [.5, .5], [0., 1.]]).tolist()
        [-1.0, -1.0]
    """
    array = _points("losses", losses)
    tasks = array.shape[1]
    if kind == "losses":
        pairs = [(i, j) for i in range(tasks) for j in range(i + 1, tasks)]
        return np.array([_correlation(array[:, i], array[:, j]) for i, j in pairs])
    if kind != "preference":
        raise ValueError(f"kind must be 'preference' or 'losses', got {kind!r}")
    lam = _points("prefs", prefs)
    if lam.shape != array.shape:
        raise ValueError(f"losses {array.shape} and prefs {lam.shape} must have one shape")
    return np.array([_correlation(lam[:, t], array[:, t]) for t in range(tasks)])


def uniformity(losses: Any, prefs: Any) -> Array:
    """Return u(λ) = 1 − KL(l̂ ‖ 1/T) for each point, with l̂_t ∝ λ_t L_t; 1 is ideal.

    The non-uniformity of EPO and PHN: on an exact Pareto-optimal ray all λ_t L_t are equal.

    Args:
        losses: ``(m, T)``, positive.
        prefs: ``(m, T)``.

    Example:
        >>> uniformity([[1., 3.]], [[.75, .25]]).tolist()
        [1.0]
    """
    array, lam = _points("losses", losses), _points("prefs", prefs)
    if array.shape != lam.shape:
        raise ValueError(f"losses {array.shape} and prefs {lam.shape} must have one shape")
    if (array < 0).any():
        raise ValueError("uniformity is defined for losses that are not negative")
    weighed = array * lam
    total = weighed.sum(1, keepdims=True)
    if (total == 0).any():
        raise ValueError("uniformity is undefined where every λ_t L_t is 0")
    share = weighed / total
    tasks = array.shape[1]
    logs = np.log(np.where(share > 0, share, 1.0) * tasks)
    found: Array = 1 - (share * logs).sum(1)
    return found


def uniformity_entropy(losses: Any) -> float:
    """Return Σ p·log(p·m) with each objective normalised over the m points to sum 1.

    What the authors' code calls uniformity: zero when all points are equal. It is a different
    quantity from :func:`uniformity`.
    """
    array = _points("losses", losses)
    if (array < 0).any() or (array.sum(0) == 0).any():
        raise ValueError("uniformity_entropy is defined for positive losses")
    p = array / array.sum(0)
    return float((p * np.log(np.where(p > 0, p, 1.0) * len(p))).sum())
