"""What an algorithm is: frozen hyper-parameters and pure functions of (parameters, context, state).

An algorithm holds no arrays. All of them live in ``state``, a dict of arrays and of dicts of arrays, which
is handed in and returned. So a compiled step can never contain a stale anchor, a checkpoint is complete,
and the same code runs under PyTorch and JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sequel import _check
from sequel.ops.base import Array, Ops, Tree

if TYPE_CHECKING:
    from sequel.engine import Tools
    from sequel.scenarios import Data, Scenario

State = dict[str, Any]

__all__ = ["Algorithm", "Batch", "Context", "Info", "MemorySpec", "State"]


@dataclass
class Batch:
    """Inputs x, labels y, tasks t, weights w (None: all one) and, from a memory, stored logits."""

    x: Array
    y: Array
    t: Array
    w: Array | None = None
    logits: Array | None = None

    @staticmethod
    def rows(ops: Ops, data: dict[str, Array], index: Array, w: Array | None = None) -> Batch:
        """Gather rows of ``{"x", "y", "t"[, "logits"]}``."""
        logits = ops.take(data["logits"], index) if "logits" in data else None
        x, y, t = (ops.take(data[key], index) for key in ("x", "y", "t"))
        return Batch(x, y, t, w, logits)


@dataclass(frozen=True)
class Info:
    """What is known of a run before it starts."""

    n_tasks: int
    n_classes: int
    batch_size: int
    seed: int
    x_shape: tuple[int, ...]
    x_dtype: str
    train_sizes: tuple[int, ...]
    classes: tuple[tuple[int, ...], ...]
    feature_dim: int = 0


@dataclass(frozen=True)
class MemorySpec:
    """A replay memory: rows, policy, extra fields, draws per step and their size."""

    capacity: int
    policy: str  # of sequel.buffer.Slots; "manual" is filled at the end of tasks
    draws: int = 0
    draw_size: int = 0
    logits: bool = False
    first_epoch_only: bool = False


@dataclass
class Context:
    """One step's inputs and the functions that an algorithm may call.

    ``task`` is an int under PyTorch and a traced scalar under JAX; ``past`` is the number of finished
    tasks where it is known outside the trace (PyTorch), else None. Where ``update`` is given, the optimizer's
    step is ``scale * tree`` with ``tree, scale = update()`` after it, and nobody need keep the old parameters.
    """

    ops: Ops
    model: Any
    batch: Batch
    replays: tuple[Batch, ...]
    task: Any
    past: int | None
    lr: Any
    extra: dict[str, Array]
    mask: Array | None
    pointwise: Callable[[Ops, Array, Array], Array]
    apply: Callable[[Tree, Tree], Tree]
    assign: Callable[[Tree], Tree]
    info: Info
    grad_clip: float | None = None
    total_grads: Tree = field(default_factory=dict)
    update: Callable[[], tuple[Tree, float]] | None = None

    def forward(self, params: Tree, x: Array, *, train: bool = True) -> Array:
        """Return the model's raw logits."""
        return self.model.forward(params, x, train)

    def features(self, params: Tree, x: Array, *, train: bool = True) -> Array:
        """Return the encoder's output, flattened to (B, d)."""
        return self.model.features(params, x, train)

    def masked(self, logits: Array, t: Array) -> Array:
        """Hide the logits of other tasks' classes (task-incremental scenarios only)."""
        if self.mask is None:
            return logits
        allowed = self.ops.take(self.mask, t)
        return self.ops.where(allowed, logits, self.ops.asarray(self.ops.neg(logits), logits))

    def mean(self, values: Array, w: Array | None) -> Array:
        """Return the mean of per-sample values over the samples of weight one."""
        if w is None:
            return values.mean()
        return (values * w).sum() / self.ops.clip(w.sum(), 1.0, None)

    def point_losses(self, logits: Array, batch: Batch) -> Array:
        """Return the loss of every sample, the mask applied."""
        return self.pointwise(self.ops, self.masked(logits, batch.t), batch.y)

    def mean_loss(self, logits: Array, batch: Batch) -> Array:
        """Return the mean of :meth:`point_losses` over the samples of weight one."""
        if batch.w is None and self.pointwise is cross_entropy:
            return self.ops.mean_nll(self.masked(logits, batch.t), batch.y)
        return self.mean(self.point_losses(logits, batch), batch.w)

    def loss(self, params: Tree, batch: Batch, *, train: bool = True) -> Array:
        """Return the mean loss of a batch."""
        return self.mean_loss(self.forward(params, batch.x, train=train), batch)


def clip_by_norm(ops: Ops, grads: Tree, limit: float | None) -> tuple[Tree, Any]:
    """Scale a gradient to at most the given global norm; returns it with the factor."""
    if limit is None:
        return grads, 1.0
    norm = ops.sqrt(ops.dot(grads, grads))
    factor = ops.clip(limit / (norm + 1e-6), None, 1.0)
    return ops.map(lambda g: g * factor, grads), factor


class Algorithm:
    """Base of all algorithms, and itself fine-tuning without any. Subclass as a frozen dataclass.

    ``needs`` says what the trainer prepares: ``"old_params"`` (the parameters before the step, for
    :meth:`after_step`), ``"task_grads"`` (the loss's own gradients there, which a penalty may not be
    added to in place), ``"features"`` (a model with an encoder) and
    ``"task_wise"`` (a batch in evaluation holds one task only).
    """

    needs: frozenset[str] = frozenset()
    clip: str = "after"

    # ------------------------------------------------------------ preparation
    def check(self) -> None:
        """Check the hyper-parameters; called by ``__post_init__``."""

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            if isinstance(value, np.generic):  # a checkpoint compares reprs
                object.__setattr__(self, name, value.item())
        self.check()

    def memory_spec(self, info: Info) -> MemorySpec | None:
        """Return the replay memory that the trainer keeps in ``state["memory"]``."""
        return None

    def init(self, ops: Ops, params: Tree, info: Info) -> State:
        """Return the initial state; shapes and dtypes never change afterwards."""
        return {}

    def extra_params(self, info: Info) -> dict[str, np.ndarray[Any, Any]]:
        """Return trainable parameters of the algorithm's own; their names start with ``algo/``."""
        return {}

    def host_plan(
        self, rng: np.random.Generator, n: int, info: Info
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Return random numbers of fixed shape for one step on n samples; ``ctx.extra`` holds them."""
        return {}

    def training_data(self, scenario: Scenario, task: int, tools: Tools, state: State) -> Data:
        """Return what task ``task`` trains on."""
        data: Data = scenario[task].train
        return data

    def training_sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Return an upper bound of the number of samples that each task trains on."""
        return sizes

    # ------------------------------------------------------------------ steps
    def loss(
        self, ops: Ops, params: Tree, ctx: Context, state: State
    ) -> tuple[Array, dict[str, Any]]:
        """Return the loss to differentiate, and ``{"logits": ...}`` of the batch where it has them."""
        logits = ctx.forward(params, ctx.batch.x)
        value = ctx.mean_loss(logits, ctx.batch)
        return value, {"logits": logits}

    def grads(self, ops: Ops, grads: Tree, params: Tree, ctx: Context, state: State) -> Tree:
        """Return the gradient to use: projections, closed-form penalties."""
        return grads

    def after_step(
        self, ops: Ops, old: Tree, new: Tree, grads: Tree, ctx: Context, state: State
    ) -> tuple[Tree, State]:
        """Return parameters and state after the optimizer's step; ``grads`` are the loss's own."""
        return new, state

    def keeps_old(self, ctx: Context) -> bool:
        """Tell whether :meth:`after_step` looks at the parameters before the step."""
        return "old_params" in self.needs

    def step(
        self, ops: Ops, params: Tree, ctx: Context, state: State
    ) -> tuple[Tree, State, Array, dict[str, Any]]:
        """One training step: gradient, :meth:`grads`, clipping, optimizer, :meth:`after_step`."""
        (value, aux), own = ops.value_and_grad(lambda p: self.loss(ops, p, ctx, state), params)
        if self.clip == "before":
            own, _ = clip_by_norm(ops, own, ctx.grad_clip)
        total = self.grads(ops, own, params, ctx, state)
        if self.clip == "after" and ctx.grad_clip is not None:
            total, factor = clip_by_norm(ops, total, ctx.grad_clip)
            own = ops.map(lambda g: g * factor, own)
        ctx.total_grads = total
        old = ops.copy(params) if self.keeps_old(ctx) else params
        new = ctx.apply(params, total)
        new, state = self.after_step(ops, old, new, own, ctx, state)
        return new, state, value, aux

    # ------------------------------------------------------------------ tasks
    def on_task_start(
        self, ops: Ops, params: Tree, task: int, tools: Tools, state: State
    ) -> tuple[Tree, State]:
        """Called before the first step of a task."""
        return params, state

    def on_task_end(
        self, ops: Ops, params: Tree, task: int, tools: Tools, state: State
    ) -> tuple[Tree, State]:
        """Called after the last step of a task: Fisher information, memories, copies of the model."""
        return params, state

    # ------------------------------------------------------------- evaluation
    def eval_params(self, ops: Ops, params: Tree, state: State) -> Tree:
        """Return the parameters with which the model is evaluated."""
        return params

    def predict(
        self, ops: Ops, params: Tree, model: Any, x: Array, t: Array, state: State
    ) -> Array:
        """Return class scores (B, C); the task's mask is applied afterwards."""
        return model.forward(params, x, False)

    # ------------------------------------------------------------------ names
    @property
    def name(self) -> str:
        """The class name in lower case."""
        return type(self).__name__.lower()


def cross_entropy(ops: Ops, logits: Array, y: Array) -> Array:
    """Return the cross-entropy of every sample."""
    return ops.nll(logits, y)


def check_lam(lam: float) -> None:
    """lam is a finite number >= 0."""
    _check.at_least("lam", lam, 0.0)
