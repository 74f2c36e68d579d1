"""torch.nn: an encoder that packs padded batches into nested tensors must not, between averages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from denseformer.models.link import Link


def prepare(model: nn.Module, link: Link) -> None:
    """Switch nested tensors off in the encoders that hold the blocks; padding is then computed too."""
    blocks = set(link.blocks)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and blocks & set(module.layers):
            for name in ("enable_nested_tensor", "use_nested_tensor"):
                if hasattr(module, name):
                    link.undo.append((module, name, getattr(module, name)))
                    setattr(module, name, False)
