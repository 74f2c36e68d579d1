"""What a call gives back: the distance, the matching, and the bounds that certify it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from deepemd.core.distance import gather_points, pair_distance, working


@dataclass(frozen=True)
class EMDOutput:
    """The result of :func:`deepemd.match`; a pytree of tensors.

    Attributes:
        distance: (B,), differentiable in both clouds.
        index: (B, N) int64, the partner in Y of each point of X; -1 for padding and unmatched points;
            None where the method has no matching (sliced, a transport plan).
        inverse: (B, M), the partner in X of each point of Y, -1 likewise.
        plan: (B, N, M) weights that sum to 1, if asked for; a sparse COO tensor for a matching.
        potentials: ``(f, g)``, feasible for the dual, or None.
        lower, upper: (B,) bounds of the exact EMD, None where the method has none.
        bijective: (B,) bool: is ``index`` one-to-one on the real points.
        iterations: rounds or sweeps of the solver; 0 for closed forms.
        converged: (B,) bool: the solver met its own certificate.
        method: the one that was used, ``"auto"`` resolved.
    """

    distance: Tensor
    index: Tensor | None
    inverse: Tensor | None
    plan: Tensor | None
    potentials: tuple[Tensor, Tensor] | None
    lower: Tensor | None
    upper: Tensor | None
    bijective: Tensor
    iterations: int
    converged: Tensor
    method: str

    @property
    def rel_gap(self) -> Tensor | None:
        """``(upper - lower) / upper`` (B,), 0 where both are 0; None without both bounds."""
        if self.lower is None or self.upper is None:
            return None
        tiny = torch.finfo(self.upper.dtype).tiny
        gap = (self.upper - self.lower).clamp_min(0) / self.upper.clamp_min(tiny)
        return gap.nan_to_num(nan=1.0)  # without an upper bound

    def squeeze(self) -> EMDOutput:
        """Drop the batch dimension of a single pair."""
        changed = {
            field.name: value[0]
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        if self.potentials is not None:
            f, g = self.potentials
            changed["potentials"] = (f[0], g[0])  # type: ignore[assignment]
        return replace(self, **changed)  # type: ignore[arg-type]


_NAMES = tuple(field.name for field in fields(EMDOutput))


def _flatten(out: EMDOutput) -> tuple[list[Any], None]:
    return [getattr(out, name) for name in _NAMES], None


def _unflatten(children: Any, _context: Any) -> EMDOutput:
    return EMDOutput(**dict(zip(_NAMES, children, strict=True)))


_pytree.register_pytree_node(
    EMDOutput, _flatten, _unflatten, serialized_type_name="deepemd.EMDOutput"
)


@dataclass(frozen=True)
class Solution:
    """What a solver found for pairs of one size, before distances are taken: detached tensors.

    ``index`` (B, N) and ``inverse`` (B, M) with -1 for unmatched; ``plan`` (B, N, M) summing to 1;
    potentials ``f`` and ``g``; bounds; ``iterations``; ``converged`` (B,). ``value`` overrides the
    distance for methods whose value is not a matching's mean cost (differentiable).
    """

    index: Tensor | None = None
    inverse: Tensor | None = None
    plan: Tensor | None = None
    f: Tensor | None = None
    g: Tensor | None = None
    lower: Tensor | None = None
    upper: Tensor | None = None
    iterations: int = 0
    converged: Tensor | None = None
    value: Tensor | None = None

    def replace(self, **changes: Any) -> Solution:
        """Return a copy with some fields changed."""
        return replace(self, **changes)


class _PlanCost(torch.autograd.Function):
    """``Σ_ij P_ij ||x_i - y_j||^p`` with the plan constant, or differentiated where it asks for it."""

    @staticmethod
    def forward(ctx, x, y, plan, p):  # type: ignore[no-untyped-def]
        squared = torch.zeros((), dtype=x.dtype, device=x.device)
        for d in range(x.shape[-1]):
            squared = squared + (x[..., :, None, d] - y[..., None, :, d]).square()
        cost = squared if p == 2 else squared.sqrt()
        ctx.save_for_backward(x, y, plan, cost)
        ctx.p = p
        return (plan * cost).sum((-1, -2))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, y, plan, cost = ctx.saved_tensors
        if ctx.p == 2:
            weight = 2 * plan
        else:
            weight = torch.where(cost > 0, plan / torch.where(cost > 0, cost, 1.0), 0.0)
        grad_x, grad_y = torch.empty_like(x), torch.empty_like(y)
        for d in range(x.shape[-1]):
            pull = weight * (x[..., :, None, d] - y[..., None, :, d])
            grad_x[..., d], grad_y[..., d] = pull.sum(-1), -pull.sum(-2)
        scale = grad[..., None, None]
        grad_plan = scale * cost if ctx.needs_input_grad[2] else None
        return scale * grad_x, scale * grad_y, grad_plan, None


def plan_cost(x: Tensor, y: Tensor, plan: Tensor, p: int = 1) -> Tensor:
    """Return ``<P, C>`` (B,), differentiable in the clouds, and in the plan where it requires it.

    Memory is O(N M) in the backward pass too, whatever D; coincident points contribute 0. First
    derivatives only.

    >>> plan_cost(torch.zeros(1, 1, 2), torch.tensor([[[3.0, 4.0]]]), torch.ones(1, 1, 1))
    tensor([5.])
    """
    with torch.autocast(x.device.type, enabled=False):
        x, y = working(x), working(y)
        cost: Tensor = _PlanCost.apply(x, y, plan.to(x.dtype), p)  # type: ignore[no-untyped-call]
    return cost


def matching_cost(x: Tensor, y: Tensor, index: Tensor, p: int = 1) -> Tensor:
    """Return ``(1/n) Σ_i ||x_i - y_{φ(i)}||^p`` (B,) over the rows with ``index >= 0``.

    The matching is constant (the envelope theorem: the gradient of a minimum over matchings is that
    of the minimiser), so ``dx_i`` is a unit vector over n and ``dy_j`` sums those of its partners.
    """
    cost = pair_distance(x, gather_points(y, index), p)
    real = index >= 0
    return torch.where(real, cost, torch.zeros_like(cost)).sum(1) / real.sum(1).clamp_min(1)


def is_bijection(index: Tensor, size: int, pairs: Tensor) -> Tensor:
    """Tell for each row of (B, N) whether its entries >= 0 name different columns, ``pairs`` of them."""
    hit = torch.zeros(len(index), size + 1, dtype=torch.bool, device=index.device)
    hit.scatter_(1, torch.where(index < 0, size, index), True)
    matched = (index >= 0).sum(1)
    return (hit[:, :size].sum(1) == matched) & (matched == pairs)


def sparse_plan(index: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Return a matching as a sparse COO plan (B, N, M) that sums to 1."""
    real = index >= 0
    b, i = real.nonzero(as_tuple=True)
    weight = (1.0 / real.sum(1).to(dtype))[b]
    where = torch.stack([b, i, index[b, i]])
    shape = (*index.shape, size)
    return torch.sparse_coo_tensor(where, weight, shape, check_invariants=False).coalesce()
