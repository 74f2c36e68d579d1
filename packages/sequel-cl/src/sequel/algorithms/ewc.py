"""Elastic weight consolidation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sequel import _check
from sequel.algorithms.base import State
from sequel.algorithms.quadratic import Quadratic, merge
from sequel.fisher import KINDS
from sequel.ops.base import Ops, Tree

if TYPE_CHECKING:
    from sequel.engine import Tools

__all__ = ["EWC"]


@dataclass(frozen=True)
class EWC(Quadratic):
    """EWC (Kirkpatrick et al. 2017): parameters that the Fisher information calls important stay.

    F_t = (1/N_t) Σ_n (∂ log p(y_n|x_n)/∂θ)² at θ*_t, in evaluation mode, without the penalty.

    Args:
        lam: weight of (lam/2) Σ_t Σ_k F_t,k (θ_k - θ*_t,k)², >= 0.
        mode: ``"separate"`` (one term per task, merged exactly: O(P) whatever the number of tasks),
            ``"online"`` (Schwarz et al. 2018: omega = gamma omega + F_t, anchor = θ*_t) or ``"last"``.
        gamma: of ``"online"``, in [0, 1].
        fisher: ``"empirical"`` (data labels), ``"true"`` (expectation over the model's labels),
            ``"mc"`` (one drawn label) or ``"batch"`` (square of batch means; biased, for comparisons).
        n_samples: size of a random subset for the Fisher information; None is all.
        temperature: of the softmax in the Fisher information, > 0.
        apply, exclude: ``"grad"`` or ``"prox"``, and parameters left alone: see :class:`Quadratic`.

    >>> EWC(lam=5.0, mode="online", gamma=0.9).lam
    5.0
    """

    mode: str = "separate"
    gamma: float = 1.0
    fisher: str = "empirical"
    n_samples: int | None = None
    temperature: float = 1.0

    def check(self) -> None:
        super().check()
        _check.one_of("mode", self.mode, ("separate", "online", "last"))
        _check.within("gamma", self.gamma, 0.0, 1.0)
        _check.one_of("fisher", self.fisher, KINDS)
        _check.above("temperature", self.temperature, 0.0)
        if self.n_samples is not None:
            _check.count("n_samples", self.n_samples)

    def on_task_end(
        self, ops: Ops, params: Tree, task: int, tools: Tools, state: State
    ) -> tuple[Tree, State]:
        fisher = tools.fisher(
            params, self.fisher, n_samples=self.n_samples, temperature=self.temperature
        )
        fisher, anchor = self.without(ops, fisher), ops.wide(ops.copy(params))
        if self.mode == "separate":
            state = merge(ops, state, fisher, anchor)
        else:
            keep = self.gamma if self.mode == "online" else 0.0
            omega = ops.map(lambda o, f: keep * o + f, state["omega"], fisher)
            state = {**state, "omega": omega, "anchor": anchor}
        self.warn_if_unstable(ops, tools, state)
        return params, state
