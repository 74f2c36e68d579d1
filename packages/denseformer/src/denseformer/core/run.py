"""One forward pass through a stack with depth-weighted averages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from denseformer.core import kernels
from denseformer.core.engine import Coefficients, Forward, RowFunction
from denseformer.core.plan import Plan, Row


def needs_functional(x: Tensor) -> bool:
    """Tell whether a transform is at work that wants plain differentiable operations."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or getattr(forward_ad, "_current_level", -1) >= 0
        or type(x) not in (Tensor, torch.nn.Parameter)
    )


def _is_dtensor(x: Tensor) -> bool:
    return type(x).__name__ == "DTensor"


def literal(
    xs: Sequence[Tensor],
    weight: Tensor,
    init: Tensor | None = None,
    out: torch.dtype | None = None,
) -> Tensor:
    """Return init + Σ_j w_j x_j as it is written, one product and one sum per term."""
    dtype = kernels.accumulate_dtype(xs[0].dtype)
    total = init
    wide = weight.to(dtype)
    # DTensor before torch 2.9 cannot unbind
    parts = wide.split(1) if _is_dtensor(wide) else wide.unbind()
    for x, w in zip(xs, parts, strict=True):
        term = x.to(dtype) * w
        total = term if total is None else total + term
    assert total is not None
    return total.to(out or xs[0].dtype)


def stacked(
    xs: Sequence[Tensor],
    weight: Tensor,
    init: Tensor | None = None,
    out: torch.dtype | None = None,
) -> Tensor:
    """Return the same as :func:`literal` in three operations, for tensors so small that calls decide."""
    if len(xs) <= 4:  # as few operations as that
        return literal(xs, weight, init, out)
    x, dtype = xs[0], kernels.accumulate_dtype(xs[0].dtype)
    scaled = torch.stack(list(xs)) * weight.to(dtype).view(-1, *([1] * x.dim()))
    total = scaled.sum(0)
    return (total if init is None else total + init).to(out or x.dtype)


def beside(weight: Tensor, x: Tensor) -> Tensor:
    """Return the weight as a replicated DTensor where ``x`` is one, so that its gradient is reduced."""
    if not _is_dtensor(x) or _is_dtensor(weight):
        return weight
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(x, DTensor)
    mesh = x.device_mesh
    return DTensor.from_local(weight, mesh, [Replicate()] * mesh.ndim, run_check=False)


def check_stream(x: object, name: str) -> Tensor:
    """Return ``x`` if it can be averaged: a tensor of real floating-point numbers."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be a tensor or a tuple that starts with one, got {type(x).__name__}"
        )
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a tensor of a real floating-point type, got {x.dtype}")
    return x


def _version(x: Tensor) -> int:
    try:
        return x._version
    except RuntimeError:  # an inference tensor has none
        return -1


class DepthRun:
    """Returned by :meth:`DWA.begin`; call it with every block's output, in order.

    ``y = run(block(x))`` takes X_i and returns Y_i, the input of block i + 1. A tuple is returned with its
    first element replaced. The run holds the representations that later rows read, by reference, and
    lets go of each after its last reader; after block d it holds nothing.

    Raises:
        ValueError: an output's shape, type or device differs from X_0's.
        TypeError: an output is not a floating-point tensor, nor a tuple that starts with one.
        RuntimeError: more steps than blocks, a step inside a recomputed region of a checkpoint, a
            representation changed in place, or (from :meth:`close`) missing steps.
    """

    def __init__(
        self,
        plan: Plan,
        weight: Tensor,
        x0: Tensor,
        columns: Sequence[Tensor],
        inits: Mapping[int, Tensor] | None = None,
        passing: Sequence[Tensor] = (),
        *,
        reference: bool = False,
        recompute: bool = False,
        offset: int = 0,
    ) -> None:
        self._plan = plan
        self._inits = dict(inits or {})
        self._passing = list(passing)
        self._like = x0.shape, x0.dtype, x0.device
        self._offset = offset
        self._depth = 0
        self._input: Tensor | None = x0
        self._recompute = recompute
        self._recipe: tuple[Tensor, Callable[[], Tensor]] | None = None
        self._tokens: tuple[Tensor | None, Tensor | None] = (None, None)
        self._columns: list[Tensor | None] = list(columns)
        self._versions: list[int] = []
        self._sums: dict[int, Tensor] | None = None
        self._engine: Forward | None = None
        # a copy: the parameter may be stepped, or resharded by FSDP, before the run has ended
        self._weight = weight.clone() if torch.is_grad_enabled() else weight
        self._watched = self._lean = False
        self._sum = literal
        if reference or needs_functional(x0):
            self._weight = beside(self._weight, x0)
            return
        outside_backward()
        self._watched = True
        self._versions = [_version(t) for t in columns]
        size, grad = x0.numel(), torch.is_grad_enabled()
        if grad and not recompute and size * plan.nnz <= kernels.STACK:
            self._sum = stacked
            return
        self._engine = Forward(plan, Coefficients(weight, plan, x0), self._columns)
        if not grad and size > kernels.SMALL:
            self._lean = not (plan.payload or plan.keep or inits)

    @property
    def depth(self) -> int:
        """Number of blocks done; counted within the stage in a pipeline."""
        return self._depth

    def __call__(self, x: Any) -> Any:
        """Take X_i (or a tuple that starts with it), return Y_i (or that tuple with it)."""
        if isinstance(x, tuple) and x:
            first, rest = self(x[0]), x[1:]
            return type(x)(first, *rest) if hasattr(x, "_fields") else (first, *rest)
        plan = self._plan
        i = self._depth + 1
        if i > plan.depth:
            if not torch.compiler.is_compiling():
                outside_backward()
            raise RuntimeError(
                f"this run is over: it has taken all {plan.depth} block outputs; call begin() again"
            )
        self._check(x, i)
        self._depth = i
        self._recipe = None
        row = plan.row_at.get(i)
        if self._sums is not None:
            y = self._push(x, row)
        else:
            c = len(self._columns)
            kept = x if plan.last_reader[c] >= 0 or c in plan.keep else None
            self._columns.append(kept)
            if self._watched:
                self._versions.append(-1 if kept is None else _version(x))
            y = x if row is None else self._row(row)
            if self._lean and i >= plan.switch:
                self._to_sums(row)
        self._input = y
        if i == plan.depth and not (plan.payload or plan.keep):
            self._release()
        return y

    def skip(self) -> Any:
        """Declare that the next block is left out this time (LayerDrop): it acts as the identity."""
        if self._depth == self._plan.depth:
            raise RuntimeError(
                f"this run is over: it has taken all {self._plan.depth} block outputs"
            )
        return self(self._input)

    def close(self) -> None:
        """Check that every block has been stepped, and release everything.

        Raises:
            RuntimeError: steps are missing.
        """
        done, depth = self._depth, self._plan.depth
        self._release()
        if done < depth:
            raise RuntimeError(
                f"the run ended after {done} of {depth} blocks; use skip(), or skip_block(model, x), for blocks left out"
            )

    def payload(self) -> tuple[Tensor, ...]:
        """Return what the next pipeline stage needs beside Y; see :mod:`denseformer.pipeline`."""
        if self._depth < self._plan.depth:
            raise RuntimeError(
                f"payload() after {self._depth} of {self._plan.depth} blocks of the stage"
            )
        plan = self._plan
        out = [t for t in (self._columns[c] for c in plan.keep) if t is not None]
        for r in plan.payload:
            out.append(self._passing.pop(0) if r < 0 else self._row(plan.rows[r]))
        self._release()
        return tuple(out)

    def _check(self, x: object, i: int) -> None:
        like = self._like
        if (
            isinstance(x, Tensor)
            and x.shape == like[0]
            and x.dtype == like[1]
            and x.device == like[2]
        ):
            return
        i += self._offset
        x = check_stream(x, f"the output of block {i}")
        shape, dtype, device = self._like
        if x.shape != shape:
            raise ValueError(f"block {i} returned {tuple(x.shape)}, expected {tuple(shape)}")
        raise ValueError(
            f"block {i} returned {x.dtype} on {x.device}, expected {dtype} on {device}"
        )

    def _row(self, row: Row) -> Tensor:
        init = self._inits.pop(row.index, None) if self._inits else None
        if self._watched:
            outside_backward()
            self._check_versions(row)
        if self._engine is None:
            xs = [t for t in (self._columns[c] for c in row.sources) if t is not None]
            weight = self._weight[row.offset : row.offset + len(row.sources)]
            tail = self._plan.steps[row.index] > self._plan.depth
            out = kernels.accumulate_dtype(xs[0].dtype) if tail else None
            y = self._sum(xs, weight, init, out)
            for c in row.done:
                self._columns[c] = None
            return y
        if torch.is_grad_enabled():
            xs = [t.detach() for t in self._engine.take(row.sources)] if self._recompute else []
            owned = self._engine.take(row.owned)
            y, *tokens = RowFunction.apply(  # type: ignore[no-untyped-call]
                self._engine, row, self._weight, *self._tokens, init, *owned
            )
            self._tokens = tokens[0], tokens[1]
            if xs:
                weights = self._engine.coefficients.at(row.offset, row.offset + len(xs))
                start = None if init is None else init.detach()
                self._recipe = y, lambda: kernels.combine(xs, weights, start)
        else:
            y = self._engine.row(row, init)
        self._engine.release(row)
        assert isinstance(y, Tensor)
        return y

    def _check_versions(self, row: Row) -> None:
        for c in row.sources:
            t = self._columns[c]
            if t is not None and _version(t) != self._versions[c]:
                raise RuntimeError(
                    f"representation {c} was changed in place after the run had taken it (a block edits "
                    "its input); a later average still needs it: let the block work on a copy"
                )

    def _to_sums(self, row: Row | None) -> None:
        """Without gradients: replace the kept columns by partial sums of the future rows, now fewer."""
        assert self._engine is not None
        later = [r for r in self._plan.rows if self._plan.steps[r.index] > self._depth]
        kept = [c for c, t in enumerate(self._columns) if t is not None]
        rows = [r.index for r in later if r.sources[0] < len(self._columns)]
        self._sums = {}
        if rows and kept:
            matrix = self._engine.coefficients.dense()[rows][:, kept]
            sums = kernels.project(matrix, self._engine.take(kept))
            self._sums = dict(zip(rows, sums, strict=True))
        self._columns.clear()

    def _push(self, x: Tensor, row: Row | None) -> Tensor:
        """Add X_i to the partial sums of the rows that read it; return Y_i."""
        assert self._engine is not None
        assert self._sums is not None
        if torch.is_grad_enabled():
            raise RuntimeError(
                "gradients were switched on in the middle of a run begun without them"
            )
        coefficients, y = self._engine.coefficients, x
        for r, position in self._plan.readers[self._plan.first + self._depth - 1]:
            (w,) = coefficients.at(position, position + 1)
            if row is not None and r == row.index:
                y = kernels.combine([x], [w], self._sums.pop(r, None))
            elif r in self._sums:
                kernels.add(self._sums[r], x, w)
            else:
                self._sums[r] = kernels.combine([x.to(coefficients.dtype)], [w])
        return y

    def recipe(self) -> tuple[Tensor, Callable[[], Tensor]] | None:
        """Return the last Y and a function that computes it again; None where Y is an X itself.

        Only for a run begun with ``recompute=True`` and under autograd.
        """
        return self._recipe

    def _release(self) -> None:
        self._columns = []
        self._versions = []
        self._inits = {}
        self._passing = []
        self._tokens = (None, None)
        self._sums = self._engine = self._input = self._recipe = None


def outside_backward() -> None:
    """Raise RuntimeError if a backward pass is under way: this is then a checkpoint's recomputation."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "a depth-weighted average ran while a backward pass recomputed a checkpointed region. Keep the "
            "average outside: checkpoint the block alone, or pass checkpoint=True to densify or DenseStack"
        )
