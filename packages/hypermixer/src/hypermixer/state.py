"""The streaming state: everything that the queries can learn about the keys seen so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MixingState:
    """S = [G1 1]ᵀ V of the keys written so far; additive over tokens.

    Attributes:
        sums: S (B, H, h, f), or (B, H, h+1, f) with hypernetwork biases; float32 or better.
        count: (B,) keys that S holds (masked ones left out), for ``length_scale``.
        position: the position of the next key, where no ``position_ids`` are given.

    Example:
        >>> from hypermixer import HyperMixing
        >>> mix, x = HyperMixing(8, token_info=None), torch.randn(1, 6, 8)
        >>> empty = mix.init_state(1)
        >>> a, b = mix.write(empty, x[:, :2]), mix.write(empty, x[:, 2:])
        >>> bool(torch.allclose((a + b).sums, mix.write(empty, x).sums, atol=1e-6))
        True
    """

    sums: Tensor
    count: Tensor
    position: int = 0

    def __add__(self, other: MixingState) -> MixingState:
        """Return the state of both sets of keys."""
        return MixingState(
            self.sums + other.sums, self.count + other.count, self.position + other.position
        )

    def __sub__(self, other: MixingState) -> MixingState:
        """Return the state without the other's keys; the next position stays."""
        return MixingState(self.sums - other.sums, self.count - other.count, self.position)

    def to(self, device: torch.device | str) -> MixingState:
        """Return the state on another device."""
        return MixingState(self.sums.to(device), self.count.to(device), self.position)

    def detach(self) -> MixingState:
        """Return the state cut off from the graph, for truncated backpropagation."""
        return MixingState(self.sums.detach(), self.count.detach(), self.position)
