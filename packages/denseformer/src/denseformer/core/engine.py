"""The autograd of a run: one node per average, gradients pulled, never pushed.

With G_m the gradient of Y_m, the gradient of X_j is Σ_m α_mj G_m over the rows m that read it, and that
of α_mj is ⟨G_m, X_j⟩. When backward reaches X_j every G_m that it needs is known. Two tokens, tensors
without storage, thread the nodes in order; what travels backward along them as their *gradients* is the
slab of all G (and the partial sums of a group) and the matrix of all dα. So there is no state outside
the graph: two losses, a retained graph and a backward pass from the middle are all right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from denseformer.core import kernels
from denseformer.core.plan import Group, Plan, Row


class Coefficients:
    """The weights as they were when a run began, in the forms that the products want."""

    def __init__(self, weight: Tensor, plan: Plan, x: Tensor) -> None:
        self.plan = plan
        self.dtype = kernels.accumulate_dtype(x.dtype)
        self.weight = weight.detach().to(self.dtype, copy=True)
        host = self.weight.device.type == "cpu"
        self._scalars: Sequence[Any] = self.weight.tolist() if host else self.weight.unbind()
        self._dense: Tensor | None = None

    def at(self, start: int, stop: int) -> Sequence[kernels.Scalar]:
        """Return packed weights as scalars."""
        return self._scalars[start:stop]

    def dense(self) -> Tensor:
        """Return the matrix (rows, columns), zero outside the sources."""
        if self._dense is None:
            self._dense = scatter(self.weight, self.plan)
        return self._dense


def scatter(weight: Tensor, plan: Plan) -> Tensor:
    """Return the dense matrix (rows, columns) of a packed weight vector; differentiable."""
    flat = weight.new_zeros(len(plan.rows) * plan.columns)
    flat = flat.scatter(0, plan.positions(weight.device), weight)
    return flat.view(len(plan.rows), plan.columns)


class Forward:
    """Computes the rows of one run, a group at a time, holding what later rows need."""

    def __init__(
        self, plan: Plan, coefficients: Coefficients, columns: list[Tensor | None]
    ) -> None:
        self.plan = plan
        self.coefficients = coefficients
        self.columns = columns
        self._partial: Tensor | None = None

    def row(self, row: Row, init: Tensor | None = None) -> Tensor:
        """Return Σ_j α_j X_j (+ init) of one row."""
        group = self.plan.groups[row.group]
        if row.index == group.start and group.old:
            matrix = self.coefficients.dense()[group.start : group.stop, list(group.old)]
            self._partial = kernels.project(matrix, self.take(group.old))
        if self._partial is not None:
            start = self._partial[row.index - group.start]
            init = start if init is None else start + init
        stop = row.offset + len(row.sources)
        weights = self.coefficients.at(stop - len(row.inside), stop)
        out = self.coefficients.dtype if self.plan.steps[row.index] > self.plan.depth else None
        if row.inside:
            y = kernels.combine(self.take(row.inside), weights, init, out)
        else:
            assert init is not None
            y = init.clone()
        if row.index == group.stop - 1:
            self._partial = None
        return y

    def take(self, columns: Sequence[int]) -> list[Tensor]:
        """Return representations by column."""
        found = [self.columns[c] for c in columns]
        return [t for t in found if t is not None]

    def release(self, row: Row) -> None:
        """Let go of every column that nothing needs after this row."""
        for c in row.done:
            self.columns[c] = None


class RowFunction(torch.autograd.Function):
    """One average: (weight, tokens, init, owned columns) -> (Y, tokens)."""

    @staticmethod
    def forward(
        ctx: Any,
        engine: Forward,
        row: Row,
        weight: Tensor,
        slab_token: Tensor | None,
        weight_token: Tensor | None,
        init: Tensor | None,
        *owned: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute Y and the two tokens."""
        ctx.set_materialize_grads(False)
        plan, group = engine.plan, engine.plan.groups[row.group]
        x = owned[-1] if owned else engine.take(row.sources)[-1]
        y = engine.row(row, init)
        ctx.plan, ctx.row, ctx.coefficients = plan, row, engine.coefficients
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.init_dtype = None if init is None else init.dtype
        ctx.last = row.index == group.stop - 1 and group.stop < len(plan.rows)
        in_group = engine.take(group.cols) if ctx.last else list(owned)
        ctx.wanted = any(t.requires_grad for t in in_group)
        saved = in_group if weight.requires_grad else []
        ctx.first = slab_token is None
        ctx.save_for_backward(weight, *saved)
        dtype = engine.coefficients.dtype
        slab = x.new_empty((), dtype=dtype).expand(len(plan.rows) + plan.width, *x.shape)
        matrix = x.new_empty((), dtype=dtype).expand(len(plan.rows), plan.columns)
        return y, slab, matrix

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *tokens: Tensor | None) -> tuple[Any, ...]:
        """Place this row's gradient in the slab and pull those of its columns from it."""
        present = [t for t in (grad, *tokens) if t is not None]
        if not present:
            return (None,) * (6 + len(ctx.needs_input_grad[6:]))
        if torch.is_grad_enabled() or any(map(_is_wrapped, present)):
            slab, matrix, found = _differentiable(ctx, grad, *tokens)
        else:
            slab, matrix, found = _pull(ctx, grad, *tokens)
        weight_grad = None
        if ctx.first and ctx.needs_input_grad[2] and matrix is not None:
            weight = ctx.saved_tensors[0]
            weight_grad = matrix.reshape(-1)[ctx.plan.positions(weight.device)].to(weight.dtype)
        init_grad = None
        if ctx.needs_input_grad[5] and grad is not None:
            init_grad = grad.to(ctx.init_dtype)
        keep = ctx.needs_input_grad[3], ctx.needs_input_grad[4]
        return (
            None,
            None,
            weight_grad,
            slab if keep[0] else None,
            matrix if keep[1] else None,
            init_grad,
            *found,
        )


def _is_wrapped(t: Tensor) -> bool:
    functorch = torch._C._functorch
    return bool(functorch.is_functorch_wrapped_tensor(t) or functorch.is_legacy_batchedtensor(t))


def _saved(ctx: Any, group: Group) -> tuple[list[Tensor] | None, list[Tensor] | None]:
    """Return the saved columns of the whole group and those that the row owns."""
    kept = list(ctx.saved_tensors[1:])
    if not kept:
        return None, None
    if not ctx.last:
        return None, kept
    return kept, kept[ctx.row.slot : ctx.row.slot + len(ctx.row.owned)]


def _new_slab(ctx: Any, like: Tensor) -> Tensor:
    """Make the slab in the first node that backward reaches; rows deeper than it count as zero."""
    plan: Plan = ctx.plan
    rows = len(plan.rows)
    shape = (rows + plan.width, *ctx.shape)
    make = torch.zeros if torch.is_anomaly_enabled() else torch.empty
    slab = make(shape, dtype=ctx.coefficients.dtype, device=like.device)
    slab[ctx.row.index + 1 :].zero_()
    return slab


def _pull(
    ctx: Any, grad: Tensor | None, slab: Tensor | None, matrix: Tensor | None
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    plan: Plan = ctx.plan
    row: Row = ctx.row
    r, group = row.index, plan.groups[row.group]
    dense = ctx.coefficients.dense()
    grouped, own = _saved(ctx, group)
    if slab is None:
        assert grad is not None
        slab = _new_slab(ctx, grad)
    if matrix is None and own is not None:
        matrix = torch.zeros_like(dense)
    if grad is None:
        slab[r].zero_()
    else:
        slab[r].copy_(grad)
    flat = slab.view(slab.shape[0], -1)
    rows = len(plan.rows)
    if ctx.last:  # what all later groups send to all columns of this one, in one product
        cols = list(group.cols)
        room = flat[rows : rows + len(cols)]
        below = flat[group.stop : rows]
        weights = dense[group.stop :, cols]
        _, inner = kernels.pull(below, weights, grouped, want=ctx.wanted, out=room)
        if inner is not None and matrix is not None:
            matrix[group.stop :, cols] = inner
    starts: list[Tensor | None] = [None] * len(row.owned)
    if group.stop < rows:
        starts = list(flat[rows + row.slot : rows + row.slot + len(row.owned)])
    found: list[Tensor | None] = []
    dots: list[Tensor] = []
    places: list[int] = []
    for n, c in enumerate(row.owned):
        need = bool(ctx.needs_input_grad[6 + n])
        x, start = None if own is None else own[n], starts[n]
        readers = [(m, at) for m, at in plan.readers[c] if r <= m < group.stop]
        if not readers:
            found.append(None if start is None else start.clone())  # the slab goes on changing
        elif 2 * len(readers) > group.stop - r and len(readers) > 1:
            weights = dense[r : group.stop, c : c + 1]
            out, inner = kernels.pull(
                flat[r : group.stop],
                weights,
                None if x is None else [x],
                want=need,
                init=None if start is None else start.unsqueeze(0),
            )
            found.append(None if out is None else out[0])
            if inner is not None and matrix is not None:
                matrix[r : group.stop, c] = inner[:, 0]
        else:  # few of the rows: one by one
            scalars = [ctx.coefficients.at(at, at + 1)[0] for _, at in readers]
            grads = [flat[m] for m, _ in readers]
            out, inners = kernels.pull_column(grads, scalars, x, want=need, init=start)
            found.append(out)
            dots += inners
            places += [m * plan.columns + c for m, _ in readers] if inners else []
    if dots and matrix is not None:
        at_place = torch.tensor(places, device=matrix.device)
        matrix.view(-1).index_copy_(0, at_place, torch.stack(dots))
    return slab, matrix, [t if t is None else t.to(ctx.dtype).view(ctx.shape) for t in found]


def _differentiable(
    ctx: Any, grad: Tensor | None, slab: Tensor | None, matrix: Tensor | None
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """The same by differentiable operations, row after row: for second derivatives."""
    plan: Plan = ctx.plan
    row: Row = ctx.row
    r, rows = row.index, len(plan.rows)
    weight = ctx.saved_tensors[0]
    dense = scatter(weight.to(ctx.coefficients.dtype), plan)
    _, own = _saved(ctx, plan.groups[row.group])
    if slab is None:
        assert grad is not None
        slab = grad.new_zeros((rows + plan.width, *ctx.shape), dtype=dense.dtype)
    line = torch.zeros_like(slab[0]) if grad is None else grad.to(dense.dtype)
    slab = torch.cat([slab[:r], line.unsqueeze(0), slab[r + 1 :]])
    below = slab[r:rows]
    found: list[Tensor | None] = []
    for n, c in enumerate(row.owned):
        needed = ctx.needs_input_grad[6 + n]
        pulled = torch.tensordot(dense[r:, c], below, dims=1).to(ctx.dtype)
        found.append(pulled if needed else None)
        if own is not None:
            products = below * own[n].to(dense.dtype)
            inner = products.reshape(rows - r, own[n].numel()).sum(1)
            step = torch.nn.functional.pad(inner, (r, 0)).unsqueeze(1)
            step = torch.nn.functional.pad(step, (c, plan.columns - c - 1))
            matrix = step if matrix is None else matrix + step
    return slab, matrix, found
