"""Mode connectivity SGD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sequel import _check
from sequel.algorithms.base import Algorithm, Batch, Info, MemorySpec, State
from sequel.ops.base import Array, Ops, Tree

if TYPE_CHECKING:
    from sequel.engine import Tools

__all__ = ["MCSGD"]


@dataclass(frozen=True)
class MCSGD(Algorithm):
    """MC-SGD (Mirzadeh et al. 2021): a point that is linearly connected to both the old and the new minimum.

    Task t ends at θ̂_t of plain training. With θ̄ the reported model, w starts at θ̄ + p (θ̂_t - θ̄) and
    minimises, over s in {0, 1/n, ..., 1}, Σ_s L_prev(θ̄ + s (w - θ̄)) + L_curr(θ̂_t + s (w - θ̂_t)) by SGD.

    Args:
        per_task: samples kept of each task, >= 1.
        init_position: p in [0, 1].
        line_samples: n, the number of intervals.
        lr, momentum: of the SGD on w.
        epochs: steps on the whole memory.
        include_current: L_prev also covers task t (authors).
        chain_rule: weigh the gradient at a point by s; False sums them as the published code does.
        normalize: ``"authors"`` (sum of batch means over number of samples) or ``"mean"``.
        start: the next task trains from ``"hat"`` (authors) or from ``"connected"`` θ̄.

    >>> MCSGD(per_task=50).init_position
    0.1
    """

    per_task: int = 100
    init_position: float = 0.1
    line_samples: int = 10
    lr: float = 0.05
    momentum: float = 0.8
    epochs: int = 1
    include_current: bool = True
    chain_rule: bool = False
    normalize: str = "authors"
    start: str = "hat"

    def check(self) -> None:
        _check.count("per_task", self.per_task)
        _check.within("init_position", self.init_position, 0.0, 1.0)
        _check.count("line_samples", self.line_samples)
        _check.above("lr", self.lr, 0.0)
        _check.at_least("momentum", self.momentum, 0.0)
        _check.count("epochs", self.epochs, 0)
        _check.one_of("normalize", self.normalize, ("authors", "mean"))
        _check.one_of("start", self.start, ("hat", "connected"))

    def memory_spec(self, info: Info) -> MemorySpec:
        return MemorySpec(self.per_task * info.n_tasks, "manual")

    def init(self, ops: Ops, params: Tree, info: Info) -> State:
        return {"bar": ops.copy(params)}

    def eval_params(self, ops: Ops, params: Tree, state: State) -> Tree:
        bar: Tree = state["bar"]
        return bar

    def on_task_start(
        self, ops: Ops, params: Tree, task: int, tools: Tools, state: State
    ) -> tuple[Tree, State]:
        if task > 0 and self.start == "connected":
            return ops.copy(state["bar"]), state
        return params, state

    def on_task_end(
        self, ops: Ops, params: Tree, task: int, tools: Tools, state: State
    ) -> tuple[Tree, State]:
        state = tools.fill_memory(state, task, self.per_task, "task", params)
        hat = ops.copy(params)
        if task == 0:
            return params, {**state, "bar": hat}
        bar, p = state["bar"], self.init_position
        w = ops.map(lambda b, h: b + p * (h - b), bar, hat)
        leaf = next(iter(params.values()))
        owner = tools.slots.task
        last = task if self.include_current else task - 1
        previous = ops.asarray(self._weights((owner >= 0) & (owner <= last), tools.info), leaf)
        current = ops.asarray(self._weights(owner == task, tools.info), leaf)
        slope = tools.jit("mcsgd", self._slope(ops, tools))
        velocity = ops.zeros_like(w)
        for _ in range(self.epochs):
            g = slope(w, bar, hat, state["memory"], previous, current)
            velocity = ops.map(lambda v, d: self.momentum * v + d, velocity, g)
            w = ops.map(lambda a, v: a - self.lr * v, w, velocity)
        return params, {**state, "bar": ops.copy(w)}

    def _weights(self, chosen: np.ndarray[Any, Any], info: Info) -> np.ndarray[Any, Any]:
        """Return v such that L = Σ_i v_i CE_i over the memory's rows."""
        rows, out = np.flatnonzero(chosen), np.zeros(len(chosen))
        n, b = len(rows), info.batch_size
        for start in range(0, n, b):
            part = rows[start : start + b]
            out[part] = 1.0 / (n * (len(part) if self.normalize == "authors" else 1))
        return out

    def _slope(self, ops: Ops, tools: Tools) -> Any:
        def slope(
            w: Tree, bar: Tree, hat: Tree, memory: Tree, previous: Array, current: Array
        ) -> Tree:
            batch = Batch(memory["x"], memory["y"], memory["t"])
            total = ops.zeros_like(w)
            for i in range(self.line_samples + 1):
                s = i / self.line_samples
                for start, v in ((bar, previous), (hat, current)):

                    def weighted(q: Tree, v: Array = v) -> Array:
                        return (v * tools.point_losses(q, batch, train=False)).sum()

                    middle = ops.map(lambda a, c, s=s: a + s * (c - a), start, w)
                    factor = s if self.chain_rule else 1.0
                    total = ops.add_scaled(total, ops.grad(weighted, middle), factor)
            return total

        return slope
