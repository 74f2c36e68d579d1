"""Fine-tuning and its upper bound: Naive, StableSGD, Joint."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from sequel.algorithms.base import Algorithm, State
from sequel.ops.base import Ops, Tree

if TYPE_CHECKING:
    from sequel.engine import Tools
    from sequel.scenarios import Data, Scenario

__all__ = ["Joint", "Naive", "StableSGD"]


@dataclass(frozen=True)
class Naive(Algorithm):
    """Fine-tuning: cross-entropy on the current task only.

    >>> Naive().name
    'naive'
    """


@dataclass(frozen=True)
class StableSGD(Naive):
    """Naive with a decaying learning rate (Mirzadeh et al. 2020): pass ``**StableSGD.preset``.

    The method is a way of training, not of computing gradients: ``lr_t = max(lr 0.8^t, 5e-5)``, dropout
    in the model and a small batch.

    >>> StableSGD.preset["lr_decay"]
    0.8
    """

    preset = {"lr_decay": 0.8, "min_lr": 5e-5, "batch_size": 10}  # noqa: RUF012


@dataclass(frozen=True)
class Joint(Algorithm):
    """Train task t on the data of tasks 1..t; the upper bound of every method here.

    ``from_scratch=True`` (cumulative training) starts every task from the initial parameters.

    >>> Joint(from_scratch=True)
    Joint(from_scratch=True)
    """

    from_scratch: bool = False

    def init(self, ops: Ops, params: Tree, info: object) -> State:
        return {"start": ops.copy(params)} if self.from_scratch else {}

    def training_data(self, scenario: Scenario, task: int, tools: Tools, state: State) -> Data:
        from sequel.scenarios import Data

        return Data.concat([scenario[i].train for i in range(task + 1)])

    def training_sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(accumulate(sizes))

    def on_task_start(
        self, ops: Ops, params: Tree, task: int, tools: Tools, state: State
    ) -> tuple[Tree, State]:
        return (ops.copy(state["start"]) if self.from_scratch else params), state
