"""The decoder of the published runs: pre-norm, rotary positions, no biases, tied embedding and head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denseformer.core.geometry import check_int
from denseformer.models.gains import SkipsWithGains
from denseformer.models.stack import DenseStack

BASELINES = ("dense", "plain", "gains", "last_k", "final")


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a decoder; the paper's is width 768, 12 heads of 64, vocabulary 50304, 48 or 72 blocks."""

    depth: int = 16
    width: int = 64
    num_heads: int = 4
    vocab: int = 256
    context: int = 64
    baseline: str = "dense"
    dilation: int = 1
    period: int = 1
    dropout: float = (
        0.0  # after the embedding, in attention and on every branch; not stated in the paper
    )

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.baseline not in BASELINES:
            raise ValueError(
                f"baseline must be one of {', '.join(BASELINES)}; got {self.baseline!r}"
            )
        for name in ("depth", "width", "num_heads", "vocab", "context", "dilation", "period"):
            check_int(name, getattr(self, name))
        if self.width % self.num_heads or self.width // self.num_heads % 2:
            raise ValueError(
                f"width={self.width} must be an even multiple of num_heads={self.num_heads}"
            )


def rotate(x: Tensor) -> Tensor:
    """Turn interleaved pairs of (..., time, channels) by angle time·10^(-8n/channels), n the pair's 2·index."""
    time, channels = x.shape[-2:]
    rate = 10_000 ** (
        -torch.arange(0, channels, 2, device=x.device, dtype=torch.float32) / channels
    )
    angle = torch.arange(time, device=x.device, dtype=torch.float32)[:, None] * rate
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


class Attention(nn.Module):
    """Causal self-attention on the normalised stream, without its skip."""

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.drop = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=1e-5, bias=False)
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        shape = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (
            t.view(shape).transpose(1, 2) for t in self.c_attn(self.norm(x)).chunk(3, dim=-1)
        )
        rate = self.drop.p if self.training else 0.0
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, dropout_p=rate, is_causal=True)
        out = self.drop(self.c_proj(y.transpose(1, 2).reshape(x.shape)))
        assert isinstance(out, Tensor)
        return out


class MLP(nn.Sequential):
    """Norm, four times wider layer, exact GELU, back; without its skip."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-5, bias=False)
        self.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * width, width, bias=False)
        self.drop = nn.Dropout(dropout)


class Block(nn.Module):
    """One residual block: attention and MLP with their skips."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attn = Attention(config.width, config.num_heads, config.dropout)
        self.mlp = MLP(config.width, config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        x = x + self.attn(x)
        out = x + self.mlp(x)
        assert isinstance(out, Tensor)
        return out


class GPT(nn.Module):
    """The decoder; every baseline draws the same initial weights from the same seed.

    >>> model = GPT(GPTConfig(depth=2))
    >>> model(torch.zeros(1, 5, dtype=torch.long)).shape
    torch.Size([1, 5, 256])
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.drop = nn.Dropout(config.dropout)
        blocks = [Block(config) for _ in range(config.depth)]
        self.stack: nn.Module
        if config.baseline == "plain":
            self.stack = nn.Sequential(*blocks)
        elif config.baseline == "gains":
            self.stack = SkipsWithGains(branch for b in blocks for branch in (b.attn, b.mlp))
        elif config.baseline == "dense":
            self.stack = DenseStack(blocks, config.dilation, config.period)
        else:
            self.stack = DenseStack(blocks, pattern=config.baseline)
        self.norm = nn.LayerNorm(config.width, eps=1e-5, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                scale = 1 / math.sqrt(2 * config.depth) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(p, std=0.02 * scale)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits (batch, time, vocab), or the mean cross-entropy in nats for ``targets``."""
        x = self.norm(self.stack(self.drop(self.embedding(tokens))))
        logits = F.linear(x, self.embedding.weight)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
