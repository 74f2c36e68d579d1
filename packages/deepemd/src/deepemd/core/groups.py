"""Ragged batches: pairs of equal real sizes are solved together, without their padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from deepemd.core.output import Solution


class Group(NamedTuple):
    """Pairs ``items`` (K,) of a batch with the positions of their real points: (K, n) and (K, m)."""

    items: Tensor
    at_x: Tensor
    at_y: Tensor


def _positions(
    mask: Tensor | None, size: int, batch: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the real points' positions, first in order, and their number per cloud."""
    if mask is None:
        every = torch.arange(size, device=device).expand(batch, size)
        return every, torch.full((batch,), size, device=device)
    return (~mask).to(torch.uint8).argsort(dim=1, stable=True), mask.sum(1)


def groups(x: Tensor, y: Tensor, mask_x: Tensor | None, mask_y: Tensor | None) -> Iterator[Group]:
    """Cut a padded batch into groups of pairs with the same real sizes (n, m)."""
    at_x, n = _positions(mask_x, x.shape[1], len(x), x.device)
    at_y, m = _positions(mask_y, y.shape[1], len(y), y.device)
    sizes = torch.stack([n, m], 1)
    for pair in sizes.unique(dim=0):
        items = (sizes == pair).all(1).nonzero().squeeze(1)
        yield Group(items, at_x[items, : int(pair[0])], at_y[items, : int(pair[1])])


def take(points: Tensor, items: Tensor, at: Tensor) -> Tensor:
    """Gather the real points of a group: (K, n, D)."""
    return points[items.unsqueeze(1), at]


def solve_groups(
    x: Tensor,
    y: Tensor,
    mask_x: Tensor | None,
    mask_y: Tensor | None,
    solve: Callable[[Tensor, Tensor, Group | None], tuple[Solution, Tensor]],
) -> tuple[Solution, Tensor]:
    """Run ``solve`` on each group and put matchings, plans and potentials back in padded places.

    ``solve`` receives real points only and returns a solution with the distance (K,). Without masks it
    runs once, on the batch as it is.
    """
    if mask_x is None and mask_y is None:
        return solve(x, y, None)
    batch, n, m = len(x), x.shape[1], y.shape[1]
    parts: list[tuple[Group, Solution]] = []
    distances, order = [], []
    for group in groups(x, y, mask_x, mask_y):
        solution, distance = solve(take(x, *group[:2]), take(y, group.items, group.at_y), group)
        parts.append((group, solution))
        distances.append(distance)
        order.append(group.items)
    if not parts:
        return solve(x, y, None)
    distance = torch.cat(distances)[torch.cat(order).argsort()]
    found = [solution for _, solution in parts]
    if any(part.plan is not None for part in found):  # a matching beside a plan is one, too
        found = [_with_plan(part) for part in found]
    out: dict[str, Tensor | None] = {}
    for name, shape, fill in (
        ("index", (batch, n), -1), ("inverse", (batch, m), -1), ("plan", (batch, n, m), 0.0),
        ("f", (batch, n), 0.0), ("g", (batch, m), 0.0), ("lower", (batch,), 0.0),
        ("upper", (batch,), torch.inf), ("converged", (batch,), 0),
    ):  # fmt: skip
        values = [getattr(part, name) for part in found]
        example = next((value for value in values if value is not None), None)
        if example is None:
            out[name] = None
            continue
        full = torch.full(shape, fill, dtype=example.dtype, device=example.device)
        for (group, _), value in zip(parts, values, strict=True):
            if value is not None:
                _put(full, name, group, value)
        out[name] = full
    return Solution(iterations=max(part.iterations for part in found), **out), distance


def _with_plan(part: Solution) -> Solution:
    if part.plan is not None or part.index is None or part.inverse is None:
        return part
    n, m = part.index.shape[1], part.inverse.shape[1]
    plan = torch.zeros(len(part.index), n, m, device=part.index.device)
    plan.scatter_(2, part.index.clamp_min(0).unsqueeze(2), 1.0)
    plan = plan * (part.index >= 0).unsqueeze(2)
    return part.replace(plan=plan / plan.sum((1, 2), keepdim=True))


def _put(full: Tensor, name: str, group: Group, value: Tensor) -> None:
    items, at_x, at_y = group
    if name in ("lower", "upper", "converged"):
        full[items] = value
    elif name == "plan":
        full[items[:, None, None], at_x[:, :, None], at_y[:, None, :]] = value
    elif name in ("f", "g"):
        full[items.unsqueeze(1), at_x if name == "f" else at_y] = value
    else:
        own, other = (at_x, at_y) if name == "index" else (at_y, at_x)
        named = other.gather(1, value.clamp_min(0))
        full[items.unsqueeze(1), own] = torch.where(value < 0, -1, named)
