"""Incremental classifier and representation learning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sequel import _check
from sequel.algorithms.base import Algorithm, Context, Info, MemorySpec, State
from sequel.functional import herding
from sequel.ops.base import Array, Ops, Tree

if TYPE_CHECKING:
    from sequel.engine import Tools
    from sequel.scenarios import Data, Scenario

__all__ = ["ICaRL"]


@dataclass(frozen=True)
class ICaRL(Algorithm):
    """iCaRL (Rebuffi et al. 2017): exemplars by herding, distillation, nearest class mean.

    After task t every seen class keeps memory // n_seen exemplars. The loss is Σ_c BCE(sigmoid f_c, target_c)
    over the classes seen, with one-hot targets for new classes and the old model's sigmoid for old ones.
    A sample gets the class whose exemplars' mean normalised feature is nearest. Needs an encoder.

    Args:
        memory: total number of exemplars K, >= 1.
        normalize: herd on features of length 1 (paper); the classifier always does.

    >>> ICaRL(memory=100).name
    'icarl'
    """

    memory: int = 2000
    normalize: bool = True
    needs = frozenset({"features"})

    def check(self) -> None:
        _check.count("memory", self.memory)

    def memory_spec(self, info: Info) -> MemorySpec:
        return MemorySpec(self.memory, "manual")

    def init(self, ops: Ops, params: Tree, info: Info) -> State:
        leaf = next(iter(params.values()))
        zeros = np.zeros(info.n_classes)
        return {
            "old": ops.copy(params),
            "old_classes": ops.asarray(zeros, leaf),
            "classes": ops.asarray(zeros, leaf),
            "means": ops.asarray(np.zeros((info.n_classes, info.feature_dim)), leaf),
            "rank": ops.asarray(np.zeros(self.memory, dtype=np.int64)),
        }

    def training_sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(size + min(self.memory, sum(sizes[:i])) for i, size in enumerate(sizes))

    def training_data(self, scenario: Scenario, task: int, tools: Tools, state: State) -> Data:
        from sequel.scenarios import Data

        kept = tools.memory_data(state)
        return Data.concat([scenario[task].train] + ([kept] if len(kept.y) else []))

    def on_task_start(
        self, ops: Ops, params: Tree, task: int, tools: Tools, state: State
    ) -> tuple[Tree, State]:
        leaf = next(iter(params.values()))
        classes = ops.numpy(state["classes"]).copy()
        classes[list(tools.info.classes[task])] = 1.0
        return params, {**state, "classes": ops.asarray(classes, leaf)}

    def loss(
        self, ops: Ops, params: Tree, ctx: Context, state: State
    ) -> tuple[Array, dict[str, Any]]:
        logits = ctx.forward(params, ctx.batch.x)
        target = ops.one_hot(ctx.batch.y, ctx.info.n_classes, logits)
        if ctx.past != 0:
            old = ops.sigmoid(
                ops.stop_gradient(ctx.forward(state["old"], ctx.batch.x, train=False))
            )
            target = ops.where(state["old_classes"] > 0, old, target)
        each = ops.softplus(logits) - target * logits  # binary cross-entropy on logits
        return ctx.mean((each * state["classes"]).sum(-1), ctx.batch.w), {"logits": logits}

    def on_task_end(
        self, ops: Ops, params: Tree, task: int, tools: Tools, state: State
    ) -> tuple[Tree, State]:
        slots, rank = tools.slots, ops.numpy(state["rank"]).copy()
        classes = np.flatnonzero(ops.numpy(state["classes"]))
        share = max(self.memory // len(classes), 1)
        slots.clear(np.flatnonzero((slots.label >= 0) & (rank >= share)))
        data = tools.scenario[task].train
        features = tools.features(params, data.x)
        for label in np.unique(data.y).tolist():
            slots.clear(np.flatnonzero(slots.label == label))
            mine = np.flatnonzero(data.y == label)
            chosen = mine[herding(features[mine], share, normalize=self.normalize)]
            free = np.flatnonzero(slots.label < 0)[: len(chosen)]
            chosen = chosen[: len(free)]
            rank[free] = np.arange(len(free))
            slots.fill(free, data.y[chosen], task)
            state = tools.write_memory(state, free, data, chosen)
        kept, leaf = tools.memory_data(state), next(iter(params.values()))
        phi = _unit(tools.features(params, kept.x))
        means = np.zeros((tools.info.n_classes, phi.shape[1]))
        for label in np.unique(kept.y).tolist():
            means[label] = _unit(phi[kept.y == label].mean(0, keepdims=True))[0]
        return params, {
            **state,
            "old": ops.copy(params),
            "old_classes": state["classes"] * 1,
            "means": ops.asarray(means, leaf),
            "rank": ops.asarray(rank),
        }

    def predict(
        self, ops: Ops, params: Tree, model: Any, x: Array, t: Array, state: State
    ) -> Array:
        phi = model.features(params, x, False)
        phi = phi / ops.clip(ops.sqrt((phi * phi).sum(-1)), 1e-12, None)[:, None]
        means = state["means"]
        scores = 2 * phi @ means.T - (means * means).sum(-1)
        low = ops.asarray(ops.neg(scores), scores)
        return ops.where((means * means).sum(-1) > 0, scores, low)


def _unit(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    out: np.ndarray[Any, Any] = rows / np.maximum(
        np.linalg.norm(rows, axis=1, keepdims=True), 1e-12
    )
    return out
