"""HyperMixing, the layer: token mixing by an MLP whose weights hypernetworks generate from the tokens."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hypermixer import _checks, kernels
from hypermixer._checks import in_transform, is_compiling, one_gradient, same_tensor
from hypermixer.base import clear
from hypermixer.causal import mix_causal
from hypermixer.chunked import make_plan, mix_chunked
from hypermixer.distributed import all_reduce_sum, exclusive_scan, rank_lengths
from hypermixer.functional import (
    accumulation_dtype,
    crossover_length,
    generate,
    token_state,
)
from hypermixer.packed import Packing, mix_packed, pack, pad_packed
from hypermixer.streaming import StreamingMixing

_CACHED_ELEMENTS = 2**19  # of a chunk of tokens; with its temporaries it stays in a core's caches
PositionIds = Tensor | tuple[Tensor | None, Tensor | None] | None


class HyperMixing(StreamingMixing):
    r"""Linear-time token mixing, Y = W2 σ(W1ᵀ V), with W1 and W2 generated from the tokens.

    For each head, with x̃ = s·x + p (token and position) and V the raw values,

    .. math:: W_i = σ(\tilde X F_i^T + a_i) U_i^T + c_i, \qquad Y = \mathrm{LN}(W_2\, σ(W_1^T V)).

    The layer computes this without forming W1 and W2 wherever that is cheaper (``algorithm``), so its
    cost per token does not depend on ``hidden_dim``. Mai et al., ACL 2023 (heads: Mai et al.,
    Interspeech 2023, "HyperConformer").

    Args:
        embed_dim: d, features of a token.
        hidden_dim: d', hidden units of the token-mixing MLP; 2·d by default.
        num_heads: H; each head sees one of H contiguous slices of the features.
        tied: one hypernetwork generates both W1 and W2 (the paper's base model); self-mixing only.
        head_hidden: "split" gives each head k = d'/H hidden units, "full" k = d'.
        hypernet_dim: hidden width of the hypernetworks over all heads; d by default.
        bias: whether the hypernetworks have biases.
        activation: σ, in the hypernetworks and in the mixer: "gelu" (exact), "relu", "silu", "tanh",
            "identity" or a callable.
        norm: LayerNorm over d on the output (True), none (False), or a module.
        norm_eps: ε of that LayerNorm.
        token_info: "sinusoidal" (positions from 0), "idiap" (the authors' table, and x scaled by √d),
            "learned" (needs ``max_length``), None (a function of sets: permutation-equivariant), or
            a callable ``x → x̃`` or ``(x, position_ids) → x̃``. Only the hypernetworks see it.
        max_length: the size of a "learned" table; rows to prepare for the others, which have no limit.
        causal: a token sees itself and earlier ones only (not in the papers).
        block_size: block-causal mixing: a token sees its block of this many tokens and all earlier
            blocks. 1 is causal. Implies ``causal``.
        chunk_size: tokens at a time; the extra memory then does not grow with the length, and the
            backward pass recomputes: it cannot be differentiated twice, and a function given as
            ``activation`` or ``token_info`` that uses parameters must be a module. Left out under
            torch.compile and torch.func.
        length_scale: divide P = W1ᵀV by the number of keys ("mean") or its root ("sqrt"). Not in the
            paper, where P grows with the length.
        init: "reference" (as the authors' code draws) or "xavier" (each head's matrices
            Xavier-uniform, biases zero).
        algorithm: "auto" (per side, by :func:`hypermixer.functional.crossover_length`), "direct",
            "factored" or a registered kernel.
        process_group: ranks that hold the other slices of the sequence; see
            :mod:`hypermixer.distributed`.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for sizes that are not positive or not divisible by ``num_heads``, and unknown
            options.

    Example:
        >>> mix = HyperMixing(64, 256, num_heads=4)
        >>> x = torch.randn(2, 1000, 64)
        >>> mix(x).shape
        torch.Size([2, 1000, 64])
        >>> mix(torch.randn(2, 7, 64), x).shape  # cross-mixing: 7 queries read 1000 tokens
        torch.Size([2, 7, 64])
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        query_padding_mask: Tensor | None = None,
        *,
        position_ids: PositionIds = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Mix tokens.

        Args:
            query: (B, M, d); a jagged nested tensor; or, with ``cu_seqlens``, (T, d).
            key: (B, N, d); the query by default (self-mixing).
            value: (B, N, d); the key by default.
            key_padding_mask: (B, N), True (or −inf, as a float mask) = ignore. What a masked token
                holds, NaN included, reaches no output and no gradient.
            query_padding_mask: (B, M); in self-mixing the key's mask by default. A masked row of
                the result is norm(0), which is LayerNorm's bias.
            position_ids: 0-based positions (N,) or (B, N) for self-mixing, or a pair for the queries
                and the keys; (T,) for packed and jagged input; each counted from 0 by default.
            cu_seqlens: (sequences + 1,) int32 or int64, cumulative lengths of packed sequences.

        Returns:
            (B, M, d), or the packed or jagged layout of the input.

        Raises:
            ValueError: for shapes that do not go together, tied cross-mixing, causal cross-mixing.
            TypeError: for integer tensors and masks of other dtypes.
            IndexError: for a position beyond a learned table.
        """
        if _checks.is_nested(query):
            masked = key_padding_mask is not None or query_padding_mask is not None
            if masked or cu_seqlens is not None:
                raise ValueError("a jagged query has no padding: give no mask and no cu_seqlens")
            return self._forward_jagged(query, key, value, position_ids)
        if cu_seqlens is not None:
            if key_padding_mask is not None or query_padding_mask is not None:
                raise ValueError("give cu_seqlens or padding masks, not both")
            return self._forward_packed(query, key, value, cu_seqlens, position_ids)
        _checks.tokens("query", query, self.embed_dim)
        same = key is None or same_tensor(key, query)
        keys = query if key is None else key
        values = keys if value is None else value
        if not same or value is not None:
            _checks.key_value(query, keys, values, self.embed_dim)
        if not same and self.tied:
            raise ValueError(
                "tied=True mixes a sequence with itself: key must be the query tensor itself; "
                "use tied=False for cross-mixing"
            )
        batch, length = query.shape[:2]
        key_mask = _checks.padding_mask("key_padding_mask", key_padding_mask, batch, keys.shape[1])
        query_mask = _checks.padding_mask("query_padding_mask", query_padding_mask, batch, length)
        if self.causal:
            self._check_causal(same, key_mask, query_mask)
        if same and (query_mask is None or query_padding_mask is key_padding_mask):
            query_mask = key_mask
        query_ids, key_ids = _pair(position_ids)
        _checks.position_ids(query_ids, batch, length)
        _checks.position_ids(key_ids, batch, keys.shape[1])
        starts = self._starts(length, keys.shape[1], query_ids, key_ids, query.device)
        one = same and one_gradient(keys, query)
        shared = one and query_mask is key_mask and query_ids is key_ids
        chunk = self._chunk(query, keys.shape[1])
        if chunk is not None:
            scale = self._scale(self._count(keys, key_mask))
            ids = (query_ids, key_ids)
            plan = make_plan(self, chunk, key_mask, query_mask, ids, starts, scale)
            key_or_none = None if shared else keys
            value_or_none = None if values is keys else values
            parameters: dict[str, Tensor] = dict(self.named_parameters())
            return mix_chunked(plan, query, key_or_none, value_or_none, parameters)

        x = clear(query, query_mask)
        if shared:
            xk = x
            g1, g2 = self._hidden_both(self._inform(x, query_ids, starts[0]))
        else:
            xk = clear(keys, key_mask)
            g1 = self.w1.hidden(self._inform(xk, key_ids, starts[1]))
            g2 = self._reader.hidden(self._inform(x, query_ids, starts[0]))
        v = self.split_heads(xk if values is keys else clear(values, key_mask))
        if self.causal:
            out = self.join_heads(self._mix_causal(g1, g2, v, key_mask))
        else:
            count = self._count(keys, key_mask)
            out = self.join_heads(self._mix(g1, g2, v, count, shared))
        # Y by heads is gone by now: the norm is the peak of a training step's forward pass.
        return self.finish(out, query_mask, query.dtype)

    def _chunk(self, query: Tensor, keys: int) -> int | None:
        """Return the tokens at a time, or None for all at once.

        Without gradients a CPU is fastest on pieces that stay in its caches, so that long sequences
        are cut even where no ``chunk_size`` was asked for.
        """
        if self.causal or is_compiling() or in_transform():
            return None
        if self.chunk_size is not None or query.device.type != "cpu" or torch.is_grad_enabled():
            return self.chunk_size
        batch, queries, width = query.shape
        piece = max(128, _CACHED_ELEMENTS // max(1, batch * width))
        if min(queries, keys) <= piece or self.algorithm not in ("auto", "factored"):
            return None
        _, k, h = self.w1.fc2_weight.shape
        f = width // self.num_heads
        limit = crossover_length(k, h, f, tied=self.tied)
        return piece if min(queries, keys) >= limit else None

    def _mix(self, g1: Tensor, g2: Tensor, v: Tensor, count: Tensor | None, shared: bool) -> Tensor:
        u1, c1, u2, c2 = self._output_layers()
        if self.group is not None:
            state = all_reduce_sum(token_state(g1, v, bias=self.bias), self.group)
            return self._read(state, g2, self._scale(count))
        return kernels.mix(
            g1,
            u1,
            c1,
            g2,
            u2,
            c2,
            v,
            self.activation,
            algorithm=self.algorithm,
            tied=self.tied and shared,
            scale=self._scale(count),
        )

    def _starts(
        self,
        queries: int,
        keys: int,
        query_ids: Tensor | None,
        key_ids: Tensor | None,
        device: torch.device,
    ) -> tuple[int, int]:
        """Return the first position of the queries and the keys that this rank holds."""
        if self.group is None or self.token_info is None:
            return 0, 0
        if query_ids is not None and key_ids is not None:
            return 0, 0
        rank = dist.get_rank(self.group.group)
        first_query = sum(rank_lengths(queries, self.group, device)[:rank])
        return first_query, sum(rank_lengths(keys, self.group, device)[:rank])

    def _check_causal(self, same: bool, key_mask: Tensor | None, query_mask: Tensor | None) -> None:
        if not same:
            raise ValueError("causal mixing is self-mixing: key must be the query tensor itself")
        if query_mask is None or query_mask is key_mask:
            return
        equal = key_mask is not None and (is_compiling() or torch.equal(key_mask, query_mask))
        if not equal:
            raise ValueError(
                "causal mixing needs one padding: query_padding_mask differs from key_padding_mask"
            )

    def _mix_causal(self, g1: Tensor, g2: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        u1, c1, u2, c2 = self._output_layers()
        block = self.block_size or 1
        length = g1.shape[2]
        state = None
        if self.group is not None:
            lengths = rank_lengths(length, self.group, g1.device)
            if any(n % block for n in lengths[:-1]):
                raise ValueError(
                    f"block_size={block} must divide the tokens of every rank but the last; "
                    f"they hold {lengths}"
                )
            state = exclusive_scan(token_state(g1, v, bias=self.bias), self.group)
        direct, _ = kernels.choose_direct(
            self.algorithm,
            min(block, length),
            min(block, length),
            u1.shape[1],
            g1.shape[3],
            v.shape[3],
            tied=False,
        )
        at_once = None if self.chunk_size is None else max(1, self.chunk_size // block)
        return mix_causal(
            g1,
            u1,
            c1,
            g2,
            u2,
            c2,
            v,
            self.activation,
            block_size=block,
            direct=direct,
            state=state,
            scale=self._block_scale(v, key_mask),
            states_at_once=at_once,
        )

    def _block_scale(self, v: Tensor, key_mask: Tensor | None) -> Tensor | None:
        """Return the factor of P for every block (B, ⌈N/C⌉)."""
        if self.length_scale is None:
            return None
        batch, length = v.shape[1:3]
        block = min(self.block_size or 1, max(length, 1))
        valid = torch.ones(batch, length, device=v.device, dtype=accumulation_dtype(v.dtype))
        if key_mask is not None:
            valid = valid.masked_fill(key_mask, 0.0)
        per_block = F.pad(valid, (0, -length % block)).view(batch, -1, block).sum(2)
        count = per_block.cumsum(1)
        if self.group is not None:
            count = count + exclusive_scan(valid.sum(1, keepdim=True), self.group)
        return self._scale(count)

    def _forward_jagged(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, position_ids: PositionIds
    ) -> Tensor:
        if query.layout != torch.jagged:
            raise NotImplementedError(
                "nested tensors of the strided layout are not supported; "
                "make them with torch.nested.nested_tensor(..., layout=torch.jagged)"
            )
        if any(other is not None and other is not query for other in (key, value)):
            raise ValueError("a jagged query is mixed with itself: give neither key nor value")
        if query.lengths() is not None:  # type: ignore[attr-defined]
            raise ValueError(
                "a jagged query must have its tokens without gaps: call contiguous() on it"
            )
        offsets: Tensor = query.offsets()  # type: ignore[attr-defined]
        out = self(query.values(), cu_seqlens=offsets, position_ids=position_ids)
        return torch.nested.nested_tensor_from_jagged(out, offsets)

    def _forward_packed(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        cu_seqlens: Tensor,
        position_ids: PositionIds,
    ) -> Tensor:
        batched = query.dim() == 3 and query.shape[0] == 1
        x = query[0] if batched else query
        _checks.tokens("query", x, self.embed_dim, ndim=2)
        if not (key is None or same_tensor(key, query)) or value is not None:
            raise ValueError("cu_seqlens packs self-mixing: give neither key nor value")
        if self.group is not None:
            raise ValueError("cu_seqlens cannot be combined with process_group")
        _checks.cu_seqlens(cu_seqlens, x.shape[0])
        packing = pack(cu_seqlens.to(x.device))
        ids, key_ids = _pair(position_ids)
        if ids is not key_ids:
            raise ValueError("cu_seqlens packs self-mixing: position_ids cannot be a pair")
        _checks.position_ids(ids, 1, x.shape[0])
        out = self._mix_packed(x, packing, packing.position if ids is None else ids)
        return out.unsqueeze(0) if batched else out

    def _mix_packed(self, x: Tensor, packing: Packing, ids: Tensor) -> Tensor:
        if self.causal:
            padded, mask = pad_packed(x, packing)
            places, _ = pad_packed(ids.reshape(-1, 1), packing)
            return self(padded, key_padding_mask=mask, position_ids=places[..., 0])[~mask]  # type: ignore[no-any-return]
        x = x.unsqueeze(0)
        g1, g2 = self._hidden_both(self._inform(x, ids.reshape(1, -1), 0))
        u1, c1, u2, c2 = self._output_layers()
        scale = None
        if self.length_scale is not None:
            scale = self._scale(packing.lengths.to(accumulation_dtype(x.dtype)))
        v = self.split_heads(x)
        y = mix_packed(g1, u1, c1, g2, u2, c2, v, self.activation, packing, scale=scale)
        return self.finish(self.join_heads(y), None, x.dtype)[0]

    def generated_weights(self, query: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return W1 (B, H, N, k) and W2 (B, H, M, k), which mixing itself need not form."""
        keys = query if key is None else key
        _checks.tokens("query", query, self.embed_dim)
        _checks.tokens("key", keys, self.embed_dim)
        u1, c1, u2, c2 = self._output_layers()
        w1 = generate(self.w1.hidden(self._inform(keys, None, 0)), u1, c1)
        w2 = generate(self._reader.hidden(self._inform(query, None, 0)), u2, c2)
        return w1.transpose(0, 1), w2.transpose(0, 1)


def _pair(position_ids: PositionIds) -> tuple[Tensor | None, Tensor | None]:
    """Return the positions of queries and keys."""
    if isinstance(position_ids, tuple):
        return position_ids
    return position_ids, position_ids
