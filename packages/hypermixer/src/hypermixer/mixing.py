"""HyperMixing, the layer: token mixing by an MLP whose weights hypernetworks generate from the tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from hypermixer import _checks, kernels
from hypermixer._checks import is_compiling, same_tensor
from hypermixer.causal import mix_causal
from hypermixer.checkpoint_keys import (
    drop_second,
    is_reference,
    rename_reference_keys,
    second_repeats_first,
)
from hypermixer.chunked import make_plan, mix_chunked
from hypermixer.distributed import GroupRef, all_reduce_sum, exclusive_scan, rank_lengths
from hypermixer.functional import (
    Activation,
    accumulation_dtype,
    crossover_length,
    generate,
    get_activation,
    hidden_from_state,
    output_dtype,
    read_matrix,
    read_tokens,
    token_state,
)
from hypermixer.hypernet import INITS, Hypernet, project_heads
from hypermixer.packed import Packing, mix_packed, pack, pad_packed
from hypermixer.positions import make_token_info
from hypermixer.state import MixingState

_CACHED_ELEMENTS = 2**19  # of a chunk of tokens; with its temporaries it stays in a core's caches
PositionIds = Tensor | tuple[Tensor | None, Tensor | None] | None


class HyperMixing(nn.Module):
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
            backward pass recomputes (it cannot be differentiated twice).
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

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int | None = None,
        num_heads: int = 1,
        *,
        tied: bool = False,
        head_hidden: Literal["split", "full"] = "split",
        hypernet_dim: int | None = None,
        bias: bool = False,
        activation: str | Activation = "gelu",
        norm: bool | nn.Module = True,
        norm_eps: float = 1e-5,
        token_info: str | nn.Module | Callable[..., Tensor] | None = "sinusoidal",
        max_length: int | None = None,
        causal: bool = False,
        block_size: int | None = None,
        chunk_size: int | None = None,
        length_scale: Literal["mean", "sqrt"] | None = None,
        init: Literal["reference", "xavier"] = "reference",
        algorithm: str = "auto",
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.positive("embed_dim", embed_dim)
        hidden_dim = 2 * embed_dim if hidden_dim is None else hidden_dim
        hypernet_dim = embed_dim if hypernet_dim is None else hypernet_dim
        sizes = {"hidden_dim": hidden_dim, "num_heads": num_heads, "hypernet_dim": hypernet_dim}
        for name, size in sizes.items():
            _checks.positive(name, size)
        _checks.one_of("head_hidden", head_hidden, ("split", "full"))
        _checks.one_of("length_scale", length_scale, (None, "mean", "sqrt"))
        _checks.one_of("init", init, INITS)
        kernels.check_algorithm(algorithm)
        _checks.divisible("embed_dim", embed_dim, num_heads)
        _checks.divisible("hypernet_dim", hypernet_dim, num_heads)
        _checks.divisible("hidden_dim", hidden_dim, num_heads)
        for name, limit in {"block_size": block_size, "chunk_size": chunk_size}.items():
            if limit is not None:
                _checks.positive(name, limit)

        self.embed_dim, self.hidden_dim, self.num_heads = embed_dim, hidden_dim, num_heads
        self.hypernet_dim, self.head_hidden = hypernet_dim, head_hidden
        self.tied, self.bias, self.init, self.algorithm = tied, bias, init, algorithm
        self.block_size = 1 if causal and block_size is None else block_size
        self.causal = self.block_size is not None
        self.chunk_size, self.length_scale = chunk_size, length_scale
        self.activation = get_activation(activation)
        self.group = None if process_group is None else GroupRef(process_group)

        def hypernet() -> Hypernet:
            return Hypernet(
                num_heads,
                embed_dim // num_heads,
                hypernet_dim // num_heads,
                hidden_dim // num_heads if head_hidden == "split" else hidden_dim,
                bias=bias,
                activation=self.activation,
                init=init,
                device=device,
                dtype=dtype,
            )

        self.w1 = hypernet()
        self.w2 = None if tied else hypernet()
        self.token_info = make_token_info(token_info, embed_dim, max_length, device, dtype)
        self.norm: nn.Module | None
        if isinstance(norm, nn.Module):
            self.norm = norm
        else:
            self.norm = (
                nn.LayerNorm(embed_dim, eps=norm_eps, device=device, dtype=dtype) if norm else None
            )

    def reset_parameters(self) -> None:
        """Draw all parameters anew, after ``to_empty`` of a module made on the meta device."""
        for module in self.children():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def extra_repr(self) -> str:
        """Return what print(module) shows."""
        text = f"{self.embed_dim}, {self.hidden_dim}, num_heads={self.num_heads}, tied={self.tied}"
        options = {
            "head_hidden": (self.head_hidden, "split"),
            "bias": (self.bias, False),
            "block_size": (self.block_size, None),
            "chunk_size": (self.chunk_size, None),
            "length_scale": (self.length_scale, None),
            "algorithm": (self.algorithm, "auto"),
        }
        return text + "".join(f", {n}={v!r}" for n, (v, default) in options.items() if v != default)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Accept the authors' and SpeechBrain's names too; see :mod:`hypermixer.checkpoint_keys`."""
        if is_reference(state_dict, prefix):
            rename_reference_keys(state_dict, prefix)
            if self.tied and second_repeats_first(state_dict, prefix):
                drop_second(state_dict, prefix)
        weight = state_dict.get(f"{prefix}w1.fc1_weight")
        if weight is not None and weight.shape[0] != self.num_heads:
            error_msgs.append(
                f"{prefix}w1.fc1_weight has num_heads={weight.shape[0]}, "
                f"but this layer was made with num_heads={self.num_heads}"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    # -- the whole sequence at once ------------------------------------------------------------

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
                and the keys; each counted from 0 by default.
            cu_seqlens: (sequences + 1,) int32 or int64, cumulative lengths of packed sequences.

        Returns:
            (B, M, d), or the packed or jagged layout of the input.

        Raises:
            ValueError: for shapes that do not go together, tied cross-mixing, causal cross-mixing.
            TypeError: for integer tensors and masks of other dtypes.
            IndexError: for a position beyond a learned table.
        """
        if query.is_nested:
            return self._forward_jagged(query, key, key_padding_mask)
        if cu_seqlens is not None:
            return self._forward_packed(query, key, value, cu_seqlens, position_ids, key_padding_mask)
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
        starts = self._starts(length, keys.shape[1], query_ids, key_ids, query.device)
        shared = same and query_mask is key_mask and query_ids is key_ids
        chunk = self._chunk(query, keys.shape[1])
        if chunk is not None:
            scale = self._scale(self._count(keys, key_mask))
            ids = (query_ids, key_ids)
            plan = make_plan(self, chunk, key_mask, query_mask, ids, starts, scale)
            key_or_none = None if shared else keys
            value_or_none = None if values is keys else values
            parameters = dict(self.named_parameters())
            return mix_chunked(plan, query, key_or_none, value_or_none, parameters)

        x = _clear(query, query_mask)
        if shared:
            xk = x
            g1, g2 = self._hidden_both(self._inform(x, query_ids, starts[0]))
        else:
            xk = _clear(keys, key_mask)
            g1 = self.w1.hidden(self._inform(xk, key_ids, starts[1]))
            g2 = self._reader.hidden(self._inform(x, query_ids, starts[0]))
        v = self.split_heads(xk if values is keys else _clear(values, key_mask))
        if self.causal:
            y = self._mix_causal(g1, g2, v, key_mask)
        else:
            y = self._mix(g1, g2, v, self._count(keys, key_mask), shared)
        return self.finish(y, query_mask, query.dtype)

    def _chunk(self, query: Tensor, keys: int) -> int | None:
        """Return the tokens at a time, or None for all at once.

        Without gradients a CPU is fastest on pieces that stay in its caches, so that long sequences
        are cut even where no ``chunk_size`` was asked for.
        """
        if self.causal or is_compiling():
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

    @property
    def _reader(self) -> Hypernet:
        return self.w1 if self.w2 is None else self.w2

    def _output_layers(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        w1, w2 = self.w1, self._reader
        return w1.fc2_weight, w1.fc2_bias, w2.fc2_weight, w2.fc2_bias

    def split_heads(self, x: Tensor) -> Tensor:
        """Return tokens (B, N, d) as a head-major view (H, B, N, f)."""
        width = self.embed_dim // self.num_heads
        return x.unflatten(-1, (self.num_heads, width)).permute(2, 0, 1, 3)

    def _inform(self, x: Tensor, ids: Tensor | None, start: int) -> Tensor:
        return x if self.token_info is None else self.token_info(x, ids, start)

    def _hidden_both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return both sides' hidden layers of the same tokens.

        On accelerators by one product with the stacked weights; on CPUs two are faster, since
        their results are contiguous and nothing is copied.
        """
        if self.w2 is None:
            g = self.w1.hidden(x)
            return g, g
        if x.device.type == "cpu":
            return self.w1.hidden(x), self.w2.hidden(x)
        weight = torch.cat([self.w1.fc1_weight, self.w2.fc1_weight], dim=1)
        bias = None
        if self.w1.fc1_bias is not None and self.w2.fc1_bias is not None:
            bias = torch.cat([self.w1.fc1_bias, self.w2.fc1_bias], dim=1)
        g1, g2 = self.activation(project_heads(x, weight, bias)).chunk(2, dim=-1)
        return g1, g2

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

    def _read(self, state: Tensor, g2: Tensor, scale: Tensor | None) -> Tensor:
        """Return Y (H, B, M, f) from S (H, B, h(+1), f)."""
        u1, c1, u2, c2 = self._output_layers()
        hidden = hidden_from_state(state, u1, c1)
        if scale is not None:
            hidden = hidden * scale.to(hidden.dtype).view(1, -1, 1, 1)
        return read_tokens(g2, read_matrix(self.activation(hidden), u2, c2))

    def finish(
        self,
        y: Tensor,
        query_mask: Tensor | None,
        dtype: torch.dtype,
        norm_parameters: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Return norm(Y) (B, M, d) from the heads' Y (H, B, M, f), masked rows zero before the norm."""
        out = y.permute(1, 2, 0, 3).flatten(2)
        if query_mask is not None:
            out = out.masked_fill(query_mask.unsqueeze(-1), 0.0)
        own = dict(self.norm.named_parameters()) if self.norm and norm_parameters is None else {}
        own = norm_parameters or own
        if output_dtype(dtype) != dtype:  # float16: the norm works on what would overflow
            if not isinstance(self.norm, nn.LayerNorm):
                out = out.to(dtype)
            else:
                own = {name: p.to(out.dtype) for name, p in own.items()}
                return functional_call(self.norm, own, (out,)).to(dtype)  # type: ignore[no-any-return]
        if self.norm is None:
            return out
        return self.norm(out) if norm_parameters is None else functional_call(self.norm, own, (out,))  # type: ignore[no-any-return]

    # -- counts, positions ---------------------------------------------------------------------

    def _count(self, keys: Tensor, key_mask: Tensor | None) -> Tensor | None:
        """Return the number of keys of each sequence (B,), over all ranks; None where not needed."""
        if self.length_scale is None:
            return None
        dtype = accumulation_dtype(keys.dtype)
        if key_mask is None:
            count = torch.full(keys.shape[:1], keys.shape[1], device=keys.device, dtype=dtype)
        else:
            count = (~key_mask).sum(1, dtype=dtype)
        return count if self.group is None else all_reduce_sum(count, self.group)

    def _scale(self, count: Tensor | None) -> Tensor | None:
        """Return the factor of P for a number of keys; None where P is not scaled."""
        if count is None or self.length_scale is None:
            return None
        count = count.clamp(min=1.0)
        return count.reciprocal() if self.length_scale == "mean" else count.rsqrt()

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

    # -- causal and block-causal ---------------------------------------------------------------

    def _check_causal(
        self, same: bool, key_mask: Tensor | None, query_mask: Tensor | None
    ) -> None:
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
        per_block = F.pad(valid, (0, -length % block)).unflatten(1, (-1, block)).sum(2)
        count = per_block.cumsum(1)
        if self.group is not None:
            count = count + exclusive_scan(valid.sum(1, keepdim=True), self.group)
        return self._scale(count)

    # -- packed and jagged ---------------------------------------------------------------------

    def _forward_jagged(self, query: Tensor, key: Tensor | None, mask: Tensor | None) -> Tensor:
        if query.layout != torch.jagged:
            raise NotImplementedError(
                "nested tensors of the strided layout are not supported; "
                "make them with torch.nested.nested_tensor(..., layout=torch.jagged)"
            )
        if mask is not None or not (key is None or key is query):
            raise ValueError("a jagged query is mixed with itself: give neither key nor padding mask")
        offsets = query.offsets()
        out = self(query.values(), cu_seqlens=offsets)
        return torch.nested.nested_tensor_from_jagged(out, offsets)

    def _forward_packed(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        cu_seqlens: Tensor,
        position_ids: PositionIds,
        mask: Tensor | None,
    ) -> Tensor:
        batched = query.dim() == 3 and query.shape[0] == 1
        x = query[0] if batched else query
        _checks.tokens("query", x, self.embed_dim, ndim=2)
        if not (key is None or same_tensor(key, query)) or value is not None:
            raise ValueError("cu_seqlens packs self-mixing: give neither key nor value")
        if mask is not None:
            raise ValueError("give cu_seqlens or key_padding_mask, not both")
        if self.group is not None:
            raise ValueError("cu_seqlens cannot be combined with process_group")
        _checks.cu_seqlens(cu_seqlens, x.shape[0])
        packing = pack(cu_seqlens.to(x.device))
        ids, _ = _pair(position_ids)
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
        return self.finish(y, None, x.dtype)[0]

    # -- streaming -----------------------------------------------------------------------------

    def init_state(self, batch_size: int) -> MixingState:
        """Return the state of no keys for ``batch_size`` sequences, float32 or better."""
        _checks.positive("batch_size", batch_size)
        weight = self.w1.fc1_weight
        dtype = accumulation_dtype(weight.dtype)
        heads, hidden, width = weight.shape
        sums = weight.new_zeros(batch_size, heads, hidden + self.bias, width, dtype=dtype)
        return MixingState(sums, weight.new_zeros(batch_size, dtype=dtype))

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
        if state.sums.shape[0] != key.shape[0]:
            raise ValueError(
                f"the state holds {state.sums.shape[0]} sequences, but key has {key.shape[0]}"
            )
        if remove and position_ids is None and self.token_info is not None:
            raise ValueError("removing keys needs the position_ids they were written with")
        ignore = _checks.padding_mask("mask", mask, *key.shape[:2])
        x = _clear(key, ignore)
        g = self.w1.hidden(self._inform(x, position_ids, state.position))
        v = self.split_heads(x if value is key else _clear(value, ignore))
        sums = token_state(g, v, bias=self.bias).transpose(0, 1)
        count = torch.full_like(state.count, key.shape[1])
        if ignore is not None:
            count = count - ignore.sum(1)
        added = MixingState(sums, count, key.shape[1])
        return state - added if remove else state + added

    def read(
        self, state: MixingState, query: Tensor, position_ids: Tensor | None = None
    ) -> Tensor:
        """Return what queries (B, M, d) read from a state; their positions count from 0 by default."""
        return self._read_from(state, query, position_ids, 0)

    def _read_from(
        self, state: MixingState, query: Tensor, ids: Tensor | None, start: int
    ) -> Tensor:
        _checks.tokens("query", query, self.embed_dim)
        if state.sums.shape[0] != query.shape[0]:
            raise ValueError(
                f"the state holds {state.sums.shape[0]} sequences, but query has {query.shape[0]}"
            )
        g = self._reader.hidden(self._inform(query, ids, start))
        y = self._read(state.sums.transpose(0, 1), g, self._scale(state.count))
        return self.finish(y, None, query.dtype)

    def step(self, x: Tensor, state: MixingState) -> tuple[Tensor, MixingState]:
        """Take the next token, or the next block of up to ``block_size`` tokens, of causal mixing.

        Args:
            x: (B, d), or (B, n, d) with n ≤ ``block_size``.
            state: of the earlier tokens.

        Returns:
            The outputs, shaped as x, and the state with x in it.

        Raises:
            RuntimeError: if the layer is not causal.
            ValueError: for more tokens than a block has.
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
        after = self.write(state, block)
        y = self._read_from(after, block, None, state.position)
        return (y[:, 0] if single else y), after

    # -- analysis ------------------------------------------------------------------------------

    def generated_weights(self, query: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return W1 (B, H, N, k) and W2 (B, H, M, k), which mixing itself need not form."""
        keys = query if key is None else key
        _checks.tokens("query", query, self.embed_dim)
        _checks.tokens("key", keys, self.embed_dim)
        u1, c1, u2, c2 = self._output_layers()
        w1 = generate(self.w1.hidden(self._inform(keys, None, 0)), u1, c1)
        w2 = generate(self._reader.hidden(self._inform(query, None, 0)), u2, c2)
        return w1.transpose(0, 1), w2.transpose(0, 1)


def _clear(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return x with masked tokens zero; masked_fill, since 0·NaN is NaN, in gradients too."""
    return x if mask is None else x.masked_fill(mask.unsqueeze(-1), 0.0)


def _pair(position_ids: PositionIds) -> tuple[Tensor | None, Tensor | None]:
    """Return the positions of queries and keys."""
    if isinstance(position_ids, tuple):
        return position_ids
    return position_ids, position_ids
