"""Experience replay and dark experience replay: ER, DER, DER++."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sequel import _check
from sequel.algorithms.base import Algorithm, Batch, Context, Info, MemorySpec, State
from sequel.buffer import ONLINE
from sequel.ops.base import Array, Ops, Tree

if TYPE_CHECKING:
    from sequel.engine import Tools

__all__ = ["DER", "ER", "DERpp"]


def join(ops: Ops, a: Batch, b: Batch) -> Batch:
    """Concatenate two batches."""
    w = None
    if a.w is not None or b.w is not None:
        some = a.w if a.w is not None else b.w
        ones = [part.w if part.w is not None else ops.cast(part.y * 0 + 1, some) for part in (a, b)]
        w = ops.concat(ones)
    return Batch(ops.concat([a.x, b.x]), ops.concat([a.y, b.y]), ops.concat([a.t, b.t]), w)


@dataclass(frozen=True)
class ER(Algorithm):
    """Experience replay (Chaudhry et al. 2019, tiny episodic memories).

    Args:
        memory: total number of stored samples, >= 1.
        policy: ``"task"`` (a uniform draw from each task at its end), ``"class"`` (the same, balanced over
            classes), ``"herding"`` (needs an encoder); or online: ``"reservoir"``, ``"ring"``,
            ``"class_balanced"``, ``"gdumb"``.
        per_task: samples per task of the first three; None is memory // number of tasks.
        replay_batch: samples drawn per step, once the memory is not empty; None is the batch size.
        combine: ``"concat"`` (one mean over batch and draw) or ``"sum"`` (two means).

    >>> ER(memory=100, policy="reservoir").combine
    'concat'
    """

    memory: int = 1000
    policy: str = "task"
    per_task: int | None = None
    replay_batch: int | None = None
    combine: str = "concat"

    def check(self) -> None:
        _check.count("memory", self.memory)
        _check.one_of("policy", self.policy, ("task", "class", "herding", *ONLINE))
        _check.one_of("combine", self.combine, ("concat", "sum"))
        for name in ("per_task", "replay_batch"):
            if getattr(self, name) is not None:
                _check.count(name, getattr(self, name))

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Herding needs features."""
        return frozenset({"features"} if self.policy == "herding" else ())

    def rows_per_task(self, info: Info) -> int:
        """Return how many samples of each task are kept."""
        return self.per_task or max(self.memory // info.n_tasks, 1)

    def memory_spec(self, info: Info) -> MemorySpec:
        size = self.replay_batch or info.batch_size
        if self.policy in ONLINE:
            return MemorySpec(self.memory, self.policy, 1, size)
        return MemorySpec(self.rows_per_task(info) * info.n_tasks, "manual", 1, size)

    def loss(
        self, ops: Ops, params: Tree, ctx: Context, state: State
    ) -> tuple[Array, dict[str, Any]]:
        if not ctx.replays:
            return super().loss(ops, params, ctx, state)
        replay = ctx.replays[0]
        if self.combine == "sum":
            value, aux = super().loss(ops, params, ctx, state)
            return value + ctx.loss(params, replay), aux
        both = join(ops, ctx.batch, replay)
        logits = ctx.forward(params, both.x)
        value = ctx.mean_loss(logits, both)
        return value, {"logits": logits[: len(ctx.batch.y)]}

    def on_task_end(
        self, ops: Ops, params: Tree, task: int, tools: Tools, state: State
    ) -> tuple[Tree, State]:
        if self.policy not in ONLINE:
            rows = self.rows_per_task(tools.info)
            state = tools.fill_memory(state, task, rows, self.policy, params)
        return params, state


@dataclass(frozen=True)
class DER(Algorithm):
    """Dark experience replay (Buzzega et al. 2020): replay the logits that the model once gave.

    CE(f(x), y) + alpha mean (f(x') - z')², z' the raw logits stored before the update of their step; a
    reservoir holds (x, y, z).

    Args:
        memory: number of stored samples, >= 1.
        alpha: weight, >= 0 (Buzzega: 0.1 to 0.5).
        replay_batch: samples per draw; None is the batch size.
        from_step: replay as soon as the memory is ``"nonempty"`` (reference) or in the ``"second_task"``.

    >>> DER(memory=200, alpha=0.3).from_step
    'nonempty'
    """

    memory: int = 1000
    alpha: float = 0.5
    replay_batch: int | None = None
    from_step: str = "nonempty"

    def check(self) -> None:
        _check.count("memory", self.memory)
        _check.at_least("alpha", self.alpha, 0.0)
        _check.one_of("from_step", self.from_step, ("nonempty", "second_task"))
        if self.replay_batch is not None:
            _check.count("replay_batch", self.replay_batch)

    def memory_spec(self, info: Info) -> MemorySpec:
        size = self.replay_batch or info.batch_size
        return MemorySpec(self.memory, "reservoir", 1, size, logits=True)

    def loss(
        self, ops: Ops, params: Tree, ctx: Context, state: State
    ) -> tuple[Array, dict[str, Any]]:
        value, aux = super().loss(ops, params, ctx, state)
        if not ctx.replays or self.alpha == 0:
            return value, aux
        replay = ctx.replays[0]
        new = ctx.forward(params, replay.x)
        far = ((new - replay.logits) ** 2).mean(-1)
        return value + self.alpha * self.gate(ctx) * ctx.mean(far, replay.w), aux

    def gate(self, ctx: Context) -> Any:
        """Return 0 while replay has not begun."""
        return 1.0 if self.from_step == "nonempty" else (ctx.task > 0) * 1.0


@dataclass(frozen=True)
class DERpp(DER):
    """DER++ (Buzzega et al. 2020): DER + beta CE(f(x''), y'') on a second, independent draw.

    >>> DERpp(memory=200, alpha=0.5, beta=0.5).beta
    0.5
    """

    beta: float = 0.5

    def check(self) -> None:
        super().check()
        _check.at_least("beta", self.beta, 0.0)

    def memory_spec(self, info: Info) -> MemorySpec:
        size = self.replay_batch or info.batch_size
        return MemorySpec(self.memory, "reservoir", 2, size, logits=True)

    def loss(
        self, ops: Ops, params: Tree, ctx: Context, state: State
    ) -> tuple[Array, dict[str, Any]]:
        value, aux = super().loss(ops, params, ctx, state)
        if not ctx.replays or self.beta == 0:
            return value, aux
        return value + self.beta * self.gate(ctx) * ctx.loss(params, ctx.replays[1]), aux
