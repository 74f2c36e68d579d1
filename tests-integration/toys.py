"""Small networks and data of the combinations: each stands for something that a user has."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm transformer block, causal."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        h, length = self.norm1(x), x.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Decoder-only language model without positions (the causal mask tells them)."""

    def __init__(self, vocabulary: int = 16, width: int = 16, depth: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ViT(nn.Module):
    """Patches of an 8x8 image, torch's own encoder, and one head per task."""

    def __init__(self, heads: tuple[int, ...] = (8, 8), width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Unfold(2, stride=2)
        self.embed = nn.Linear(4, width)
        self.position = nn.Parameter(0.1 * torch.randn(16, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.heads = nn.ModuleList(nn.Linear(width, classes) for classes in heads)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.embed(self.patches(images).transpose(1, 2)) + self.position
        pooled = self.encoder(x).mean(1)
        return [head(pooled) for head in self.heads]


class PointAutoencoder(nn.Module):
    """PointNet-like encoder with max pooling, and a decoder that writes all points at once."""

    def __init__(self, points: int, latent: int = 16, dim: int = 2) -> None:
        super().__init__()
        self.dim = dim
        self.encoder = nn.Sequential(nn.Linear(dim, 64), nn.ReLU(), nn.Linear(64, latent))
        self.decoder = nn.Sequential(nn.Linear(latent, 64), nn.ReLU(), nn.Linear(64, dim * points))

    def forward(self, cloud: Tensor) -> Tensor:
        code = self.encoder(cloud).amax(1)
        return self.decoder(code).unflatten(1, (-1, self.dim))


def walks(count: int, length: int, first: int, step: int, generator: torch.Generator) -> Tensor:
    """Sequences (count, length) that walk through tokens first..first+7 in steps, modulo 8."""
    start = torch.randint(8, (count, 1), generator=generator)
    return first + (start + step * torch.arange(length)) % 8


def spots(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images (count, 1, 8, 8) with one bright pixel in noise; its row and its column."""
    row, column = (torch.randint(8, (count,), generator=generator) for _ in range(2))
    images = 0.1 * torch.randn(count, 1, 8, 8, generator=generator)
    images[torch.arange(count), 0, row, column] += 3.0
    return images, row, column


def ellipses(count: int, points: int, generator: torch.Generator) -> Tensor:
    """Point clouds (count, points, 2) on ellipses of random axes, centred at random."""
    angle = 6.2832 * torch.rand(count, points, generator=generator)
    axes = 0.3 + torch.rand(count, 1, 2, generator=generator)
    centre = torch.randn(count, 1, 2, generator=generator)
    return centre + axes * torch.stack([angle.cos(), angle.sin()], -1)
