"""Hugging Face transformers: recorded hidden states, and the library's own checkpointing."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from denseformer.models.link import Link


def _pretrained(model: nn.Module) -> Any:
    """Return the model if it is a PreTrainedModel; transformers is not imported to find out."""
    library = sys.modules.get("transformers")
    base = getattr(library, "PreTrainedModel", None) if library is not None else None
    return model if base is not None and isinstance(model, base) else None


def prepare(model: nn.Module, link: Link) -> None:
    """Let recorded hidden states be Y, and use the model's own checkpointing for ``checkpoint=True``.

    Its own, because it also switches off the key-value cache, which a recomputed block would fill twice.
    """
    found = _pretrained(model)
    if found is None:
        return
    link.on_output = record_output
    if link.checkpoint is True and found.supports_gradient_checkpointing:
        link.own_checkpoint = False
        _switch(found, "enable", {"use_reentrant": False})


def restore(model: nn.Module, link: Link) -> None:
    """Switch off the checkpointing that :func:`prepare` switched on; the config names no averages then."""
    found = _pretrained(model)
    if found is not None and hasattr(found.config, "denseformer"):
        del found.config.denseformer
    if found is not None and link.checkpoint is True and not link.own_checkpoint:
        _switch(found, "disable")


def _switch(model: Any, how: str, *args: Any) -> None:
    """Call the model's checkpointing method by its newer name, or by its older one."""
    newer = getattr(model, f"activation_checkpointing_{how}", None)
    (newer or getattr(model, f"gradient_checkpointing_{how}"))(*args)


def record_output(x: Tensor, y: Tensor) -> None:
    """Replace X_i, which a hook inside the block recorded as hidden state, by Y_i.

    transformers 5 records the output of each block by a hook; earlier releases collect what the loop
    passes on, which is Y_i already.
    """
    module = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(module, "_active_collector", None)
    collected = collector.get() if collector is not None else None
    states = (collected or {}).get("hidden_states")
    if states and states[-1] is x:
        states[-1] = y
