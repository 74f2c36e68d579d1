"""The loop over epochs and steps of a task; the same for both backends."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequel.algorithms.base import Info
from sequel.backends.scaling import deterministic
from sequel.buffer import Slots
from sequel.callbacks import INNER, Callback
from sequel.engine import plan_step
from sequel.evaluation import Evaluation
from sequel.rng import stream
from sequel.scenarios import Data

__all__ = ["Training"]


class Training(Evaluation):
    """The training half of :class:`sequel.Learner`."""

    callbacks: list[Callback]
    tools: Any
    info: Info
    spec: Any
    slots: Slots | None
    pad: int
    position: dict[str, int]
    global_step: int
    losses: list[float]
    anytime: list[tuple[int, int, list[float]]]
    matrix: NDArray[np.float64]
    seed: int
    nan: str
    batch_size: int
    lr_decay: float
    min_lr: float
    reset_optimizer: bool
    eval_every: int | None
    deterministic: bool

    def emit(self, hook: str, **info: Any) -> None:
        """Call a hook of every callback."""
        for callback in self.callbacks:
            getattr(callback, hook)(self, **info)

    def reproducible(self) -> Any:
        """Return the context of deterministic kernels."""
        wanted = self.deterministic and self.backend.name == "torch"
        return deterministic(self.backend.ops.device.type if wanted else "")

    def _scale(self, task: int) -> float:
        jax = self.backend.name == "jax"
        base = self.backend.base_lr if jax else self.backend.base_lrs[0]
        if self.lr_decay == 1.0 or base is None:
            return 1.0
        return float(max(base * self.lr_decay**task, self.min_lr) / base)

    def fit_task(self, number: int, epochs: int = 1) -> NDArray[np.float64]:
        """Train on one task of the bound scenario and evaluate on all; returns the accuracies."""
        if self.scenario is None:
            raise RuntimeError("call setup(scenario) before fit_task")
        if not 0 <= number < len(self.scenario):
            raise ValueError(f"number must lie in [0, {len(self.scenario)}), got {number}")
        backend = self.backend
        fresh = self.position["task"] != number or (
            self.position["epoch"] == 0 and self.position["step"] == 0
        )
        self.start_task(number, fresh)
        self.emit("on_before_training_task", task=number, name=self.scenario[number].name)
        data = self.algorithm.training_data(self.scenario, number, self.tools, backend.state)
        backend.load(data, self.pad)
        for epoch in range(self.position["epoch"], epochs):
            self._epoch(data, number, epoch, epochs)
        return self.end_task()

    def start_task(self, number: int, fresh: bool = True) -> None:
        """Set the learning rate of a task; where it is ``fresh``, also reset the optimizer."""
        reset = fresh and self.reset_optimizer and number > 0
        self.tools.task = number
        self.backend.start_task(self._scale(number), reset)
        self.tools.lr = self.backend.lr
        if fresh:
            self.position = {"task": number, "epoch": 0, "step": 0}
            self.backend.hook("on_task_start", number, self.tools)

    def end_task(self) -> NDArray[np.float64]:
        """Consolidate the task in progress and evaluate on all; returns the accuracies.

        :meth:`fit` does it by itself. After :meth:`observe` it ends a task: Fisher information, importances and
        memories are made from the scenario's data of that task.
        """
        if self.scenario is None:
            raise RuntimeError("call setup(scenario) before end_task")
        number = self.position["task"]
        self.emit("on_consolidate", task=number)
        with self.reproducible():
            self.backend.hook("on_task_end", number, self.tools)
        self.emit("on_before_validating_algorithm_on_all_tasks", task=number)
        row = self.evaluate()
        self.emit("on_after_validating_algorithm_on_all_tasks", task=number, row=row.tolist())
        self.matrix[number] = row
        self.scenario[number].forget()
        self.position = {"task": number + 1, "epoch": 0, "step": 0}
        self.emit("on_after_training_task", task=number, row=row.tolist())
        return row

    def _epoch(self, data: Data, number: int, epoch: int, epochs: int) -> None:
        n, size = len(data), self.batch_size
        steps = -(-n // size)
        order = stream(self.seed, "order", number, epoch).permutation(n)
        keys = stream(self.seed, "noise", number, epoch).integers(
            2**32, size=(steps, 2), dtype=np.uint32
        )
        self.emit("on_before_training_epoch", task=number, epoch=epoch)
        n_tasks = self.info.n_tasks
        info = {"task": number, "tasks": n_tasks, "epoch": epoch, "epochs": epochs, "steps": steps}
        at, inner = self.position["step"], self._inner()
        while at < steps:
            block = self._block(steps - at, inner)
            parts = [
                (data, order[step * size : (step + 1) * size], (number, epoch, step), keys[step])
                for step in range(at, at + block)
            ]
            for step in range(at, at + block):
                self.emit("on_before_training_step", **info, step=step)
                if inner:
                    self.emit("on_before_backward", **info, step=step)
            emit = None
            if inner:
                emit = lambda hook, step=at: self.emit(f"on_{hook}", **info, step=step)
            losses = self.take(parts, number, emit)
            for offset, loss in enumerate(losses.tolist()):
                step = at + offset
                self.position = {"task": number, "epoch": epoch, "step": step + 1}
                if step + 1 == steps:
                    self.position = {"task": number, "epoch": epoch + 1, "step": 0}
                self.record(loss, (number, epoch, step))
                last = offset == block - 1
                self.emit("on_after_training_step", **info, step=step, loss=loss, last=last)
            at += block
            if self.eval_every and self.global_step % self.eval_every == 0:
                row = self.evaluate()
                self.anytime.append((self.global_step, number, row.tolist()))
        self.emit("on_after_training_epoch", task=number, epoch=epoch)

    def _inner(self) -> bool:
        return any(hook in dir(type(c)) for c in self.callbacks for hook in INNER)

    def _block(self, left: int, inner: bool) -> int:
        """Return the number of steps until something must happen on the host."""
        jax = self.backend.name == "jax"
        limit = self.backend.scan_steps if jax else (1 if inner else 64)
        limit = 1 if self.nan == "skip" or self.backend.careful else limit
        every = [c.every_steps for c in self.callbacks if getattr(c, "every_steps", None)]
        for n in [*every, self.eval_every]:
            if n:
                limit = min(limit, n - self.global_step % n)
        return int(min(limit, left))

    def _plan(
        self,
        data: Data,
        index: NDArray[np.int64],
        at: tuple[int, int, int],
        key: NDArray[np.uint32],
    ) -> dict[str, NDArray[Any]]:
        return plan_step(self.algorithm, self.info, self.spec, self.slots, data, index, at, key)

    def take(self, parts: list[tuple[Any, ...]], number: int, emit: Any = None) -> NDArray[Any]:
        """Plan steps (data, rows, position, key) and take them; returns the losses, NaN where skipped."""
        careful = self.nan == "skip" or self.backend.careful
        slots = self.slots if careful else None
        before = {} if slots is None else slots.state_dict()
        with self.reproducible():
            losses: NDArray[Any] = self.backend.run([self._plan(*p) for p in parts], number, emit)
        if slots is not None and (self.backend.skipped or not np.isfinite(losses).all()):
            slots.load_state_dict(before)  # what was not stored is not drawn
        return losses

    def record(self, loss: float, at: tuple[int, int, int]) -> float:
        """Note a step's loss; FloatingPointError, or a warning, where it is not finite."""
        self.losses.append(loss)
        self.global_step += 1
        if not np.isfinite(loss):
            task, epoch, step = at
            text = f"the loss is {loss} in task {task}, epoch {epoch}, step {step}"
            if self.nan == "raise":
                raise FloatingPointError(f"{text}; lower the learning rate, or pass nan='skip'")
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        return loss
