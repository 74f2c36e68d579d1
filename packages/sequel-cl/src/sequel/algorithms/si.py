"""Synaptic intelligence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sequel import _check
from sequel.algorithms.base import Context, Info, State
from sequel.algorithms.quadratic import Quadratic
from sequel.ops.base import Array, Ops, Tree

if TYPE_CHECKING:
    from sequel.engine import Tools

__all__ = ["SI"]


@dataclass(frozen=True)
class SI(Quadratic):
    """SI (Zenke, Poole, Ganguli 2017): importance is the loss drop that a parameter's path brought.

    Each step: path_k -= g_k (θ_k^new - θ_k^old). At a task's end
    omega_k += max(0, path_k) / ((θ*_t,k - θ*_{t-1},k)² + xi), path = 0, anchor = θ*_t.

    Args:
        lam: weight of (lam/2) Σ omega (θ - anchor)²; twice the paper's c.
        xi: damping, > 0.
        grad_source: ``"task"`` (g without the penalty, as in the paper) or ``"total"``.
        clip_omega: upper limit of omega (0.001 in Avalanche); None is none.

    >>> SI(lam=10.0).xi
    0.1
    """

    xi: float = 0.1
    grad_source: str = "task"
    clip_omega: float | None = None
    needs = frozenset({"old_params", "task_grads"})

    def check(self) -> None:
        super().check()
        _check.above("xi", self.xi, 0.0)
        _check.one_of("grad_source", self.grad_source, ("task", "total"))
        if self.clip_omega is not None:
            _check.above("clip_omega", self.clip_omega, 0.0)

    def init(self, ops: Ops, params: Tree, info: Info) -> State:
        return {**super().init(ops, params, info), "path": ops.wide(ops.zeros_like(params))}

    def keeps_old(self, ctx: Context) -> bool:
        return self.apply == "prox" or getattr(ctx, "update", None) is None

    def after_step(
        self, ops: Ops, old: Tree, new: Tree, grads: Tree, ctx: Context, state: State
    ) -> tuple[Tree, State]:
        new, state = super().after_step(ops, old, new, grads, ctx, state)
        g = grads if self.grad_source == "task" else ctx.total_grads
        if self.keeps_old(ctx) or ctx.update is None:
            path = ops.accumulate(state["path"], g, ops.sub_from(old, new), 1.0)
        else:
            moved, scale = ctx.update()
            path = ops.accumulate(state["path"], g, moved, -scale)
        return new, {**state, "path": path}

    def on_task_end(
        self, ops: Ops, params: Tree, task: int, tools: Tools, state: State
    ) -> tuple[Tree, State]:
        def grown(omega: Array, path: Array, p: Array, anchor: Array) -> Array:
            total = omega + ops.relu(path) / ((p - anchor) ** 2 + self.xi)
            return total if self.clip_omega is None else ops.clip(total, None, self.clip_omega)

        params_now = ops.wide(ops.copy(params))
        omega = ops.map(grown, state["omega"], state["path"], params_now, state["anchor"])
        omega = self.without(ops, omega)
        state = {"omega": omega, "anchor": params_now, "path": ops.zeros_like(omega)}
        self.warn_if_unstable(ops, tools, state)
        return params, state
