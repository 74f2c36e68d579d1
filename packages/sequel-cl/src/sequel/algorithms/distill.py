"""Learning without forgetting and less-forgetting learning: the previous model as a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sequel import _check
from sequel.algorithms.base import Algorithm, Context, Info, State, check_lam
from sequel.ops.base import Array, Ops, Tree

if TYPE_CHECKING:
    from sequel.engine import Tools

__all__ = ["LFL", "LwF"]


@dataclass(frozen=True)
class LwF(Algorithm):
    """LwF (Li & Hoiem 2016): + alpha KL(softmax(f_old/T) || softmax(f/T)) over the classes seen before.

    Args:
        alpha: weight, >= 0.
        temperature: T > 0.
        t2_scaling: multiply by T², so that the weight does not depend on T.

    >>> LwF(alpha=1.0, temperature=2.0).name
    'lwf'
    """

    alpha: float = 1.0
    temperature: float = 2.0
    t2_scaling: bool = False

    def check(self) -> None:
        _check.at_least("alpha", self.alpha, 0.0)
        _check.above("temperature", self.temperature, 0.0)

    def init(self, ops: Ops, params: Tree, info: Info) -> State:
        leaf = next(iter(params.values()))
        seen = np.zeros(info.n_classes)
        return {
            "old": ops.copy(params),
            "seen": ops.asarray(seen, leaf),
            "ready": ops.asarray(np.zeros(()), leaf),
        }

    def distillation(self, ops: Ops, old: Array, new: Array, seen: Array) -> Array:
        """Return KL(softmax(old/T) || softmax(new/T)) of every sample, over the classes in ``seen``."""
        low = ops.asarray(ops.neg(new), new)
        log_p = ops.log_softmax(ops.where(seen > 0, old / self.temperature, low))
        log_q = ops.log_softmax(ops.where(seen > 0, new / self.temperature, low))
        each = ops.where(seen > 0, ops.exp(log_p) * (log_p - log_q), 0 * log_p)
        scale = self.temperature**2 if self.t2_scaling else 1.0
        return scale * each.sum(-1)

    def loss(
        self, ops: Ops, params: Tree, ctx: Context, state: State
    ) -> tuple[Array, dict[str, Any]]:
        logits = ctx.forward(params, ctx.batch.x)
        value = ctx.mean_loss(logits, ctx.batch)
        if ctx.past == 0 or self.alpha == 0:
            return value, {"logits": logits}
        old = ops.stop_gradient(ctx.forward(state["old"], ctx.batch.x, train=False))
        kl = ctx.mean(self.distillation(ops, old, logits, state["seen"]), ctx.batch.w)
        return value + self.alpha * state["ready"] * kl, {"logits": logits}

    def on_task_end(
        self, ops: Ops, params: Tree, task: int, tools: Tools, state: State
    ) -> tuple[Tree, State]:
        seen = ops.numpy(state["seen"]).copy()
        seen[list(tools.info.classes[task])] = 1.0
        leaf = next(iter(params.values()))
        ready = ops.asarray(np.ones(()), leaf)
        return params, {"old": ops.copy(params), "seen": ops.asarray(seen, leaf), "ready": ready}


@dataclass(frozen=True)
class LFL(Algorithm):
    """LFL (Jung et al. 2016): + lam mean (φ(x; θ) - φ(x; θ*_{t-1}))², φ the encoder's output.

    Args:
        lam: weight, >= 0; the mean is over batch and features.
        freeze_classifier: from the second task on keep all parameters outside the encoder (paper);
            False trains them, as the authors of SequeL do.

    Needs a model with an encoder. The old model runs in evaluation mode, the current one keeps its mode.

    >>> LFL(lam=0.5).freeze_classifier
    True
    """

    lam: float = 1.0
    freeze_classifier: bool = True
    needs = frozenset({"features", "old_params"})

    def check(self) -> None:
        check_lam(self.lam)

    def init(self, ops: Ops, params: Tree, info: Info) -> State:
        leaf = next(iter(params.values()))
        return {"old": ops.copy(params), "ready": ops.asarray(np.zeros(()), leaf)}

    def loss(
        self, ops: Ops, params: Tree, ctx: Context, state: State
    ) -> tuple[Array, dict[str, Any]]:
        value, aux = super().loss(ops, params, ctx, state)
        if ctx.past == 0 or self.lam == 0:
            return value, aux
        old = ops.stop_gradient(ctx.features(state["old"], ctx.batch.x, train=False))
        new = ctx.features(params, ctx.batch.x)
        drift = ctx.mean(((new - old) ** 2).mean(-1), ctx.batch.w)
        return value + self.lam * state["ready"] * drift, aux

    def after_step(
        self, ops: Ops, old: Tree, new: Tree, grads: Tree, ctx: Context, state: State
    ) -> tuple[Tree, State]:
        if ctx.past == 0 or not self.freeze_classifier:
            return new, state
        encoder = ctx.model.encoder_names
        frozen = state["ready"] > 0
        kept = {
            name: leaf if name in encoder else ops.where(frozen, old[name], leaf)
            for name, leaf in new.items()
        }
        return ctx.assign(kept), state

    def on_task_end(
        self, ops: Ops, params: Tree, task: int, tools: Tools, state: State
    ) -> tuple[Tree, State]:
        leaf = next(iter(params.values()))
        return params, {"old": ops.copy(params), "ready": ops.asarray(np.ones(()), leaf)}
