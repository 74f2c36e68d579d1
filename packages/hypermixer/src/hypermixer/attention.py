"""HyperMixing under nn.MultiheadAttention's call signature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hypermixer._checks import is_compiling, one_gradient, same_tensor
from hypermixer.mixing import HyperMixing


class HyperMixingAttention(nn.Module):
    """A drop-in for :class:`torch.nn.MultiheadAttention` that mixes in linear time.

    The call signature, the layouts (batched, unbatched, ``batch_first``) and the masks are those of
    nn.MultiheadAttention. There are no attention weights: the second result is always None.

    Args:
        embed_dim: d.
        num_heads: H.
        hidden_dim: d', hidden units of the token-mixing MLP; 2·d by default.
        dropout: applied to the output while training.
        batch_first: (B, N, d) rather than (N, B, d).
        mixing: further arguments of :class:`hypermixer.HyperMixing`.

    Example:
        >>> mha = HyperMixingAttention(16, 2, batch_first=True)
        >>> x = torch.randn(2, 5, 16)
        >>> out, weights = mha(x, x, x)
        >>> out.shape, weights
        (torch.Size([2, 5, 16]), None)
    """

    # What nn.TransformerEncoderLayer looks at before it takes a fast path that would skip forward().
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
        batch_first: bool = False,
        **mixing: Any,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.dropout, self.batch_first = dropout, batch_first
        self.mixing = HyperMixing(embed_dim, hidden_dim, num_heads, **mixing)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Mix tokens.

        Args:
            query: (N, d), (N, B, d), or (B, N, d) with ``batch_first``.
            key: likewise; the query by default.
            value: likewise; the key by default.
            key_padding_mask: (B, N), or (N,) unbatched; True or −inf = ignore.
            need_weights: ignored, there are none.
            attn_mask: None, or the causal mask for a layer made with ``causal=True``.
            average_attn_weights: ignored.
            is_causal: says that ``attn_mask`` is the causal mask.

        Returns:
            The output, and None.

        Raises:
            NotImplementedError: for a mask that says which query may see which key.
        """
        self._check_mask(attn_mask, is_causal, query)
        key = query if key is None else key
        value = key if value is None else value
        batched = query.dim() == 3 or query.is_nested
        turn = batched and not self.batch_first

        def to_batch(x: Tensor) -> Tensor:
            return (x.transpose(0, 1) if turn else x) if batched else x.unsqueeze(0)

        q = to_batch(query)
        k = q if _one(key, query) else to_batch(key)
        v = k if _one(value, key) else to_batch(value)
        mask = key_padding_mask
        if mask is not None and not batched:
            mask = mask.unsqueeze(0)
        out = self.mixing(q, None if k is q else k, None if v is k else v, key_padding_mask=mask)
        out = nn.functional.dropout(out, self.dropout, self.training)
        if not batched:
            out = out.squeeze(0)
        return (out.transpose(0, 1) if turn else out), None

    def _check_mask(self, mask: Tensor | None, is_causal: bool, query: Tensor) -> None:
        if mask is None and not is_causal:
            return
        if self.mixing.block_size != 1:
            raise NotImplementedError(
                "HyperMixing has no weight for each pair of tokens, so attn_mask cannot be applied; "
                "for the causal mask make the layer with causal=True"
            )
        if mask is None or is_causal:
            return
        length = query.shape[-2] if self.batch_first or query.dim() == 2 else query.shape[0]
        masked = mask if mask.dtype == torch.bool else mask == float("-inf")
        future = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
        if not is_compiling() and not (
            masked.shape == future.shape and torch.equal(masked, future)
        ):
            raise NotImplementedError(
                "with causal=True attn_mask may only be the causal mask, "
                f"(length, length) with the future masked; got another, of shape {tuple(mask.shape)}"
            )

    def extra_repr(self) -> str:
        """Return what print(module) shows."""
        return f"batch_first={self.batch_first}, dropout={self.dropout}"


def _one(a: Tensor, b: Tensor) -> bool:
    return same_tensor(a, b) and one_gradient(a, b)
