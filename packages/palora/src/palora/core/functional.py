r"""Pure tensors: the mixed weight W(λ) and the two ways of applying it.

Every adapted layer is described by a matrix view of its weight, ``rows × cols``, a stack of ``T``
down-projections ``A (T, k, cols)`` and up-projections ``B (T, rows, k)``, and a scale ``s``:

.. math:: W(λ) = W + s \sum_t λ_t B_t A_t
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "conv_delta",
    "delta_weight",
    "low_rank_rows",
    "mixed_conv",
    "mixed_linear",
    "mixed_weight",
    "prefers_weight_path",
    "stack_down",
    "stack_up",
]


def stack_down(A: Tensor) -> Tensor:
    """Stack the down-projections ``(T, k, cols)`` into one matrix ``(T·k, cols)``."""
    return A.reshape(-1, A.shape[-1])


def stack_up(B: Tensor, preference: Tensor | None = None) -> Tensor:
    """Stack ``B (T, rows, k)`` into ``B_cat·diag(λ)``.

    Args:
        B: up-projections of the T tasks.
        preference: ``(T,)`` gives ``(rows, T·k)``; ``(M, T)`` gives ``(M, rows, T·k)``; None
            leaves the columns unscaled.
    """
    tasks, rows, k = B.shape
    if preference is None:
        return B.transpose(0, 1).reshape(rows, tasks * k)
    scaled = B * preference[..., None, None]
    return scaled.transpose(-3, -2).reshape(*preference.shape[:-1], rows, tasks * k)


def delta_weight(A: Tensor, B: Tensor, preference: Tensor, scale: float) -> Tensor:
    r"""Return :math:`s\sum_t λ_t B_t A_t` as a ``(rows, cols)`` matrix.

    Example:
        >>> A = torch.tensor([[[1., 0.]], [[0., 1.]]])
        >>> B = torch.tensor([[[3.]], [[-1.]]])
        >>> delta_weight(A, B, torch.tensor([.25, .75]), 2.0)
        tensor([[ 1.5000, -1.5000]])
    """
    return (stack_up(B, preference) @ stack_down(A)) * scale


def _mix(weight: Tensor, up: Tensor, down: Tensor, scale: float, transposed: bool) -> Tensor:
    """W(λ) in the weight's own shape; with M stacked ``up`` matrices, a leading M dimension."""
    rows, cols = up.shape[-2], down.shape[-1]
    base = weight.t() if transposed else weight.reshape(rows, cols)
    dtype = torch.promote_types(weight.dtype, up.dtype)
    base, up, down = base.to(dtype), up.to(dtype), down.to(dtype)
    if up.dim() == 2:
        mixed = torch.addmm(base, up, down, alpha=scale)
        return mixed.t() if transposed else mixed.view(weight.shape)
    rays = up.shape[0]
    flat = torch.mm(up.reshape(rays * rows, -1), down).view(rays, rows, cols)
    mixed = torch.add(base, flat, alpha=scale)
    return mixed.transpose(1, 2) if transposed else mixed.view(rays, *weight.shape)


def mixed_weight(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    preference: Tensor,
    scale: float,
    transposed: bool = False,
) -> Tensor:
    """Return W(λ) in the shape of ``weight`` (a leading M dimension for ``(M, T)`` preferences).

    Args:
        weight: the shared weight; any shape with ``rows·cols`` elements.
        A: ``(T, k, cols)``.
        B: ``(T, rows, k)``.
        preference: λ, ``(T,)`` or ``(M, T)``.
        scale: s, that is α/r or α/√r.
        transposed: the weight is stored as ``(cols, rows)``.
    """
    return _mix(weight, stack_up(B, preference), stack_down(A), scale, transposed)


def low_rank_rows(
    x: Tensor, A: Tensor, B: Tensor, preference: Tensor, scale: float, repeat: int = 1
) -> Tensor:
    """Return ``s·((x A_catᵀ) ⊙ Λ) B_catᵀ``: the adapters' share of the output.

    Args:
        x: ``(..., cols)``; with row-wise preferences the first dimension is the batch.
        A: ``(T, k, cols)``.
        B: ``(T, rows, k)``.
        preference: ``(T,)``, or ``(n, T)`` with one row per ``repeat`` consecutive rows of ``x``.
        scale: s.
        repeat: how many consecutive rows of ``x`` share one row of the preference.
    """
    z = F.linear(x, stack_down(A))
    if preference.dim() == 1:
        return F.linear(z, stack_up(B, preference) * scale)
    tasks, k = A.shape[0], A.shape[1]
    rows = preference.reshape(-1, 1, tasks, 1) * scale
    z = (z.view(preference.shape[0], -1, tasks, k) * rows).view(z.shape)
    return F.linear(z, stack_up(B))


def prefers_weight_path(n: int, rows: int, cols: int) -> bool:
    """Whether forming W(λ) costs less than sending ``n`` rows through the adapters.

    The activation path costs ``2·n·Tr·(rows+cols)``, the weight path ``2·rows·cols·Tr``.

    Example:
        >>> prefers_weight_path(512, 768, 768), prefers_weight_path(64, 768, 768)
        (True, False)
    """
    return n * (rows + cols) > rows * cols


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    """Autocast off, so that W(λ) is formed in the precision of its parameters."""
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _reduce(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _may_overwrite(g: Tensor, x: Tensor, w: Tensor) -> bool:
    """Whether W(λ), when done with, may make room for its own gradient: warm memory, one less."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # differentiated, or traced
        return False
    try:
        for t in (g, x, w):
            t.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a batched tensor has no memory of its own
        return False
    return g.dtype == x.dtype == w.dtype


class _MixedLinear(torch.autograd.Function):
    """``x W(λ)ᵀ + b`` that saves the factors of W(λ) instead of W(λ) itself.

    ``up`` is ``(rows, Tr)``, or ``(M, rows, Tr)`` for M rays stacked in the rows of ``x``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        up: Tensor,
        down: Tensor,
        scale: float,
        transposed: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        with _no_autocast(x.device.type):
            w = _mix(weight, up, down, scale, transposed).to(dtype)
            bias = None if bias is None else bias.to(dtype)
            if up.dim() == 2:
                return F.linear(x, w.t() if transposed else w, bias)
            rays = up.shape[0]
            blocks = x.reshape(rays, -1, x.shape[-1])
            wt = w if transposed else w.transpose(1, 2)
            y = torch.bmm(blocks, wt) if bias is None else torch.baddbmm(bias, blocks, wt)
            return y.view(*x.shape[:-1], wt.shape[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, up, down, scale, transposed, dtype = inputs
        ctx.save_for_backward(x, weight, up, down)
        ctx.options = (scale, transposed, dtype, None if bias is None else bias.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, up, down = ctx.saved_tensors
        scale, transposed, dtype, bias_dtype = ctx.options
        need_x, need_w, need_b, need_up, need_down = ctx.needs_input_grad[:5]
        gx = gw = gb = gup = gdown = None
        with _no_autocast(x.device.type):
            stacked = up.dim() == 3
            room = None
            if need_x:
                w = _mix(weight, up, down, scale, transposed).to(dtype)
                wt = w.transpose(-2, -1) if transposed else w
                if stacked:
                    gx = torch.bmm(g.reshape(up.shape[0], -1, g.shape[-1]), wt).view(x.shape)
                else:
                    gx = g @ wt
                room = wt if _may_overwrite(g, x, wt) else None
            g2, x2 = _reduce(g), _reduce(x)
            if need_b:
                gb = g2.sum(0).to(bias_dtype)
            full = None
            if need_w and stacked:
                rays = up.shape[0]
                blocks = g2.view(rays, -1, g2.shape[-1]).transpose(1, 2)
                full = torch.bmm(blocks, x2.view(rays, -1, x2.shape[-1]), out=room)
            elif need_w:
                full = torch.mm(g2.t(), x2, out=room)
            if full is not None:
                gw = full.sum(0) if stacked else full
                gw = (gw.t() if transposed else gw).to(weight.dtype)
            if need_up or need_down:
                if full is not None:
                    full = full.to(up.dtype)
                    gup = (down @ full.transpose(-2, -1)).transpose(-2, -1) * scale
                    gdown = scale * (_reduce(up).t() @ _reduce(full))
                else:
                    gup, gdown = _factor_grads(g2, x2, up, down, scale)
        return gx, gw, gb, gup, gdown, None, None, None


def _factor_grads(
    g2: Tensor, x2: Tensor, up: Tensor, down: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the factors without the gradient of the mixed weight."""
    z = x2 @ down.t().to(x2.dtype)
    if up.dim() == 2:
        gup = g2.t() @ z
        gz = g2 @ up.to(g2.dtype)
    else:
        rays = up.shape[0]
        blocks = g2.view(rays, -1, g2.shape[-1])
        gup = torch.bmm(blocks.transpose(1, 2), z.view(rays, -1, z.shape[-1]))
        gz = torch.bmm(blocks, up.to(g2.dtype)).view(z.shape)
    gdown = gz.t() @ x2
    return scale * gup.to(up.dtype), scale * gdown.to(down.dtype)


def mixed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    preference: Tensor,
    scale: float,
    *,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return ``x W(λ)ᵀ + b`` by the weight path; no mixed weight is kept for the backward pass.

    Args:
        x: ``(..., cols)``; with M preferences, M equal blocks along the first dimension.
        weight: ``(rows, cols)``, or ``(cols, rows)`` when ``transposed``.
        bias: ``(rows,)`` or None.
        A: ``(T, k, cols)``.
        B: ``(T, rows, k)``.
        preference: ``(T,)`` or ``(M, T)``.
        scale: s.
        transposed: weight layout of Hugging Face's ``Conv1D``.
        dtype: what W(λ) is cast to before the product; default ``weight.dtype``.
    """
    up, down = stack_up(B, preference), stack_down(A)
    out: Tensor = _MixedLinear.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, up, down, scale, transposed, dtype or weight.dtype
    )
    return out


def _convolve(x: Tensor, w: Tensor, b: Tensor | None, conv: tuple[Any, ...]) -> Tensor:
    stride, padding, dilation, groups = conv
    out: Tensor = torch.ops.aten.convolution(
        x, w, b, stride, padding, dilation, False, [0] * len(stride), groups
    )
    return out


def _convolve_backward(
    g: Tensor, x: Tensor, w: Tensor, conv: tuple[Any, ...], mask: list[bool]
) -> tuple[Any, Any]:
    stride, padding, dilation, groups = conv
    gx, gw, _ = torch.ops.aten.convolution_backward(
        g, x, w, None, stride, padding, dilation, False, [0] * len(stride), groups, [*mask, False]
    )
    return gx, gw


def _to_channels(x: Tensor, rays: int) -> Tensor:
    """(M·B, C, ...) → (B, M·C, ...)."""
    blocks = x.reshape(rays, -1, *x.shape[1:]).transpose(0, 1)
    return blocks.reshape(blocks.shape[0], -1, *x.shape[2:])


def _from_channels(y: Tensor, rays: int) -> Tensor:
    """(B, M·C, ...) → (M·B, C, ...)."""
    blocks = y.reshape(y.shape[0], rays, -1, *y.shape[2:]).transpose(0, 1)
    return blocks.reshape(-1, *blocks.shape[2:])


class _MixedConv(torch.autograd.Function):
    """Convolution with M mixed kernels that saves the factors instead of the kernels.

    ``sizes`` gives how many consecutive samples belong to each ray; ``mode`` is ``"loop"``,
    ``"grouped"`` (one convolution of ``M·groups`` groups) or ``"shared"`` (every ray sees the same
    samples: one convolution of ``M·out`` channels).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        up: Tensor,
        down: Tensor,
        scale: float,
        conv: tuple[Any, ...],
        sizes: tuple[int, ...],
        mode: str,
        dtype: torch.dtype,
    ) -> Tensor:
        with _no_autocast(x.device.type):
            w = _mix(weight, up, down, scale, False).to(dtype)
            b = None if bias is None else bias.to(dtype)
            rays = len(sizes)
            if up.dim() == 2:
                return _convolve(x, w, b, conv)
            if mode == "loop":
                parts = [_convolve(c, w[i], b, conv) for i, c in enumerate(x.split(sizes))]
                return torch.cat(parts)
            flat, many = w.reshape(-1, *w.shape[2:]), None if b is None else b.repeat(rays)
            if mode == "shared":
                return _from_channels(_convolve(x, flat, many, conv), rays)
            wide = (*conv[:3], conv[3] * rays)
            return _from_channels(_convolve(_to_channels(x, rays), flat, many, wide), rays)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, up, down, *rest = inputs
        ctx.save_for_backward(x, weight, up, down)
        ctx.options = (*rest, None if bias is None else bias.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, up, down = ctx.saved_tensors
        scale, conv, sizes, mode, dtype, bias_dtype = ctx.options
        need_x, need_w, need_b, need_up, need_down = ctx.needs_input_grad[:5]
        need_k = need_w or need_up or need_down
        gx = gk = gw = gb = gup = gdown = None
        with _no_autocast(x.device.type):
            w = _mix(weight, up, down, scale, False).to(dtype)
            rays = len(sizes)
            mask = [need_x, need_k]
            if up.dim() == 2:
                gx, gk = _convolve_backward(g, x, w, conv, mask)
            elif mode == "loop":
                pairs = [
                    _convolve_backward(gi, xi, w[i], conv, mask)
                    for i, (gi, xi) in enumerate(zip(g.split(sizes), x.split(sizes), strict=True))
                ]
                gx = torch.cat([p[0] for p in pairs]) if need_x else None
                gk = torch.stack([p[1] for p in pairs]) if need_k else None
            else:
                flat, wide_g = w.reshape(-1, *w.shape[2:]), _to_channels(g, rays)
                if mode == "shared":
                    gx, gk = _convolve_backward(wide_g, x, flat, conv, mask)
                else:
                    wide = (*conv[:3], conv[3] * rays)
                    gx, gk = _convolve_backward(wide_g, _to_channels(x, rays), flat, wide, mask)
                    gx = _from_channels(gx, rays) if need_x else None
                gk = gk.view(w.shape) if need_k else None
            if need_b:
                gb = g.sum([d for d in range(g.dim()) if d != 1]).to(bias_dtype)
            if need_w and gk is not None:
                gw = (gk if up.dim() == 2 else gk.sum(0)).to(weight.dtype)
            if gk is not None and (need_up or need_down):
                full = gk.to(up.dtype).reshape(*up.shape[:-1], down.shape[-1])
                gup = scale * (full @ down.t())
                gdown = scale * (_reduce(up).t() @ _reduce(full))
        return gx, gw, gb, gup, gdown, None, None, None, None, None


def mixed_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    preference: Tensor,
    scale: float,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    sizes: tuple[int, ...] = (),
    mode: str = "loop",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the convolution of ``x`` with W(λ), keeping no mixed kernel for the backward pass.

    Args:
        x: ``(N, in, ...)``, padded already unless the padding is zeros.
        weight: ``(out, in/groups, *kernel)``.
        bias: ``(out,)`` or None.
        A: ``(T, k, cols)`` with ``rows·cols`` the size of ``weight``.
        B: ``(T, rows, k)``.
        preference: ``(T,)`` or ``(M, T)``.
        scale: s.
        stride: as in ``torch.nn.functional.conv2d``.
        padding: zero padding of each dimension.
        dilation: as in ``torch.nn.functional.conv2d``.
        groups: as in ``torch.nn.functional.conv2d``.
        sizes: with M preferences, the number of consecutive samples of each.
        mode: ``"loop"``, ``"grouped"`` (equal sizes) or ``"shared"`` (one group, same samples).
        dtype: what W(λ) is cast to before the convolution; default ``weight.dtype``.
    """
    up, down = stack_up(B, preference), stack_down(A)
    conv = (list(stride), list(padding), list(dilation), groups)
    out: Tensor = _MixedConv.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, up, down, scale, conv, sizes, mode, dtype or weight.dtype
    )
    return out


def conv_delta(A: Tensor, B: Tensor, preference: Tensor, scale: float, shape: Any) -> Tensor:
    """Return s Σ λ_t B_t A_t reshaped row-major to a kernel, one per row of ``preference``.

    Example:
        >>> A, B = torch.ones(2, 3, 6), torch.ones(2, 6, 3)
        >>> conv_delta(A, B, torch.tensor([.5, .5]), 1.0, (2, 2, 3, 3))[0, 0, 0, 0]
        tensor(3.)
    """
    flat = stack_up(B, preference) @ stack_down(A) * scale
    return flat.reshape(*preference.shape[:-1], *shape)
