"""One training step, and the tools that an algorithm has at a task's start and end; backend-free."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from sequel.algorithms.base import Algorithm, Batch, Context, Info, MemorySpec, State
from sequel.buffer import Slots
from sequel.functional import herding
from sequel.ops.base import Array, Ops, Tree
from sequel.rng import stream
from sequel.scenarios import Data

if TYPE_CHECKING:
    from sequel.scenarios import Scenario

__all__ = ["Tools", "empty_memory", "one_step", "plan_step"]


def one_step(
    algorithm: Algorithm,
    ops: Ops,
    model: Any,
    data: dict[str, Array],
    plan: dict[str, Array],
    params: Tree,
    state: State,
    spec: MemorySpec | None,
    **context: Any,
) -> tuple[Tree, State, Array]:
    """Gather the batch and the replay draws, let the algorithm step, insert into the memory.

    ``plan`` holds the step's indices (``idx``, ``replay0`` ..., ``slots``), weights of padded rows (``w``,
    ``rw0`` ...) where the backend pads, and the algorithm's own numbers (``extra/...``).
    """
    batch = Batch.rows(ops, data, plan["idx"], plan.get("w"))
    replays = [
        Batch.rows(ops, state["memory"], plan[f"replay{i}"], plan.get(f"rw{i}"))
        for i in range(spec.draws if spec else 0)
        if f"replay{i}" in plan
    ]
    extra = {key[6:]: value for key, value in plan.items() if key.startswith("extra/")}
    ctx = Context(ops, model, batch, tuple(replays), extra=extra, **context)
    params, state, value, aux = algorithm.step(ops, params, ctx, state)
    if "slots" in plan:
        items = {"x": batch.x, "y": batch.y, "t": batch.t}
        if spec and spec.logits:
            items["logits"] = ops.stop_gradient(aux["logits"])
        memory = dict(state["memory"])
        for key, values in items.items():
            memory[key] = ops.scatter(memory[key], plan["slots"], values)
        state = {**state, "memory": memory}
    return params, state, value


def plan_step(
    algorithm: Algorithm,
    info: Info,
    spec: MemorySpec | None,
    slots: Slots | None,
    data: Data,
    index: np.ndarray[Any, Any],
    position: tuple[int, int, int],
    key: np.ndarray[Any, Any],
) -> dict[str, np.ndarray[Any, Any]]:
    """Return all of a step's random choices: batch, replay rows, memory slots, the algorithm's own."""
    task, epoch, _ = position
    plan = {"idx": index, "key": key}
    if spec is not None and slots is not None:
        if spec.draws and len(slots):
            rng = stream(info.seed, "replay", *position)
            for i in range(spec.draws):
                plan[f"replay{i}"] = slots.sample(spec.draw_size, rng)
        if spec.policy != "manual" and not (spec.first_epoch_only and epoch > 0):
            plan["slots"] = slots.add(data.y[index], task)
    if type(algorithm).host_plan is not Algorithm.host_plan:
        rng = stream(info.seed, "algorithm", *position)
        for name, value in algorithm.host_plan(rng, len(index), info).items():
            plan[f"extra/{name}"] = value
    return plan


def empty_memory(ops: Ops, spec: MemorySpec, info: Info, like: Array) -> dict[str, Array]:
    """Allocate a replay memory: x in its source dtype, y, t and logits."""
    n = spec.capacity
    out = {
        "x": ops.asarray(np.zeros((n, *info.x_shape), dtype=info.x_dtype)),
        "y": ops.asarray(np.zeros(n, dtype=np.int64)),
        "t": ops.asarray(np.zeros(n, dtype=np.int64)),
    }
    if spec.logits:
        out["logits"] = ops.asarray(np.zeros((n, info.n_classes)), like)
    return out


class Tools:
    """What :meth:`Algorithm.on_task_start` and :meth:`Algorithm.on_task_end` may use."""

    def __init__(
        self,
        ops: Ops,
        model: Any,
        info: Info,
        scenario: Scenario,
        mask: Array | None,
        pointwise: Callable[[Ops, Array, Array], Array],
        slots: Slots | None,
        make_sums: Callable[..., Callable[..., Tree]],
    ) -> None:
        self.ops, self.model, self.info, self.scenario = ops, model, info, scenario
        self.mask, self.pointwise, self._slots = mask, pointwise, slots
        self._make_sums = make_sums
        self._compiled: dict[Any, Any] = {}
        self.task = 0
        self.lr: float | None = None
        self.warned = False

    @property
    def slots(self) -> Slots:
        """The bookkeeping of the replay memory."""
        if self._slots is None:
            raise RuntimeError("the algorithm has no memory: define memory_spec")
        return self._slots

    def jit(self, key: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function once per run and key; its arrays must all be arguments."""
        if key not in self._compiled:
            self._compiled[key] = self.ops.jit(fn)
        found: Callable[..., Any] = self._compiled[key]
        return found

    def masked(self, logits: Array, t: Array) -> Array:
        """Hide other tasks' logits, see :meth:`Context.masked`."""
        if self.mask is None:
            return logits
        low = self.ops.asarray(self.ops.neg(logits), logits)
        return self.ops.where(self.ops.take(self.mask, t), logits, low)

    def point_losses(self, params: Tree, batch: Batch, *, train: bool = False) -> Array:
        """Return the loss of every sample."""
        logits = self.masked(self.model.forward(params, batch.x, train), batch.t)
        return self.pointwise(self.ops, logits, batch.y)

    def fisher(
        self,
        params: Tree,
        kind: str,
        *,
        n_samples: int | None = None,
        temperature: float = 1.0,
        chunk: int = 128,
    ) -> Tree:
        """Return the mean squared (or absolute) per-sample gradients on the current task's data."""
        ops, data = self.ops, self.scenario[self.task].train
        if n_samples is not None and n_samples < len(data):
            rng = stream(self.info.seed, "fisher-subset", self.task)
            data = data[np.sort(rng.choice(len(data), size=n_samples, replace=False))]
        per_batch = kind in ("batch", "output_batch")
        chunk = self.info.batch_size if per_batch else min(chunk, max(self.info.train_sizes))
        key = (kind, temperature, chunk)
        if key not in self._compiled:
            self._compiled[key] = self._make_sums(kind, temperature)
        sums, leaf = self._compiled[key], next(iter(params.values()))
        u = stream(self.info.seed, "fisher-labels", self.task).random(len(data))
        total = ops.wide(ops.zeros_like(ops.copy(params)))
        count = 0
        for at in range(0, len(data), chunk):
            part = data[np.arange(at, min(at + chunk, len(data)))]
            n = len(part)
            pad = chunk - n if ops.name == "jax" else 0
            rows = np.concatenate([np.arange(n), np.zeros(pad, dtype=np.int64)])
            w = np.concatenate([np.ones(n), np.zeros(pad)])
            host = (part.x[rows], part.y[rows], part.t[rows], w, u[at : at + n][rows])
            x, y, t, w_, u_ = (
                ops.asarray(v, leaf if np.asarray(v).dtype == np.float64 else None) for v in host
            )
            found = sums(params, x, y, t, w_, u_)
            total = ops.map(lambda a, b: a + b, total, found)
            count += 1 if per_batch else n
        if not all(bool(ops.isfinite(leaf).all()) for leaf in total.values()):
            raise FloatingPointError(
                f"the importances of task {self.task} are not finite: its inputs or the parameters hold "
                "NaN, or the gradients overflow"
            )
        return ops.map(lambda a: a / count, total)

    def features(self, params: Tree, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the encoder's outputs (N, d) on the host, in evaluation mode."""
        run = self.jit("features", lambda p, v: self.model.features(p, v, False))
        out, chunk = [], 256
        for at in range(0, len(x), chunk):
            part = x[at : at + chunk]
            n = len(part)
            if self.ops.name == "jax" and n < chunk:  # one compilation
                part = np.concatenate([part, np.repeat(part[:1], chunk - n, axis=0)])
            out.append(self.ops.numpy(run(params, self.ops.asarray(part)))[:n])
        return np.concatenate(out).astype(np.float64)

    # ----------------------------------------------------------------- memory
    def fill_memory(
        self, state: State, task: int, rows_per_task: int, policy: str, params: Tree
    ) -> State:
        """Put samples of a finished task into its rows: ``"task"`` (uniform), ``"class"`` or ``"herding"``."""
        data = self.scenario[task].train
        if rows_per_task > len(data):
            warnings.warn(
                f"a memory of {rows_per_task} samples per task is larger than task {task} "
                f"({len(data)} samples): it keeps them all",
                UserWarning,
                stacklevel=2,
            )
        n = min(rows_per_task, len(data))
        order = stream(self.info.seed, "memory", task).permutation(len(data))
        if policy == "task":
            chosen = order[:n]
        else:
            ranked = []
            labels = np.unique(data.y).tolist()
            share = -(-n // len(labels))
            for label in labels:
                mine = order[data.y[order] == label]
                if policy == "herding":
                    mine = np.sort(mine)
                    mine = mine[herding(self.features(params, data.x[mine]), share)]
                ranked += [(rank, label, i) for rank, i in enumerate(mine[:share].tolist())]
            chosen = np.array([i for _, _, i in sorted(ranked)][:n], dtype=np.int64)
        rows = task * rows_per_task + np.arange(len(chosen))
        self.slots.fill(rows, data.y[chosen], task)
        return self.write_memory(state, rows, data, chosen)

    def write_memory(
        self,
        state: State,
        rows: np.ndarray[Any, Any],
        data: Data,
        chosen: np.ndarray[Any, Any],
    ) -> State:
        """Copy samples of ``data`` into rows of ``state["memory"]``."""
        memory = dict(state["memory"])
        where = self.ops.asarray(rows)
        for key, values in (("x", data.x), ("y", data.y), ("t", data.t)):
            memory[key] = self.ops.scatter(memory[key], where, self.ops.asarray(values[chosen]))
        return {**state, "memory": memory}

    def memory_data(self, state: State) -> Data:
        """Return the memory's items on the host."""
        rows = self.slots.rows
        host = (self.ops.numpy(state["memory"][key])[rows] for key in ("x", "y", "t"))
        x, y, t = host
        return Data(x, y.astype(np.int64), t.astype(np.int64))
