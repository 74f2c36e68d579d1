"""The nearest point of a set of constraints: exactly for linear ones, by SLSQP for soft ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize, nnls
from torch import Tensor

from mi_surrogates.errors import InfeasibleDesign

Floats = NDArray[np.float64]
Row = tuple[Floats, float, bool]


def nearest(theta: Floats, lower: Floats, upper: Floats, linear: Sequence[Row] = ()) -> Floats:
    """Return the Euclidean projection of a point onto a box and rows a·θ ≤ b (or = b).

    Least-distance programming (Lawson and Hanson, chapter 23): one non-negative least-squares problem,
    solved exactly in finitely many steps.

    Raises:
        ValueError: the point is not finite.
        InfeasibleDesign: the set is empty.

    Example:
        >>> nearest(np.array([2.0, 2.0]), np.zeros(2), np.ones(2), [(np.ones(2), 1.0, False)])
        array([0.5, 0.5])
    """
    if not np.isfinite(theta).all():
        raise ValueError(f"the design must be finite, got {theta}")
    clipped = np.clip(theta, lower, upper)
    if _holds(clipped, linear, 0.0):
        return clipped
    # in the units of the box's width all rows are of order one; distances stay Euclidean, since the
    # same scale is used for every coordinate
    scale = float((upper - lower).max())
    eye = np.eye(theta.size)
    rows, limits = [eye, -eye], [(lower - theta) / scale, (theta - upper) / scale]
    for row, limit, equal in linear:
        size = float(np.linalg.norm(row)) or 1.0
        gap = np.array([(float(row @ theta) - limit) / (size * scale)])
        rows.append(-row[None] / size)
        limits.append(gap)
        if equal:
            rows.append(row[None] / size)
            limits.append(-gap)
    g, h = np.concatenate(rows), np.concatenate(limits)  # G z ≥ h for z = (point − θ)/scale
    matrix = np.concatenate([g.T, h[None]])
    target = np.zeros(theta.size + 1)
    target[-1] = 1
    dual, norm = nnls(matrix, target)
    if norm < 1e-9:
        raise InfeasibleDesign("no design within the bounds satisfies all linear constraints")
    residual = matrix @ dual - target
    point = np.clip(theta - scale * residual[:-1] / residual[-1], lower, upper)
    if not _holds(point, linear, 1e-7):
        raise InfeasibleDesign("no design within the bounds satisfies all linear constraints")
    return np.asarray(point)


def _holds(theta: Floats, linear: Sequence[Row], tolerance: float) -> bool:
    for row, limit, equal in linear:
        slack = tolerance * (abs(limit) + float(np.abs(row) @ np.abs(theta)))
        excess = float(row @ theta) - limit
        if excess > slack or (equal and excess < -slack):
            return False
    return True


def nearest_soft(
    theta: Floats,
    lower: Floats,
    upper: Floats,
    linear: Sequence[Row],
    soft: Sequence[Callable[[Tensor], Tensor]],
) -> Floats:
    """Return a near point with all soft constraints g ≤ 0 (batched, (B, F) to (B,)) satisfied.

    Raises:
        InfeasibleDesign: none was found to 1e-3.

    Example:
        >>> unit = lambda t: t.square().sum(-1) - 1
        >>> nearest_soft(np.ones(2), np.zeros(2), np.ones(2), [], [unit]).round(4)
        array([0.7071, 0.7071])
    """
    width = upper - lower

    def value(u: Floats, g: Callable[[Tensor], Tensor]) -> float:
        with torch.no_grad():
            return -float(g(torch.from_numpy(lower + u * width)[None])[0])

    def slope(u: Floats, g: Callable[[Tensor], Tensor]) -> Floats:
        point = torch.from_numpy(lower + u * width).requires_grad_()
        (grad,) = torch.autograd.grad(g(point[None])[0], point)
        return np.asarray(-grad.numpy() * width)

    constraints = [{"type": "ineq", "fun": value, "jac": slope, "args": (g,)} for g in soft]
    for row, limit, equal in linear:
        size = abs(limit) or 1.0

        def row_value(u: Floats, row: Floats = row, b: float = limit, s: float = size) -> float:
            return (b - float(row @ (lower + u * width))) / s

        constraints.append({"type": "eq" if equal else "ineq", "fun": row_value})
    start = (theta - lower) / width
    found = minimize(
        lambda u: float(((u - start) ** 2).sum() / 2),
        start,
        jac=lambda u: u - start,
        bounds=[(0.0, 1.0)] * theta.size,
        constraints=constraints,
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 200},
    )
    point = nearest(lower + found.x.clip(0, 1) * width, lower, upper, linear)
    worst = max(-value((point - lower) / width, g) for g in soft)
    if not worst <= 1e-3:
        raise InfeasibleDesign(f"no near design satisfies the soft constraints ({worst:.3g} left)")
    return point
