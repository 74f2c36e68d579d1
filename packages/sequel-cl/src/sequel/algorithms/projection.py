"""Gradient episodic memory and its averaged form: GEM, A-GEM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sequel import _check
from sequel.algorithms.base import Algorithm, Batch, Context, Info, MemorySpec, State
from sequel.functional import gem_dual
from sequel.ops.base import Ops, Tree

if TYPE_CHECKING:
    from sequel.engine import Tools

__all__ = ["AGEM", "GEM"]


@dataclass(frozen=True)
class AGEM(Algorithm):
    """A-GEM (Chaudhry et al. 2019): project the gradient where it would raise the memory's loss.

    r is the gradient of the mean loss on a draw from the memory of earlier tasks; if g·r < 0,
    g <- g - (g·r / r·r) r over all parameters at once.

    Args:
        per_task: samples kept of each task.
        replay_batch: samples drawn per step.
        clip: clip the gradient ``"after"`` the projection or ``"before"`` it (authors).

    >>> AGEM(per_task=20).replay_batch
    256
    """

    per_task: int = 250
    replay_batch: int = 256
    clip: str = "after"

    def check(self) -> None:
        _check.count("per_task", self.per_task)
        _check.count("replay_batch", self.replay_batch)
        _check.one_of("clip", self.clip, ("after", "before"))

    def memory_spec(self, info: Info) -> MemorySpec:
        capacity = self.per_task * info.n_tasks
        return MemorySpec(capacity, "manual", 1, min(self.replay_batch, capacity))

    def grads(self, ops: Ops, grads: Tree, params: Tree, ctx: Context, state: State) -> Tree:
        if not ctx.replays:
            return grads
        reference = ops.grad(lambda p: ctx.loss(p, ctx.replays[0]), params)
        gr, rr = ops.dot(grads, reference), ops.dot(reference, reference)
        if ctx.past is not None and float(gr) >= 0:
            return grads
        safe = ops.where(rr > 0, rr, 1 + 0 * rr)
        scale = ops.where((gr < 0) & (rr > 0), -gr / safe, 0 * gr)
        return ops.add_scaled(grads, reference, scale)

    def on_task_end(
        self, ops: Ops, params: Tree, task: int, tools: Tools, state: State
    ) -> tuple[Tree, State]:
        return params, tools.fill_memory(state, task, self.per_task, "task", params)


@dataclass(frozen=True)
class GEM(Algorithm):
    """GEM (Lopez-Paz & Ranzato 2017): no past task's memory loss may rise.

    One reference gradient per past task, on all of its memory; the gradient is projected onto the cone
    of agreement by the dual quadratic program of :func:`sequel.functional.gem_dual`. The program (one
    row per past task) is solved on the host, which is GEM's only step off the device under JAX.

    >>> GEM(per_task=20).margin
    0.5
    """

    per_task: int = 250
    margin: float = 0.5
    ridge: float = 1e-3

    def check(self) -> None:
        _check.count("per_task", self.per_task)
        _check.at_least("margin", self.margin, 0.0)
        _check.at_least("ridge", self.ridge, 0.0)

    def memory_spec(self, info: Info) -> MemorySpec:
        return MemorySpec(self.per_task * info.n_tasks, "manual")

    def init(self, ops: Ops, params: Tree, info: Info) -> State:
        leaf = next(iter(params.values()))
        return {"used": ops.asarray(np.zeros(self.per_task * info.n_tasks), leaf)}

    def grads(self, ops: Ops, grads: Tree, params: Tree, ctx: Context, state: State) -> Tree:
        if ctx.past == 0:
            return grads
        memory, used, m, n = state["memory"], state["used"], self.per_task, ctx.info.n_tasks
        base = ops.asarray(np.arange(m))

        def reference(i: Any) -> Any:
            rows = base + i * m
            old = Batch.rows(ops, memory, rows, ops.take(used, rows))
            return ops.flatten(ops.grad(lambda p: ctx.loss(p, old), params))

        G = ops.map_rows(reference, n, ctx.past)
        g = ops.flatten(grads)
        active = (used.reshape(n, m).sum(-1) > 0)[: len(G)]

        def dual(gram: Any, gg: Any, on: Any) -> Any:
            return gem_dual(gram, gg, self.margin, self.ridge, on)

        Gg = G @ g
        v = ops.host_call(dual, Gg, G @ G.T, Gg, active)
        return ops.unflatten(g + v @ G, grads)

    def on_task_end(
        self, ops: Ops, params: Tree, task: int, tools: Tools, state: State
    ) -> tuple[Tree, State]:
        state = tools.fill_memory(state, task, self.per_task, "task", params)
        used = np.zeros(self.per_task * tools.info.n_tasks)
        used[tools.slots.rows] = 1.0
        return params, {**state, "used": ops.asarray(used, next(iter(params.values())))}
