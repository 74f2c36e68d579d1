"""One residual structure for every mixer, and the feature width that equalises parameter counts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hypermixer.baselines.mixers import make_mixer
from hypermixer.positions import Sinusoidal


class MixerLayer(nn.Module):
    """Pre-norm layer: x + Drop(mixer(LN(x))), then x + Drop(FFN(LN(x))).

    Args:
        mixer: ``(x, padding) → y``.
        embed_dim: d.
        dim_feedforward: hidden units of the feature mixing; 0 leaves it out (token mixing only).
        dropout: probability.
    """

    def __init__(
        self, mixer: nn.Module, embed_dim: int, dim_feedforward: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm1 = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.features = None
        if dim_feedforward:
            self.features = nn.Sequential(
                nn.LayerNorm(embed_dim),
                nn.Linear(embed_dim, dim_feedforward),
                nn.GELU(),
                nn.Linear(dim_feedforward, embed_dim),
                nn.Dropout(dropout),
            )

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Return (B, N, d)."""
        x = x + self.dropout(self.mixer(self.norm1(x), padding))
        return x if self.features is None else x + self.features(x)


class MixerClassifier(nn.Module):
    """Embeddings with sinusoidal positions, layers of one mixer, mean pooling, a linear head.

    Pairs of texts are one sequence with segments 0 and 1; the head then sees the means a and b of the
    two segments as ``[a, b, |a − b|, a·b]`` (Conneau et al. 2017), the same for every mixer.

    Args:
        mixer: name, see :func:`hypermixer.baselines.make_mixer`.
        num_classes: outputs.
        vocab_size: of the token embedding, token 0 being padding; 0 for inputs that are features.
        num_features: of an input token, where ``vocab_size`` is 0.
        embed_dim: d.
        num_layers: layers.
        max_length: tokens that a static mixer is made for.
        dim_feedforward: hidden units of the feature mixing; 0 leaves it out.
        hidden_dim: d' of token-mixing MLPs.
        num_heads: of attention and of HyperMixing.
        pairs: the inputs are pairs of texts, with segments.
        dropout: probability.
    """

    def __init__(
        self,
        mixer: str,
        num_classes: int,
        *,
        vocab_size: int = 0,
        num_features: int = 1,
        embed_dim: int = 64,
        num_layers: int = 2,
        max_length: int = 128,
        dim_feedforward: int = 128,
        hidden_dim: int | None = None,
        num_heads: int = 1,
        pairs: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embed: nn.Module
        if vocab_size:
            self.embed = nn.Embedding(vocab_size, embed_dim, padding_idx=0)
        else:
            self.embed = nn.Linear(num_features, embed_dim)
        self.segments = nn.Embedding(2, embed_dim) if pairs else None
        self.positions = Sinusoidal(embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            MixerLayer(
                make_mixer(
                    mixer,
                    embed_dim,
                    max_length=max_length,
                    hidden_dim=hidden_dim,
                    num_heads=num_heads,
                ),
                embed_dim,
                dim_feedforward,
                dropout,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(4 * embed_dim if pairs else embed_dim, num_classes)

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, padding: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, num_classes) for token ids (B, N) or features (B, N, ·)."""
        if padding is None and not tokens.dtype.is_floating_point:
            padding = tokens == 0
        x = self.positions(self.embed(tokens))
        if self.segments is not None and segments is not None:
            x = x + self.segments(segments)
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, padding)
        x = self.norm(x)
        if self.segments is None or segments is None:
            return self.head(_mean(x, padding))  # type: ignore[no-any-return]
        a, b = (_mean(x, _or(padding, segments != side)) for side in (0, 1))
        return self.head(torch.cat([a, b, (a - b).abs(), a * b], -1))  # type: ignore[no-any-return]


def _or(padding: Tensor | None, other: Tensor) -> Tensor:
    return other if padding is None else padding | other


def _mean(x: Tensor, padding: Tensor | None) -> Tensor:
    """Return the mean over the tokens that are not padding (B, d)."""
    if padding is None:
        return x.mean(1)
    kept = x.masked_fill(padding.unsqueeze(-1), 0.0)
    return kept.sum(1) / (~padding).sum(1, keepdim=True).clamp(min=1)


def count_parameters(model: nn.Module) -> int:
    """Return the number of trained numbers."""
    return sum(p.numel() for p in model.parameters())


def match_parameters(build: Callable[[int], nn.Module], target: int, *, limit: int = 65_536) -> int:
    """Return the ``dim_feedforward`` whose model comes closest to ``target`` parameters.

    Args:
        build: makes the model of a ``dim_feedforward`` (called on the meta device).
        target: parameters wanted.
        limit: largest width tried.

    Example:
        >>> match_parameters(lambda width: nn.Linear(width, 1), 101)
        100
    """
    with torch.device("meta"):
        low, high = count_parameters(build(1)), count_parameters(build(2))
    width = round(1 + (target - low) / (high - low))
    return max(1, min(width, limit))
