"""timm: its checkpointing covers segments of blocks; ours covers blocks, with the averages outside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from denseformer.models.link import Link


def prepare(model: nn.Module, link: Link) -> None:
    """Take over a model's ``grad_checkpointing``; ``set_grad_checkpointing`` then goes through the link."""
    enabled = getattr(model, "grad_checkpointing", None)
    if isinstance(enabled, bool):
        link.undo.append((model, "grad_checkpointing", enabled))
        if enabled:
            model.grad_checkpointing = False  # type: ignore[assignment]
            link.checkpoint = link.own_checkpoint = True
