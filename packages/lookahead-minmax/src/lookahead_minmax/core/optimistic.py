"""Optimistic gradient steps (Daskalakis et al. 2018) around any torch optimizer."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lookahead_minmax.core.players import parameters_of, state_keepers
from lookahead_minmax.core.wrapper import OptimizerWrapper


class Optimistic(OptimizerWrapper):
    r"""Add the change of the update: :math:`w_{t+1} = w_t - 2 u_t + u_{t-1}`.

    :math:`u_t` is the base optimizer's update, whatever it is: SGD gives optimistic gradient descent
    (OGDA), Adam gives Optimistic Adam. The previous update is stored by value, one copy of the weights.

    Args:
        base: the optimizer that makes the updates.
        first: "repeat" takes :math:`u_0 = u_1`, so that the first step is the base's own; "zero" takes
            :math:`u_0 = 0`, a double first step (Gidel et al. 2019). A parameter that joins later starts
            the same way; one without a gradient does not move and keeps its last update.

    Raises:
        TypeError: `base` is not an optimizer.
        ValueError: `first` is unknown.

    Example:
        >>> import torch
        >>> w = torch.tensor([1.0], requires_grad=True)
        >>> optimizer = Optimistic(torch.optim.SGD([w], lr=0.5))
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     (w**2 / 2).sum().backward()
        ...     optimizer.step()
        >>> w.item()  # 1 - 0.5 = 0.5, then 0.5 - 2 (0.25) + 0.5
        0.5
    """

    _key = "optimistic"

    def __init__(self, base: Optimizer, first: Literal["repeat", "zero"] = "repeat") -> None:
        if first not in ("repeat", "zero"):
            raise ValueError(f"first must be 'repeat' or 'zero', got {first!r}")
        super().__init__(base)
        self.first = first
        self._previous: dict[Tensor, Tensor] = {}
        state_keepers.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the attributes of the original."""
        super().__setstate__(state)
        state_keepers.add(self)

    def forget(self, optimizer: Optimizer) -> None:
        """Drop the previous update, if the optimizer is this one or its base."""
        if optimizer is self or optimizer is self.base:
            self._previous.clear()

    @torch.no_grad()
    def _before_step(self) -> list[tuple[Tensor, Tensor]]:
        return [(tensor, tensor.detach().clone()) for tensor in parameters_of(self.base)]

    def _after_step(self, before: list[tuple[Tensor, Tensor]]) -> None:
        for tensor, old in before:
            if tensor.grad is None:  # the base left it alone, and so must we
                continue
            update = old.sub_(tensor.detach())  # u_t
            previous = self._previous.get(tensor)
            if previous is not None:
                tensor.sub_(update).add_(previous)
            elif self.first == "zero":
                tensor.sub_(update)
            self._previous[tensor] = update

    def _own_state(self) -> dict[str, Any]:
        return {
            "first": self.first,
            "previous": [self._previous.get(tensor) for tensor in parameters_of(self.base)],
        }

    def _load_own_state(self, state: dict[str, Any]) -> None:
        here = list(parameters_of(self.base))
        saved = state["previous"]
        wrong = [
            index
            for index, (tensor, update) in enumerate(zip(here, saved, strict=False))
            if update is not None and update.shape != tensor.shape
        ]
        if len(here) != len(saved) or wrong:
            raise ValueError(
                f"the saved updates are those of {len(saved)} parameters, here are {len(here)}; "
                f"shapes differ at positions {wrong}"
            )
        self.first = state["first"]
        self._previous = {
            tensor: update.to(tensor.device, tensor.dtype, copy=True)
            for tensor, update in zip(here, saved, strict=True)
            if update is not None
        }

    def _describe(self) -> str:
        return f"first={self.first!r}, "
