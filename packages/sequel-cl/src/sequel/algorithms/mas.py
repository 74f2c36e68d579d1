"""Memory aware synapses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sequel import _check
from sequel.algorithms.base import State
from sequel.algorithms.quadratic import Quadratic
from sequel.ops.base import Ops, Tree

if TYPE_CHECKING:
    from sequel.engine import Tools

__all__ = ["MAS"]


@dataclass(frozen=True)
class MAS(Quadratic):
    """MAS (Aljundi et al. 2018): importance is the sensitivity of the squared output norm; no labels.

    I_t = (1/N_t) Σ_n abs(∂ ‖f(x_n)‖² / ∂θ) at θ*_t; omega accumulates it.

    Args:
        lam: weight of (lam/2) Σ omega (θ - anchor)²; twice the paper's lambda.
        accumulate: ``"sum"`` (paper) or ``"ema"``: omega = alpha omega + (1 - alpha) I_t.
        alpha: of ``"ema"``, in [0, 1].
        per_sample: False takes the absolute value of the batches' mean gradients, as others do.

    >>> MAS(lam=2.0).accumulate
    'sum'
    """

    accumulate: str = "sum"
    alpha: float = 0.5
    per_sample: bool = True

    def check(self) -> None:
        super().check()
        _check.one_of("accumulate", self.accumulate, ("sum", "ema"))
        _check.within("alpha", self.alpha, 0.0, 1.0)

    def on_task_end(
        self, ops: Ops, params: Tree, task: int, tools: Tools, state: State
    ) -> tuple[Tree, State]:
        found = tools.fisher(params, "output" if self.per_sample else "output_batch")
        found = self.without(ops, found)
        keep, add = (1.0, 1.0) if self.accumulate == "sum" else (self.alpha, 1 - self.alpha)
        omega = ops.map(lambda o, i: keep * o + add * i, state["omega"], found)
        state = {**state, "omega": omega, "anchor": ops.wide(ops.copy(params))}
        self.warn_if_unstable(ops, tools, state)
        return params, state
