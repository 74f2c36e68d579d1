"""Packed sequences: many sequences in one (T, d) tensor, told apart by cumulative lengths.

Every sequence is cut into blocks of a fixed number of tokens, so that all block sums are one batched
product whatever the lengths; the block sums of a sequence are then added up. The memory is that of
T + (sequences · block) tokens: one long sequence among many short ones costs no padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hypermixer.functional import (
    Activation,
    hidden_from_state,
    read_matrix,
    read_tokens,
    token_state,
)


class Packing(NamedTuple):
    """Where the tokens of packed sequences lie.

    Attributes:
        sequence: (n_blocks,) the sequence that a block belongs to.
        rows: (n_blocks, C) the token at a place of a block; 0 where there is none.
        empty: (n_blocks, C) bool, True where a block has no token.
        place: (T,) where a token lies in the flattened blocks.
        position: (T,) a token's position in its own sequence.
        lengths: (sequences,).
    """

    sequence: Tensor
    rows: Tensor
    empty: Tensor
    place: Tensor
    position: Tensor
    lengths: Tensor


def pack(cu_seqlens: Tensor, block: int = 64) -> Packing:
    """Cut packed sequences into blocks.

    Args:
        cu_seqlens: (sequences + 1,) cumulative lengths, from 0 to T.
        block: tokens of a block.

    Example:
        >>> pack(torch.tensor([0, 3, 5]), block=2).rows.tolist()
        [[0, 1], [2, 0], [3, 4]]
    """
    offsets = cu_seqlens.long()
    lengths = offsets.diff()
    counts = -(-lengths // block)
    device = offsets.device
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=device), counts)
    first_block = counts.cumsum(0) - counts
    within = torch.arange(len(sequence), device=device) - first_block[sequence]
    rows = (offsets[sequence] + within * block).unsqueeze(1) + torch.arange(block, device=device)
    empty = rows >= offsets[sequence + 1].unsqueeze(1)
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
    position = torch.arange(len(owner), device=device) - offsets[owner]
    place = (first_block[owner] + position // block) * block + position % block
    return Packing(sequence, rows.masked_fill(empty, 0), empty, place, position, lengths)


def mix_packed(
    g1: Tensor,
    u1: Tensor,
    c1: Tensor | None,
    g2: Tensor,
    u2: Tensor,
    c2: Tensor | None,
    value: Tensor,
    activation: Activation,
    packing: Packing,
    *,
    scale: Tensor | None = None,
) -> Tensor:
    """Mix each packed sequence within itself, factored.

    Args:
        g1: (H, 1, T, h), and so on as in :func:`hypermixer.functional.mix_heads`.
        u1: see ``g1``.
        c1: see ``g1``.
        g2: see ``g1``.
        u2: see ``g1``.
        c2: see ``g1``.
        value: see ``g1``.
        activation: σ.
        packing: from :func:`pack`.
        scale: (sequences,) factor of P, or None.

    Returns:
        (H, 1, T, f).
    """

    def blocks(x: Tensor) -> Tensor:
        # A place without a token repeats token 0, whose NaN would reach other sequences: 0·NaN is NaN.
        return x[:, 0][:, packing.rows].masked_fill(packing.empty.unsqueeze(-1), 0.0)

    values = blocks(value)
    sums = token_state(blocks(g1), values, bias=c1 is not None)
    state = sums.new_zeros(sums.shape[0], len(packing.lengths), *sums.shape[2:])
    state = state.index_add(1, packing.sequence, sums)
    hidden = hidden_from_state(state, u1, c1)
    if scale is not None:
        hidden = hidden * scale.to(hidden.dtype).view(1, -1, 1, 1)
    matrix = read_matrix(activation(hidden), u2, c2)[:, packing.sequence]
    y = read_tokens(blocks(g2), matrix)
    return y.flatten(1, 2)[:, packing.place].unsqueeze(1)


def pad_packed(x: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Return packed tokens (T, d) as a padded batch (sequences, longest, d) with its padding mask."""
    longest = int(packing.lengths.max()) if len(packing.lengths) else 0
    span = torch.arange(longest, device=x.device)
    mask = span >= packing.lengths.unsqueeze(1)
    padded = x.new_zeros(len(packing.lengths), longest, x.shape[-1])
    return padded.masked_scatter(~mask.unsqueeze(-1), x), mask
