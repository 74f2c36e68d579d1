"""Adapted ``nn.MultiheadAttention``: its projections are read as weights, not called as modules.

PyTorch's own forward hands ``in_proj_weight`` and ``out_proj.weight`` to one function, so that
adapters on ``out_proj`` alone would be ignored. The forward here is the same computation, spelled
out, with both projections at W(λ).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palora.core import functional as PF
from palora.core.layers import AdaptedLayer, LayerSpec, Switched
from palora.core.preference import Active, PreferenceState

__all__ = ["AdaptedAttention"]


class AdaptedAttention(Switched):
    """``nn.MultiheadAttention`` at W(λ); A and B adapt ``in_proj_weight``."""

    palora_A: nn.Parameter | None
    palora_B: nn.Parameter | None
    in_proj_weight: nn.Parameter
    in_proj_bias: nn.Parameter | None
    q_proj_weight: nn.Parameter
    k_proj_weight: nn.Parameter
    v_proj_weight: nn.Parameter
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    out_proj: nn.Linear
    num_heads: int
    embed_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    training: bool
    _qkv_same_embed_dim: bool
    _palora: PreferenceState
    _palora_spec: LayerSpec

    _mixture: Any = AdaptedLayer._mixture
    _repeat: Any = AdaptedLayer._repeat
    _row_message: Any = AdaptedLayer._row_message

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention output (and weights), as ``nn.MultiheadAttention`` does."""
        batched = query.dim() == 3
        same_qk, same_kv = query is key, key is value
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self._project(query, key, value, same_qk and same_kv)
        n = q.shape[0]
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(n, -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(n, -1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        mask = self._mask(attn_mask, key_padding_mask, n, q, k, is_causal)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        p = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), p)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _mask(
        self,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        n: int,
        q: Tensor,
        k: Tensor,
        is_causal: bool,
    ) -> Tensor | None:
        """Both masks as one additive mask that broadcasts over (batch, heads, query, key)."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True is a hint about attn_mask, which was not given")
        extra = k.shape[1]
        total: Tensor | None = None
        if attn_mask is not None:
            mask = attn_mask.unsqueeze(0) if attn_mask.dim() == 2 else attn_mask
            heads = 1 if mask.shape[0] == 1 else self.num_heads
            total = _additive(mask.unflatten(0, (-1, heads)), q.dtype, extra)
        if key_padding_mask is not None:
            padding = key_padding_mask.reshape(n, 1, 1, -1)
            padding = _additive(padding, q.dtype, extra)
            total = padding if total is None else total + padding
        return total

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, same: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        bias = self.in_proj_bias
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        if not self._qkv_same_embed_dim:
            weights: tuple[Tensor, ...]
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            weights = self.in_proj_weight.chunk(3)
        active = self._palora.current(self.training)
        A, B = self.palora_A, self.palora_B
        if A is None or B is None or active.value is None:
            if same and self._qkv_same_embed_dim:
                q, k, v = F.linear(query, self.in_proj_weight, bias).chunk(3, -1)
                return q, k, v
            pairs = zip((query, key, value), weights, biases, strict=True)
            q, k, v = (F.linear(x, w, b) for x, w, b in pairs)
            return q, k, v
        if same and self._palora_spec.mode == "fused":
            q, k, v = self._adapted(query, self.in_proj_weight, bias, A, B, active).chunk(3, -1)
            return q, k, v
        downs = A.chunk(3, 1) if self._palora_spec.mode == "split" else (A, A, A)
        q, k, v = (
            self._adapted(x, w, b, down, up, active)
            for x, w, b, down, up in zip(
                (query, key, value), weights, biases, downs, B.chunk(3, 1), strict=True
            )
        )
        return q, k, v

    def _adapted(
        self, x: Tensor, w: Tensor, b: Tensor | None, A: Tensor, B: Tensor, active: Active
    ) -> Tensor:
        spec, lam = self._palora_spec, self._mixture(active)
        n = x.shape[0] * x.shape[1]
        free = spec.path == "auto" and not (spec.dropout and self.training)
        half = w.dtype in (torch.float16, torch.bfloat16)
        weight_path = spec.path == "weight" or (
            free and not half and PF.prefers_weight_path(n, w.shape[0], w.shape[1])
        )
        if lam.dim() == 1 and weight_path:
            dtype = w.dtype
            if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
                dtype = torch.get_autocast_dtype(x.device.type)
            return PF.mixed_linear(x.to(dtype), w, b, A, B, lam, spec.scale, dtype=dtype)
        base = F.linear(x, w, b)
        dropped = F.dropout(x, spec.dropout, self.training) if spec.dropout else x
        repeat = 1
        if lam.dim() == 2:
            lam = lam.to(base.dtype)
            repeat = self._repeat(active, x.shape[0])
        A, B = A.to(base.dtype), B.to(base.dtype)
        return base + PF.low_rank_rows(dropped, A, B, lam.to(base.dtype), spec.scale, repeat)


def _additive(mask: Tensor, dtype: torch.dtype, length: int) -> Tensor:
    """A boolean (True: hidden) or additive mask as an additive one of ``length`` keys."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
            mask, float("-inf")
        )
    return F.pad(mask.to(dtype), (0, length - mask.shape[-1]))
