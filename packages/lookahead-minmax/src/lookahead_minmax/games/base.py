"""What a game is: a joint field on a flat point, the players' shares of it, and a known solution."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Game(Protocol):
    """A game whose solution is known. Points are flat and batched over starts, z of shape (starts, n).

    Attributes:
        players: number of coordinates of each player; the first minimises, player i steps along minus
            its own part of the field.
    """

    players: tuple[int, ...]

    def field(self, z: Tensor, batch: Tensor | None = None) -> Tensor:
        """Return v(z), every player's gradient of its own loss, (starts, n).

        Args:
            z: the point, (starts, n).
            batch: component indices (starts, B) for a finite sum; None is the full field.
        """
        ...

    def jacobian(self) -> Tensor:
        """Return the Jacobian of the field at the solution, (n, n)."""
        ...

    def solution(self) -> Tensor:
        """Return a solution, (n,)."""
        ...

    def distance(self, z: Tensor) -> Tensor:
        """Return the distance to the solution, (starts,)."""
        ...


class SmoothGame:
    """What games share: the Jacobian by automatic differentiation, the sum of the players' distances."""

    players: tuple[int, ...]

    def field(self, z: Tensor, batch: Tensor | None = None) -> Tensor:
        """Return v(z); see `Game`."""
        raise AssertionError("a game defines its field")  # pragma: no cover

    def solution(self) -> Tensor:
        """Return a solution; see `Game`."""
        raise AssertionError("a game knows its solution")  # pragma: no cover

    def jacobian(self) -> Tensor:
        """Return the Jacobian of the field at the solution, (n, n)."""
        result: Tensor = torch.func.jacrev(lambda z: self.field(z[None])[0])(self.solution())
        return result

    def distance(self, z: Tensor) -> Tensor:
        """Return the sum over the players of the Euclidean distances to the solution, (starts,)."""
        gaps = torch.split(z - self.solution(), list(self.players), dim=-1)
        return torch.stack([gap.norm(dim=-1) for gap in gaps]).sum(0)
