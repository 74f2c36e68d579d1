"""Streaming: writing keys into a state, reading queries from it, and stepping causal mixing."""

from __future__ import annotations

import torch
from torch import Tensor

from hypermixer import _checks
from hypermixer.base import HyperMixingBase, clear
from hypermixer.functional import accumulation_dtype, token_state
from hypermixer.state import MixingState


class StreamingMixing(HyperMixingBase):
    """The streaming methods of :class:`hypermixer.HyperMixing`."""

    def init_state(self, batch_size: int) -> MixingState:
        """Return the state of no keys for ``batch_size`` sequences, float32 or better."""
        _checks.positive("batch_size", batch_size)
        weight = self.w1.fc1_weight
        dtype = accumulation_dtype(weight.dtype)
        heads, hidden, width = weight.shape
        sums = weight.new_zeros(batch_size, heads, hidden + self.bias, width, dtype=dtype)
        return MixingState(sums, weight.new_zeros(batch_size, dtype=dtype))

    def _check_state(self, state: MixingState, name: str, tokens: Tensor) -> None:
        if state.sums.shape[0] != tokens.shape[0]:
            raise ValueError(
                f"the state holds {state.sums.shape[0]} sequences, but {name} has {tokens.shape[0]}"
            )
        heads, hidden, width = self.w1.fc1_weight.shape
        expected = (heads, hidden + self.bias, width)
        if tuple(state.sums.shape[1:]) != expected:
            raise ValueError(
                f"the state holds sums of shape {tuple(state.sums.shape[1:])}, but this layer's are "
                f"{expected}: it comes from a layer of other sizes"
            )

    def write(
        self,
        state: MixingState,
        key: Tensor,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        remove: bool = False,
    ) -> MixingState:
        """Add keys to a state, or take them out again: S ± Σ g1_j v_jᵀ.

        Args:
            state: from :meth:`init_state` or an earlier call.
            key: (B, n, d).
            value: (B, n, d); the key by default.
            mask: (B, n), True = ignore.
            position_ids: (n,) or (B, n); by default they go on from the last write.
            remove: take the keys out. With token information their ``position_ids`` are needed.

        Returns:
            The new state; the given one is unchanged.

        Raises:
            ValueError: for wrong shapes, or removal without the positions.
        """
        value = key if value is None else value
        _checks.key_value(key, key, value, self.embed_dim)
        self._check_state(state, "key", key)
        if remove and position_ids is None and self.token_info is not None:
            raise ValueError("removing keys needs the position_ids they were written with")
        ignore = _checks.padding_mask("mask", mask, *key.shape[:2])
        _checks.position_ids(position_ids, *key.shape[:2])
        x = clear(key, ignore)
        g = self.w1.hidden(self._inform(x, position_ids, state.position))
        v = self.split_heads(x if value is key else clear(value, ignore))
        sums = token_state(g, v, bias=self.bias).transpose(0, 1)
        count = torch.full_like(state.count, key.shape[1])
        if ignore is not None:
            count = count - ignore.sum(1)
        added = MixingState(sums, count, key.shape[1])
        return state - added if remove else state + added

    def read(self, state: MixingState, query: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Return what queries (B, M, d) read from a state; their positions count from 0 by default."""
        return self._read_from(state, query, position_ids, 0)

    def _read_from(
        self, state: MixingState, query: Tensor, ids: Tensor | None, start: int
    ) -> Tensor:
        _checks.tokens("query", query, self.embed_dim)
        self._check_state(state, "query", query)
        _checks.position_ids(ids, *query.shape[:2])
        g = self._reader.hidden(self._inform(query, ids, start))
        y = self._read(state.sums.transpose(0, 1), g, self._scale(state.count))
        return self.finish(self.join_heads(y), None, query.dtype)

    def step(self, x: Tensor, state: MixingState) -> tuple[Tensor, MixingState]:
        """Take the next token, or the next block of up to ``block_size`` tokens, of causal mixing.

        Args:
            x: (B, d), or (B, n, d) with n ≤ ``block_size``.
            state: of the earlier tokens.

        Returns:
            The outputs, shaped as x, and the state with x in it.

        Raises:
            RuntimeError: if the layer is not causal.
            ValueError: for more tokens than a block has, or after a block that was cut short: its
                outputs would have to change. Only the last block may be short.
        """
        if self.block_size is None:
            raise RuntimeError("step() needs a layer made with causal=True or block_size=...")
        single = x.dim() == 2
        block = x.unsqueeze(1) if single else x
        _checks.tokens("x", block, self.embed_dim)
        if block.shape[1] > self.block_size:
            raise ValueError(
                f"x has {block.shape[1]} tokens, but a block has block_size={self.block_size}"
            )
        if state.position % self.block_size:
            raise ValueError(
                f"the state ends within a block, after {state.position} tokens, but "
                f"block_size={self.block_size}: give each block whole"
            )
        after = self.write(state, block)
        y = self._read_from(after, block, None, state.position)
        return (y[:, 0] if single else y), after
