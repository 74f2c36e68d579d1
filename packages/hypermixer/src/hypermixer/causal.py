"""Causal and block-causal mixing: an extension of this package, not in the papers.

A token sees every token of its own block and of all earlier blocks. With blocks of C tokens and
P_b = Σ_{s in blocks ≤ b} w1_s v_sᵀ the outputs of block b are y_t = w2_tᵀ σ(P_b): C = 1 is strictly
causal (the plain layer on every prefix, keeping the last row), C = N is plain mixing. The number of
nonlinear states is N/C; they are formed a chunk at a time, and the backward pass forms them again from
the states at the chunk boundaries, which alone are kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hypermixer._checks import in_transform, is_compiling
from hypermixer.functional import (
    Activation,
    generate,
    hidden_from_state,
    read_matrix,
    read_tokens,
    same_autocast,
    sum_over_tokens,
    token_state,
)

_STATE_BUDGET = (
    2**22
)  # elements of prefix states formed at a time, unless the caller says otherwise


class Output(NamedTuple):
    """The output layers of the two hypernetworks."""

    u1: Tensor
    c1: Tensor | None
    u2: Tensor
    c2: Tensor | None


def _fold(x: Tensor) -> Tensor:
    """(H, B, t, C, ·) → (H, B·t, C, ·): blocks as a batch."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def scan_chunk(
    carry: Tensor,
    g1: Tensor,
    g2: Tensor,
    value: Tensor,
    scale: Tensor | None,
    output: Output,
    activation: Activation,
    direct: bool,
) -> tuple[Tensor, Tensor]:
    """Mix t blocks after the blocks summed up in ``carry``; return (outputs, next carry).

    Args:
        carry: P (H, B, k, f) where direct, else S (H, B, h(+1), f).
        g1: (H, B, t, C, h), ``g2`` likewise, ``value`` (H, B, t, C, f).
        g2: see ``g1``.
        value: see ``g1``.
        scale: (B, t) factor of P, or None.
        output: output layers of the hypernetworks.
        activation: σ.
        direct: form the generated weights, which is cheaper for short blocks.

    Returns:
        (H, B, t, C, f) and the carry after the last block.
    """
    heads, batch, blocks = g1.shape[:3]
    u1, c1, u2, c2 = output
    if direct:
        added = sum_over_tokens(generate(_fold(g1), u1, c1), _fold(value))
    else:
        added = token_state(_fold(g1), _fold(value), bias=c1 is not None)
    sums = added.view(heads, batch, blocks, *added.shape[2:]).cumsum(2) + carry.unsqueeze(2)
    flat = sums.flatten(1, 2)
    hidden = flat if direct else hidden_from_state(flat, u1, c1)
    if scale is not None:
        hidden = hidden * scale.to(hidden.dtype).reshape(1, -1, 1, 1)
    hidden = activation(hidden)
    if direct:
        y = read_tokens(generate(_fold(g2), u2, c2), hidden)
    else:
        y = read_tokens(_fold(g2), read_matrix(hidden, u2, c2))
    return y.view(heads, batch, blocks, *y.shape[2:]), sums[:, :, -1]


class _Scan(torch.autograd.Function):
    """The scan over chunks, with only the boundary states kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        activation: Activation,
        direct: bool,
        step: int,
        carry: Tensor,
        g1: Tensor,
        g2: Tensor,
        value: Tensor,
        scale: Tensor | None,
        *output: Tensor | None,
    ) -> Tensor:
        layers = Output(*output)  # type: ignore[arg-type]
        boundaries, parts = [], []
        for part in range(0, g1.shape[2], step):
            boundaries.append(carry)
            now = _chunk(part, step, g1, g2, value, scale)
            y, carry = scan_chunk(carry, *now, layers, activation, direct)
            parts.append(y)
        ctx.activation, ctx.direct, ctx.step = activation, direct, step
        ctx.autocast = same_autocast(g1.device.type)
        ctx.save_for_backward(torch.stack(boundaries), g1, g2, value, scale, *output)
        return torch.cat(parts, dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        boundaries, g1, g2, value, scale, *output = ctx.saved_tensors
        sequence = [torch.zeros_like(t) for t in (g1, g2, value)]
        leaves = [None if t is None else t.detach().requires_grad_() for t in output]
        trained = [t for t in leaves if t is not None]
        totals = [torch.zeros_like(t) for t in trained]
        carried = torch.zeros_like(boundaries[0])
        for index in reversed(range(boundaries.shape[0])):
            part = index * ctx.step
            window = slice(part, part + ctx.step)
            carry = boundaries[index].detach().requires_grad_()
            pieces = [t[:, :, window].detach().requires_grad_() for t in (g1, g2, value)]
            factor = None if scale is None else scale[:, window]
            layers = Output(*leaves)  # type: ignore[arg-type]
            with torch.enable_grad(), ctx.autocast():
                y, after = scan_chunk(
                    carry,
                    pieces[0],
                    pieces[1],
                    pieces[2],
                    factor,
                    layers,
                    ctx.activation,
                    ctx.direct,
                )
            grads = torch.autograd.grad(
                (y, after), (carry, *pieces, *trained), (grad[:, :, window], carried)
            )
            carried = grads[0]
            for total, piece in zip(sequence, grads[1:4], strict=True):
                total[:, :, window] = piece
            for total, piece in zip(totals, grads[4:], strict=True):
                total += piece
        iterator = iter(totals)
        trained_grads = [None if t is None else next(iterator) for t in leaves]
        return None, None, None, carried, *sequence, None, *trained_grads


def _chunk(
    part: int, step: int, g1: Tensor, g2: Tensor, value: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    window = slice(part, part + step)
    factor = None if scale is None else scale[:, window]
    return g1[:, :, window], g2[:, :, window], value[:, :, window], factor


def blocks_of(x: Tensor, block_size: int) -> Tensor:
    """Return (H, B, N, ·) as (H, B, ⌈N/C⌉, C, ·), the last block filled up with zeros."""
    missing = -x.shape[2] % block_size
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.reshape(*x.shape[:2], -1, block_size, x.shape[3])


def mix_causal(
    g1: Tensor,
    u1: Tensor,
    c1: Tensor | None,
    g2: Tensor,
    u2: Tensor,
    c2: Tensor | None,
    value: Tensor,
    activation: Activation,
    *,
    block_size: int = 1,
    direct: bool,
    state: Tensor | None = None,
    scale: Tensor | None = None,
    states_at_once: int | None = None,
) -> Tensor:
    """Mix tokens block-causally in the head-major layout.

    Args:
        g1: (H, B, N, h), and so on as in :func:`hypermixer.functional.mix_heads`; the rows of
            ``value`` are zero at masked tokens.
        u1: see ``g1``.
        c1: see ``g1``.
        g2: see ``g1``.
        u2: see ``g1``.
        c2: see ``g1``.
        value: see ``g1``.
        activation: σ.
        block_size: C.
        direct: form generated weights chunk by chunk (cheaper below the crossover length).
        state: S (H, B, h(+1), f) of the tokens before the first one, or None.
        scale: (B, ⌈N/C⌉) factor of P for each block, or None.
        states_at_once: prefix states formed at a time; by default as many as 2²² numbers hold. All at
            once where the activation has parameters, under torch.compile and under torch.func.

    Returns:
        (H, B, N, f).
    """
    heads, batch, length, _ = g1.shape
    hidden, width = u1.shape[1], value.shape[3]
    if length == 0:
        return value
    output = Output(u1, c1, u2, c2)
    block_size = min(block_size, length)
    blocks1, blocks2, values = (blocks_of(t, block_size) for t in (g1, g2, value))
    dtype = token_state(g1[:, :, :0], value[:, :, :0], bias=False).dtype
    rows = hidden if direct else g1.shape[3] + (c1 is not None)
    if state is None:
        carry = value.new_zeros(heads, batch, rows, width, dtype=dtype)
    else:
        carry = hidden_from_state(state, u1, c1) if direct else state
    step = states_at_once or max(1, _STATE_BUDGET // max(1, heads * batch * hidden * width))
    # An activation's own parameters get their gradient from the graph alone.
    trained = isinstance(activation, nn.Module) and next(activation.parameters(), None) is not None
    if trained or is_compiling() or in_transform() or step >= blocks1.shape[2]:
        y, _ = scan_chunk(carry, blocks1, blocks2, values, scale, output, activation, direct)
    else:
        y = _Scan.apply(  # type: ignore[no-untyped-call]
            activation, direct, step, carry, blocks1, blocks2, values, scale, *output
        )
    return y.flatten(2, 3)[:, :, :length]
