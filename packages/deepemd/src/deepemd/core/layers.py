"""Building blocks of the network: Fourier features, attention with an optional distance bias, blocks."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Mix = Literal["joint", "self", "cross"]


def fourier_features(points: Tensor, count: int) -> Tensor:
    """Append ``sin(2^k π/2 p), cos(2^k π/2 p)`` for ``k < count`` to the coordinates.

    Args:
        points: ``(..., D)``.
        count: number of octaves ``K``; 0 returns the points themselves.

    Returns:
        ``(..., D (1 + 2K))``.

    >>> fourier_features(torch.zeros(4, 3), 6).shape
    torch.Size([4, 39])
    """
    if count == 0:
        return points
    octaves = 2.0 ** torch.arange(count, device=points.device, dtype=points.dtype)
    angles = (points.unsqueeze(-1) * (octaves * (math.pi / 2))).flatten(-2)
    return torch.cat([points, angles.sin(), angles.cos()], -1)


class Attention(nn.Module):
    """Multi-head attention over the two clouds, jointly, within each, or from each to the other.

    With ``biased`` every head adds ``-τ ||p_a - p_b||²`` to its logits. The bias is folded into a few
    extra query and key channels (the row constant ``-τ ||p_a||²`` cancels in the softmax), so the fused
    kernels of ``scaled_dot_product_attention`` still apply and no (T, T) mask is stored.
    """

    def __init__(self, width: int, num_heads: int, *, biased: bool = False) -> None:
        super().__init__()
        self.log_tau: nn.Parameter | None
        if width % num_heads:
            raise ValueError(f"width must be a multiple of num_heads, got {width} and {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        if biased:
            self.log_tau = nn.Parameter(torch.tensor([2.0 * (h % 4) for h in range(num_heads)]))
        else:
            self.log_tau = None

    def forward(
        self, h: Tensor, points: Tensor, split: int, mix: Mix, keep: Tensor | None
    ) -> Tensor:
        """Attend. ``h`` is (B, T, d), ``points`` (B, T, D), ``keep`` (B, T) or None; X is ``[:split]``."""
        batch, tokens, width = h.shape
        heads = (3, self.num_heads, width // self.num_heads)
        q, k, v = self.qkv(h).view(batch, tokens, *heads).permute(2, 0, 3, 1, 4)
        if mix == "joint":
            mixed = self._attend(q, k, v, points, points, keep)
        else:
            first, second = slice(None, split), slice(split, None)
            pairs = ((first, first), (second, second)) if mix == "self" else (
                (first, second), (second, first)
            )  # fmt: skip
            mixed = torch.cat(
                [
                    self._attend(
                        q[:, :, a], k[:, :, b], v[:, :, b], points[:, a], points[:, b],
                        None if keep is None else keep[:, b],
                    )
                    for a, b in pairs
                ],
                dim=2,
            )  # fmt: skip
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return out

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, p_q: Tensor, p_k: Tensor, keep: Tensor | None
    ) -> Tensor:
        mask = None if keep is None else keep[:, None, None, :]
        if self.log_tau is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        size = q.shape[-1]
        q, k = fold_bias(q, k, p_q, p_k, self.log_tau)
        v = F.pad(v, (0, q.shape[-1] - size))  # fused kernels want one head size for all three
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return out[..., :size]


def fold_bias(
    q: Tensor, k: Tensor, p_q: Tensor, p_k: Tensor, log_tau: Tensor
) -> tuple[Tensor, Tensor]:
    """Extend queries and keys so that ``q'·k' = q·k/√d - τ ||p_q - p_k||²`` up to a row constant.

    Args:
        q, k: (B, H, T, d).
        p_q, p_k: (B, T, D) coordinates.
        log_tau: (H,) logarithm of each head's ``τ``.

    Returns:
        Queries and keys whose last dimension is padded to a multiple of 8; use them with ``scale=1``.
    """
    size, dim = q.shape[-1], p_q.shape[-1]
    tau = log_tau.exp().to(q.dtype).view(1, -1, 1, 1)
    p_q, p_k = p_q.unsqueeze(1).to(q.dtype), p_k.unsqueeze(1).to(q.dtype)
    ones = torch.ones_like(q[..., :1])
    q = torch.cat([q * size**-0.5, 2 * tau * p_q, ones], -1)
    points = p_k.expand(-1, k.shape[1], -1, -1)
    k = torch.cat([k, points, -tau * p_k.square().sum(-1, keepdim=True)], -1)
    pad = -(size + dim + 1) % 8
    return F.pad(q, (0, pad)), F.pad(k, (0, pad))


class Block(nn.Module):
    """One transformer block: attention, then a GELU MLP, both residual; pre- or post-norm."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        mlp_ratio: int = 4,
        norm: str = "pre",
        biased: bool = False,
    ) -> None:
        super().__init__()
        self.post = norm == "post"
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, num_heads, biased=biased)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width)
        )

    def forward(
        self, h: Tensor, points: Tensor, split: int, mix: Mix, keep: Tensor | None
    ) -> Tensor:
        """Transform the tokens ``h`` (B, T, d)."""
        if self.post:
            h = self.norm1(h + self.attn(h, points, split, mix, keep))
            return self.norm2(h + self.mlp(h))  # type: ignore[no-any-return]
        h = h + self.attn(self.norm1(h), points, split, mix, keep)
        return h + self.mlp(self.norm2(h))  # type: ignore[no-any-return]
