"""The HyperMixer encoder and a sequence classifier on it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor, nn

from hypermixer import _checks
from hypermixer.layers import HyperMixerEncoderLayer


@dataclass(frozen=True)
class HyperMixerConfig:
    """Sizes and options of a HyperMixer; the defaults are the scale of the paper's text models.

    Attributes:
        vocab_size: of the token embedding.
        num_classes: of the classifier.
        d_model: d.
        num_layers: layers.
        num_heads: H.
        dim_token_mixing: d'.
        dim_feedforward: hidden units of the feature mixing.
        dropout: probability.
        tied: one hypernetwork for both sides.
        token_info: of HyperMixing.
        max_length: of a learned table.
        layout: "pre", "post" or "rezero".
        pooling: "mean" over the tokens that are not padding, or the "first" token.
        pad_id: token id of padding; None if there is none.
        init: of HyperMixing.
    """

    vocab_size: int = 30_522
    num_classes: int = 2
    d_model: int = 256
    num_layers: int = 6
    num_heads: int = 1
    dim_token_mixing: int = 512
    dim_feedforward: int = 512
    dropout: float = 0.1
    tied: bool = True
    token_info: str | None = "sinusoidal"
    max_length: int | None = None
    layout: Literal["pre", "post", "rezero"] = "pre"
    pooling: Literal["mean", "first"] = "mean"
    pad_id: int | None = 0
    init: Literal["reference", "xavier"] = "reference"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON; ``HyperMixerConfig(**fields)`` is the inverse."""
        return asdict(self)


class HyperMixerEncoder(nn.Module):
    """A stack of :class:`HyperMixerEncoderLayer` with a final LayerNorm.

    Args:
        d_model: d.
        num_layers: layers.
        nhead: H.
        layer: further arguments of :class:`HyperMixerEncoderLayer`.

    Example:
        >>> import torch
        >>> HyperMixerEncoder(32, 2, nhead=4)(torch.randn(2, 9, 32)).shape
        torch.Size([2, 9, 32])
    """

    def __init__(self, d_model: int, num_layers: int = 6, nhead: int = 1, **layer: Any) -> None:
        super().__init__()
        _checks.positive("num_layers", num_layers)
        self.layers = nn.ModuleList(
            HyperMixerEncoderLayer(d_model, nhead, **layer) for _ in range(num_layers)
        )
        factory: dict[str, Any] = {name: layer.get(name) for name in ("device", "dtype")}
        self.norm = nn.LayerNorm(d_model, **factory)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Return (B, N, d) from (B, N, d); True in the mask = ignore."""
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=key_padding_mask)
        return self.norm(x)  # type: ignore[no-any-return]


class HyperMixerForSequenceClassification(nn.Module):
    """Token embedding, encoder, pooling and a linear head.

    Args:
        config: sizes and options.

    Raises:
        ValueError: for an unknown pooling, sizes that are not positive, or a pad_id that is no id.

    Example:
        >>> import torch
        >>> config = HyperMixerConfig(vocab_size=50, d_model=16, num_layers=1)
        >>> HyperMixerForSequenceClassification(config)(torch.tensor([[4, 7, 0]])).shape
        torch.Size([1, 2])
    """

    def __init__(self, config: HyperMixerConfig) -> None:
        super().__init__()
        _checks.one_of("pooling", config.pooling, ("mean", "first"))
        _checks.positive("vocab_size", config.vocab_size)
        _checks.positive("num_classes", config.num_classes)
        if config.pad_id is not None and not 0 <= config.pad_id < config.vocab_size:
            raise ValueError(
                f"pad_id must be None or an id below vocab_size={config.vocab_size}, "
                f"got {config.pad_id}"
            )
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model, padding_idx=config.pad_id)
        self.encoder = HyperMixerEncoder(
            config.d_model,
            config.num_layers,
            config.num_heads,
            dim_feedforward=config.dim_feedforward,
            dim_token_mixing=config.dim_token_mixing,
            dropout=config.dropout,
            layout=config.layout,
            tied=config.tied,
            token_info=config.token_info,
            max_length=config.max_length,
            init=config.init,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.d_model, config.num_classes)

    def forward(self, input_ids: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Return logits (B, num_classes) for token ids (B, N).

        Args:
            input_ids: (B, N) integers.
            key_padding_mask: (B, N), True = ignore; where ``input_ids`` is ``pad_id`` by default.

        Raises:
            TypeError: for ids that are not integers.
            ValueError: for ids that are not (B, N).
        """
        if input_ids.dtype.is_floating_point:
            raise TypeError(f"input_ids must be integers, got {input_ids.dtype}")
        if input_ids.dim() != 2:
            raise ValueError(
                f"input_ids must have shape (batch, length), got {tuple(input_ids.shape)}"
            )
        if key_padding_mask is None and self.config.pad_id is not None:
            key_padding_mask = input_ids == self.config.pad_id
        mask = _checks.padding_mask("key_padding_mask", key_padding_mask, *input_ids.shape)
        x = self.encoder(self.dropout(self.embedding(input_ids)), mask)
        if self.config.pooling == "first":
            pooled = x[:, 0]
        elif mask is None:
            pooled = x.mean(1)
        else:
            count = (~mask).sum(1, keepdim=True).clamp(min=1)
            pooled = x.masked_fill(mask.unsqueeze(-1), 0.0).sum(1) / count.to(x.dtype)
        return self.head(self.dropout(pooled))  # type: ignore[no-any-return]
