"""Look-ahead MAML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sequel import _check
from sequel.algorithms.base import Algorithm, Batch, Context, Info, MemorySpec, State, clip_by_norm
from sequel.algorithms.replay import join
from sequel.ops.base import Array, Ops, Tree

__all__ = ["LaMAML"]


@dataclass(frozen=True)
class LaMAML(Algorithm):
    """La-MAML (Gupta, Yadav, Paull 2020): learn per-parameter rates while looking ahead.

    Each batch is passed ``glances`` times. From θ_0 = θ, chunk j of a permutation makes
    θ_j = θ_{j-1} - relu(a) g_j, g_j the gradient clamped to ±clip_inner; the meta loss is the mean over j of the
    loss of θ_j on batch and replay draw. Its gradient moves the rates a (step ``alpha_lr``) and then
    θ <- θ - relu(a) grad, or by plain SGD where ``sync_update``. The Learner's optimizer is not used.

    Args:
        memory: reservoir size, filled in each task's first epoch.
        glances, inner_batch: passes per batch, samples per inner step (1 in the authors' code).
        alpha_init, alpha_lr: initial rates and their learning rate.
        lr: of ``sync_update=True``.
        clip_inner, clip_norm: clamp of inner gradients, largest norm of each meta gradient.
        second_order: differentiate through the inner gradients.

    >>> LaMAML().glances
    5
    """

    memory: int = 200
    glances: int = 5
    inner_batch: int = 1
    alpha_init: float = 0.15
    alpha_lr: float = 0.3
    lr: float = 0.1
    clip_inner: float = 2.0
    clip_norm: float = 2.0
    second_order: bool = False
    sync_update: bool = False

    def check(self) -> None:
        for name in ("memory", "glances", "inner_batch"):
            _check.count(name, getattr(self, name))
        for name in ("alpha_init", "alpha_lr", "lr", "clip_inner", "clip_norm"):
            _check.above(name, getattr(self, name), 0.0)

    def memory_spec(self, info: Info) -> MemorySpec:
        return MemorySpec(
            self.memory, "reservoir", self.glances, info.batch_size, first_epoch_only=True
        )

    def init(self, ops: Ops, params: Tree, info: Info) -> State:
        return {"alpha": ops.map(lambda p: p * 0 + self.alpha_init, ops.copy(params))}

    def host_plan(
        self, rng: np.random.Generator, n: int, info: Info
    ) -> dict[str, np.ndarray[Any, Any]]:
        order = np.tile(np.arange(info.batch_size), (self.glances, 1))
        for row in order:
            row[:n] = rng.permutation(n)
        return {"order": order}

    def step(
        self, ops: Ops, params: Tree, ctx: Context, state: State
    ) -> tuple[Tree, State, Array, dict[str, Any]]:
        theta, alpha = ops.copy(params), state["alpha"]
        value: Array = None
        for glance in range(self.glances):
            order = ctx.extra["order"][glance][: len(ctx.batch.y)]
            replay = ctx.replays[glance] if ctx.replays else None
            both = {f"p/{k}": v for k, v in theta.items()} | {f"a/{k}": v for k, v in alpha.items()}

            def meta(
                tree: Tree, order: Array = order, replay: Batch | None = replay
            ) -> tuple[Array, None]:
                return self._meta(ops, tree, ctx, order, replay), None

            (value, _), slope = ops.value_and_grad(meta, both)
            d_theta = {k[2:]: v for k, v in slope.items() if k.startswith("p/")}
            d_alpha = {k[2:]: v for k, v in slope.items() if k.startswith("a/")}
            d_theta, _ = clip_by_norm(ops, d_theta, self.clip_norm)
            d_alpha, _ = clip_by_norm(ops, d_alpha, self.clip_norm)
            alpha = ops.add_scaled(alpha, d_alpha, -self.alpha_lr)
            if self.sync_update:
                theta = ops.add_scaled(theta, d_theta, -self.lr)
            else:
                theta = ops.map(lambda p, a, g: p - ops.relu(a) * g, theta, alpha, d_theta)
        return ctx.assign(theta), {**state, "alpha": alpha}, value, {}

    def _meta(
        self, ops: Ops, tree: Tree, ctx: Context, order: Array, replay: Batch | None
    ) -> Array:
        fast = {k[2:]: v for k, v in tree.items() if k.startswith("p/")}
        alpha = {k[2:]: v for k, v in tree.items() if k.startswith("a/")}
        b = ctx.batch
        w = None if b.w is None else ops.take(b.w, order)
        shuffled = Batch.rows(ops, {"x": b.x, "y": b.y, "t": b.t}, order, w)
        whole = b if replay is None else join(ops, b, replay)
        total, number = 0.0, 0.0
        for at in range(0, len(b.y), self.inner_batch):
            cut = slice(at, at + self.inner_batch)
            chunk = Batch(
                shuffled.x[cut],
                shuffled.y[cut],
                shuffled.t[cut],
                None if shuffled.w is None else shuffled.w[cut],
            )
            start = fast if self.second_order else ops.stop_gradient(fast)
            g = ops.grad(
                lambda p, chunk=chunk: ctx.loss(p, chunk),  # type: ignore[misc]
                start,
                create_graph=self.second_order,
            )
            fast = ops.map(
                lambda p, a, d: p - ops.relu(a) * ops.clip(d, -self.clip_inner, self.clip_inner),
                fast,
                alpha,
                g,
            )
            present = 1.0 if chunk.w is None else chunk.w.max()
            total = total + present * ctx.loss(fast, whole)
            number = number + present
        return total / number
