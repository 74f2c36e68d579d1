"""Callbacks: hooks that see host values only."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sequel import _check

if TYPE_CHECKING:
    from sequel.learner import Learner

__all__ = ["HOOKS", "Callback", "Checkpoint", "Progress"]

_PAIRED = (
    "setup",
    "fit",
    "training_task",
    "training_epoch",
    "training_step",
    "backward",
    "optimizer_step",
    "val_epoch",
    "val_step",
    "validating_algorithm_on_all_tasks",
    "teardown",
)
HOOKS = (
    *tuple(f"on_{w}_{h}" for h in _PAIRED for w in ("before", "after")),
    "on_checkpoint",
    "on_resume",
    "on_consolidate",
)
INNER = tuple(f"on_{w}_{h}" for h in ("backward", "optimizer_step") for w in ("before", "after"))


class Callback:
    """Base of all callbacks: define any of the hooks ``on_before_...`` and ``on_after_...``.

    Each is called as ``hook(learner, **info)`` with host values: ``task``, ``epoch``, ``step``, ``loss``,
    ``row``. Steps run in blocks on the device; step hooks are called block by block, in order. A callback
    with a hook around backward or optimizer_step makes PyTorch's blocks one step long; a compiled JAX step has
    no such moments, and the hooks are called with its block.

    >>> class Losses(Callback):
    ...     def on_after_training_step(self, learner, **info):
    ...         print(info["loss"])
    """

    def __getattr__(self, name: str) -> Any:
        if name in HOOKS:
            return _nothing
        raise AttributeError(name)


def _nothing(learner: Any, **info: Any) -> None:
    return None


class Checkpoint(Callback):
    """Save the run in ``folder`` and let ``fit`` resume from there.

    Args:
        folder: where the files go; the newest valid one is loaded when ``fit`` starts.
        every_steps: steps between files; one is also written at each task's end.
        keep: number of files kept.
        best: also keep ``best.safetensors``, of the task after which the mean accuracy on the tasks so far was
            highest; its header has that accuracy as ``"best"``.

    >>> Checkpoint("runs/a", every_steps=200).keep
    2
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every_steps: int | None = None,
        keep: int = 2,
        best: bool = False,
    ) -> None:
        if every_steps is not None:
            _check.count("every_steps", every_steps)
        _check.count("keep", keep)
        self.folder, self.every_steps, self.keep = Path(folder), every_steps, keep
        self.best = best

    def on_after_setup(self, learner: Learner, **info: Any) -> None:
        """Resume from the newest valid file."""
        from sequel.checkpoint import load_latest

        found = load_latest(self.folder)
        if found is not None:
            learner.restore(*found)

    def on_after_training_step(self, learner: Learner, **info: Any) -> None:
        """Save where a block ends on a multiple of ``every_steps``."""
        if self.every_steps and info["last"] and learner.global_step % self.every_steps == 0:
            self._save(learner)

    def on_after_training_task(self, learner: Learner, **info: Any) -> None:
        """Save the finished task, and the best one so far."""
        self._save(learner)
        if self.best:
            self._save_best(learner, info["row"][: info["task"] + 1])

    def _save_best(self, learner: Learner, seen: list[float]) -> None:
        from sequel.checkpoint import read, write

        path, mean = self.folder / "best.safetensors", sum(seen) / len(seen)
        if path.exists():
            try:
                if mean <= float(read(path)[1]["best"]):
                    return
            except RuntimeError as error:
                warnings.warn(f"{error}; it is replaced", RuntimeWarning, stacklevel=2)
        tree, header = learner.state_dict()
        write(path, tree, {**header, "best": mean})

    def _save(self, learner: Learner) -> None:
        from sequel.checkpoint import prune

        name = f"step-{learner.global_step:09d}-{learner.position['task']:03d}.safetensors"
        learner.save(self.folder / name)
        prune(self.folder, self.keep)
        learner.emit("on_checkpoint", path=str(self.folder / name))


class Progress(Callback):
    """A line per task on stderr, with a bar of its steps.

    >>> Progress().width
    30
    """

    def __init__(self, stream: Any = None, width: int = 30) -> None:
        self.stream, self.width = stream, width
        self._shown = -1

    def on_after_training_step(self, learner: Learner, **info: Any) -> None:
        """Redraw the bar where it grows."""
        done = (info["epoch"] * info["steps"] + info["step"] + 1) / (info["epochs"] * info["steps"])
        filled = int(done * self.width)
        if filled != self._shown:
            self._shown = filled
            bar = "#" * filled + "." * (self.width - filled)
            text = f"\rtask {info['task'] + 1}/{info['tasks']} [{bar}] loss {info['loss']:.4f}"
            print(text, end="", file=self.stream or sys.stderr, flush=True)

    def on_after_training_task(self, learner: Learner, **info: Any) -> None:
        """Finish the line."""
        seen = info["row"][: info["task"] + 1]
        print(f"  accuracy {sum(seen) / len(seen):.3f}", file=self.stream or sys.stderr)
        self._shown = -1
