"""What all loggers share: the names of the values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sequel import metrics
from sequel.callbacks import Callback

if TYPE_CHECKING:
    from sequel.learner import Learner

__all__ = ["Logger"]


class Logger(Callback):
    """Base of the loggers: subclasses write a dict of values at a step."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record values."""
        raise NotImplementedError

    def on_after_training_step(self, learner: Learner, **info: Any) -> None:
        """Record the loss."""
        self.write(learner.global_step, {"train/loss": info["loss"]})

    def on_after_training_task(self, learner: Learner, **info: Any) -> None:
        """Record the accuracies after a task."""
        seen = info["task"] + 1
        R = learner.matrix[:seen, :seen]
        values = {f"val/acc/task-{j}": float(a) for j, a in enumerate(info["row"])}
        values["avg/acc"] = metrics.acc(R)
        values["avg/forgetting"] = metrics.forgetting(R)
        self.write(learner.global_step, values)
