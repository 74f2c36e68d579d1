"""What a learner does with a trained model: scores and accuracies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sequel.scenarios import Data, Scenario

if TYPE_CHECKING:
    from sequel.algorithms.base import Algorithm

__all__ = ["Evaluation"]


class Evaluation:
    """The evaluating half of :class:`sequel.Learner`."""

    algorithm: Algorithm
    backend: Any
    eval_batch_size: int
    scenario: Scenario | None
    _tests: Data | None
    _owner: NDArray[np.int64]

    def emit(self, hook: str, **info: Any) -> None:
        """Call a hook of every callback."""
        raise NotImplementedError

    def evaluate(self, scenario: Scenario | None = None) -> NDArray[np.float64]:
        """Return the accuracy on the test set of every task."""
        if self.scenario is None:
            raise RuntimeError("call setup(scenario) before evaluate")
        other = scenario is not None and scenario is not self.scenario
        if other or self._tests is None:
            parts = [task.test for task in (self.scenario if scenario is None else scenario)]
            owner = np.repeat(np.arange(len(parts)), [len(p) for p in parts])
            tests = Data.concat(parts)
            if not other:
                self._tests, self._owner = tests, owner
        else:
            tests, owner = self._tests, self._owner
        self.emit("on_before_val_epoch")
        if "task_wise" in self.algorithm.needs:
            scores = np.concatenate(
                [self._scores(tests[owner == j]) for j in range(int(owner.max()) + 1)]
            )
        else:
            scores = self._scores(tests)
        right = scores.argmax(1) == tests.y
        hits = np.bincount(owner, weights=right)
        self.emit("on_after_val_epoch")
        out: NDArray[np.float64] = hits / np.bincount(owner)
        return out

    def _scores(self, data: Data) -> NDArray[Any]:
        out, size = [], self.eval_batch_size
        for at in range(0, len(data), size):
            self.emit("on_before_val_step", step=at // size)
            out.append(self.backend.scores(data.x[at : at + size], data.t[at : at + size], size))
            self.emit("on_after_val_step", step=at // size)
        return np.concatenate(out)

    def predict(self, x: Any, task: int | None = None) -> NDArray[Any]:
        """Return class scores (N, C); ``task`` selects the mask and must be given in task-incremental runs."""
        if self.scenario is None:
            raise RuntimeError("call setup(scenario) before predict")
        if task is None and (self.scenario.kind == "task" or "task_wise" in self.algorithm.needs):
            raise ValueError("task must be given: predictions depend on it here")
        if task is not None and not 0 <= task < len(self.scenario):
            raise ValueError(f"task must lie in [0, {len(self.scenario)}), got {task}")
        zeros = np.zeros(len(x), dtype=np.int64)
        return self._scores(Data(np.asarray(x), zeros, zeros + (task or 0)))
