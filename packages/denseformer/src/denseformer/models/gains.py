"""The paper's baseline with as few parameters: a learned gain on every skip connection."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class GainedResidual(nn.Module):
    """``g·x + branch(x)`` with one learned scalar g, 1 at the start (paper, "Skips With Gains").

    Args:
        branch: the sub-layer without its skip, norm included; may take further arguments.

    >>> GainedResidual(nn.Identity())(torch.ones(2)).tolist()
    [2.0, 2.0]
    """

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the gained sum, in the type of ``x``."""
        branch = self.branch(x, *args, **kwargs)
        assert isinstance(branch, Tensor)
        return self.gain.to(x.dtype) * x + branch


class SkipsWithGains(nn.Sequential):
    """A stack of residual branches, in order (attention, MLP, attention, ...), each with its own gain.

    >>> sum(p.numel() for p in SkipsWithGains([nn.Identity()] * 4).parameters())
    4
    """

    def __init__(self, branches: Iterable[nn.Module]) -> None:
        super().__init__(*(GainedResidual(branch) for branch in branches))
