"""The three products behind every average and its gradient, on plain tensors, without autograd.

Representations stay where they are: nothing is stacked beyond a buffer that fits the cache. Sums of
float16 and bfloat16 run in float32. These are the functions to replace by fused device kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

Scalar = float | Tensor

BUFFER = 1 << 18  # elements of the buffer that gathers several operands
SMALL = 1 << 12  # elements below which the number of calls decides
STACK = 1 << 20  # elements of all terms together below which a copy of them costs little


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which sums of ``dtype`` are taken: float64 for itself, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off where it is on: products keep the type of the residual stream."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def add(total: Tensor, x: Tensor, w: Scalar) -> Tensor:
    """Add w x to ``total`` in place and return it."""
    if isinstance(w, Tensor):  # on an accelerator a Python number would wait for the device
        return total.addcmul_(x.to(total.dtype), w)
    return total.add_(x, alpha=w)


def _first(x: Tensor, w: Scalar, init: Tensor | None, dtype: torch.dtype) -> Tensor:
    if init is not None:
        if isinstance(w, Tensor):
            return torch.addcmul(init, x.to(dtype), w)
        return torch.add(init, x, alpha=w)
    return x.to(dtype) * w


def combine(
    xs: Sequence[Tensor],
    ws: Sequence[Scalar],
    init: Tensor | None = None,
    out: torch.dtype | None = None,
) -> Tensor:
    """Return init + Σ w x, a fresh tensor of type ``out``, by default that of ``xs``.

    Args:
        xs: representations of one shape, type and device.
        ws: their weights, Python numbers or 0-dimensional tensors of the accumulation type.
        init: of the accumulation type; absent means 0.
    """
    x = xs[-1]
    dtype, out = accumulate_dtype(x.dtype), out or x.dtype
    if len(xs) > 8 and x.numel() <= SMALL:
        stack = torch.stack(list(xs)).view(len(xs), -1).to(dtype)
        row = torch.stack(ws) if isinstance(ws[0], Tensor) else torch.tensor(ws, dtype=dtype)  # type: ignore[arg-type]
        total = torch.mv(stack.t(), row).view(x.shape)
        return (total if init is None else total.add_(init)).to(out)
    total = _first(x, ws[-1], init, dtype)
    for t, w in zip(xs[:-1], ws[:-1], strict=True):
        total = add(total, t, w)
    return total.to(out)


def _bounds(size: int, rows: int) -> Iterator[tuple[int, int]]:
    step = max(2048, min(size, BUFFER // max(rows, 1)))
    for start in range(0, size, step):
        yield start, min(start + step, size)


def _gather(flat: Sequence[Tensor], start: int, stop: int, dtype: torch.dtype) -> Tensor:
    if len(flat) == 1:
        return flat[0][start:stop].to(dtype).unsqueeze(0)
    return torch.stack([t[start:stop] for t in flat]).to(dtype)


def project(matrix: Tensor, xs: Sequence[Tensor]) -> Tensor:
    """Return matrix @ X for X the stack of ``xs``, without the stack: shape (rows, *x.shape).

    ``matrix`` (rows, len(xs)) has the accumulation type, and so has the result.
    """
    x = xs[0]
    flat = [t.reshape(-1) for t in xs]
    out = matrix.new_empty((matrix.shape[0], x.numel()))
    with no_autocast(x.device):
        for a, b in _bounds(x.numel(), len(xs)):
            torch.mm(matrix, _gather(flat, a, b, matrix.dtype), out=out[:, a:b])
    return out.view(matrix.shape[0], *x.shape)


def pull(
    grads: Tensor,
    matrix: Tensor,
    xs: Sequence[Tensor] | None,
    *,
    want: bool = True,
    init: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return (matrixᵀ @ grads + init, grads @ Xᵀ), reading ``grads`` once for both.

    Args:
        grads: (rows, N), of the accumulation type, rows contiguous.
        matrix: (rows, columns), the weights.
        xs: the representations of the columns; ``None`` where the second result is not wanted.
        want: whether the first result is wanted.
        init: (columns, N) added to the first result.
        out: (columns, N) that receives the first result.
    """
    size, columns = grads.shape[1], matrix.shape[1]
    if want and out is None:
        out = grads.new_empty((columns, size))
    flat = inner = None
    if xs is not None:
        flat = [t.reshape(-1) for t in xs]
        inner = grads.new_zeros((grads.shape[0], columns))
    with no_autocast(grads.device):
        for a, b in _bounds(size, grads.shape[0] + columns):
            part = grads[:, a:b]
            if want and out is not None:
                _transposed(part, matrix, None if init is None else init[:, a:b], out[:, a:b])
            if flat is not None and inner is not None:
                gathered = _gather(flat, a, b, grads.dtype)
                if columns == 1:
                    inner[:, 0] += torch.mv(part, gathered[0])
                else:
                    inner.addmm_(part, gathered.t())
    return out, inner


def pull_column(
    grads: Sequence[Tensor],
    ws: Sequence[Scalar],
    x: Tensor | None,
    *,
    want: bool = True,
    init: Tensor | None = None,
) -> tuple[Tensor | None, list[Tensor]]:
    """Return (Σ w g + init, every ⟨g, x⟩) for one column that few rows read.

    Args:
        grads: the gradients (N,) of those rows, of the accumulation type.
        ws: their weights.
        x: the representation; ``None`` where the second result is not wanted.
        want: whether the first result is wanted.
        init: (N,) added to the first result.
    """
    out = combine(grads, ws, init) if want else None
    if x is None:
        return out, []
    flat = x.reshape(-1).to(grads[0].dtype)
    with no_autocast(flat.device):
        return out, [torch.dot(g, flat) for g in grads]


def _transposed(part: Tensor, matrix: Tensor, init: Tensor | None, out: Tensor) -> None:
    """out = matrixᵀ @ part + init."""
    if matrix.shape[1] == 1:
        if init is None:
            torch.mv(part.t(), matrix[:, 0], out=out[0])
        else:
            torch.addmv(init[0], part.t(), matrix[:, 0], out=out[0])
    elif init is None:
        torch.mm(matrix.t(), part, out=out)
    else:
        torch.addmm(init, matrix.t(), part, out=out)
