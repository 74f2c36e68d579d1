"""Online use of a learner: one step on a batch that the caller brings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sequel.rng import stream
from sequel.scenarios import Data
from sequel.scenarios.core import labels

if TYPE_CHECKING:
    from sequel.learner import Learner

__all__ = ["observe"]


def observe(learner: Learner, x: Any, y: Any, task: int | None = None) -> float:
    """Take one step; see :meth:`sequel.Learner.observe`."""
    scenario = learner.scenario
    if scenario is None:
        raise RuntimeError("call setup(scenario) before observe")
    if task is None and scenario.kind == "task":
        raise ValueError("task must be given: the scenario is task-incremental")
    number, n = learner.position["task"] if task is None else int(task), len(scenario)
    if not learner.position["task"] <= number < n:
        raise ValueError(
            f"task must lie in [{learner.position['task']}, {n}), as tasks come in order, got {number}"
        )
    x, y = np.asarray(x), labels("y", y, scenario.n_classes)
    if len(y) > learner.batch_size:
        raise ValueError(f"observe takes at most batch_size={learner.batch_size}, got {len(y)}")
    if number != learner.position["task"] and learner.position["step"] > 0:
        learner.end_task()
    if number != learner.position["task"] or learner.position["step"] == 0:
        learner.start_task(number)
    data = Data(x, y, np.full(len(y), number, dtype=np.int64))
    step = learner.position["step"]
    key = stream(learner.seed, "noise", number, 0, step).integers(2**32, size=2, dtype=np.uint32)
    learner.backend.load(data, learner.batch_size)
    loss = float(learner.take([(data, np.arange(len(y)), (number, 0, step), key)], number)[0])
    learner.position["step"] += 1
    return learner.record(loss, (number, 0, step))
