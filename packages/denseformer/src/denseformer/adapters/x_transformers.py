"""x-transformers: blocks are not modules there; the averages follow each feed-forward's residual."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Found:
    """The residual modules after which averages stand, and those that take the stream into each block."""

    blocks: list[nn.Module]
    entries: list[nn.Module]

    @property
    def opener(self) -> nn.Module:
        """The one through which X_0 enters."""
        return self.entries[0]


def find(model: nn.Module) -> Found | None:
    """Return the residual modules of a model's only ``AttentionLayers``; ``None`` if it has none.

    Raises:
        ValueError: several stacks, or one of these: post-norm, layer dropout, residual streams.
    """
    library = sys.modules.get("x_transformers.x_transformers")
    if library is None:
        return None
    stacks: list[Any] = [m for m in model.modules() if isinstance(m, library.AttentionLayers)]
    if not stacks:
        return None
    if len(stacks) > 1:
        raise ValueError(f"the model has {len(stacks)} AttentionLayers; densify each by itself")
    stack = stacks[0]
    order = list(stack.layers_execute_order)
    post_norms = [stack.layers[n][0][2] for n in order]
    problems = {
        "post-norm (pre_norm=False)": any(norm is not None for norm in post_norms),
        "layer_dropout": any(rate > 0 for rate in stack.layer_dropouts),
        "several residual streams": getattr(stack, "num_residual_streams", 1) > 1,
    }
    if bad := [name for name, present in problems.items() if present]:
        raise ValueError(f"x-transformers with {', '.join(bad)} cannot be densified")
    ends = [at for at, n in enumerate(order) if stack.layer_types[n] == "f"]
    if not ends:
        raise ValueError("the AttentionLayers have no feed-forward layer to attach an average to")
    residuals = [stack.layers[n][2] for n in order]
    starts = [0, *(at + 1 for at in ends[:-1])]
    return Found([residuals[at] for at in ends], [residuals[at] for at in starts])
