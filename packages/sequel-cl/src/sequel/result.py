"""What a run gives back."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequel import metrics

__all__ = ["Result"]


@dataclass
class Result:
    """The accuracy matrix and what follows from it.

    ``matrix`` (T, T): row i after task i; ``initial`` (T,): before training; ``losses``: of every
    step; ``anytime``: (step, task, row) of the evaluations within tasks.

    >>> Result(np.array([[0.9, 0.1], [0.6, 0.8]]), np.array([0.1, 0.1])).summary()["acc"]
    0.7
    """

    matrix: NDArray[np.float64]
    initial: NDArray[np.float64]
    losses: list[float] = field(default_factory=list)
    anytime: list[tuple[int, int, list[float]]] = field(default_factory=list)
    fingerprint: str = ""

    @property
    def done(self) -> NDArray[np.float64]:
        """The square part of the matrix of the tasks finished."""
        n = int(np.isfinite(self.matrix).all(1).sum())
        return self.matrix[:n, :n]

    @property
    def acc(self) -> float:
        """Mean accuracy over the tasks seen after the last of them."""
        return metrics.acc(self.done)

    @property
    def bwt(self) -> float:
        """Backward transfer."""
        return metrics.bwt(self.done)

    @property
    def fwt(self) -> float:
        """Forward transfer."""
        return metrics.fwt(self.done, self.initial[: len(self.done)])

    @property
    def forgetting(self) -> float:
        """Forgetting."""
        return metrics.forgetting(self.done)

    def summary(self) -> dict[str, float]:
        """Return the metrics, rounded to 12 digits."""
        out = {
            "acc": self.acc,
            "bwt": self.bwt,
            "fwt": self.fwt,
            "forgetting": self.forgetting,
            "forgetting_sequel": metrics.forgetting_sequel(self.done),
            "learning_accuracy": metrics.learning_accuracy(self.done),
            "average_incremental_accuracy": metrics.average_incremental_accuracy(self.done),
        }
        if self.anytime:
            rows, tasks = [r for *_, r in self.anytime], [t for _, t, _ in self.anytime]
            out["min_acc"] = metrics.min_acc(rows, tasks)
            out["worst_case_acc"] = metrics.worst_case_acc(rows, tasks)
        return {key: round(value, 12) for key, value in out.items()}

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return (and write) the result as JSON."""
        data: dict[str, Any] = {
            **self.summary(),
            "matrix": [[None if np.isnan(v) else v for v in row] for row in self.matrix.tolist()],
            "initial": self.initial.tolist(),
            "fingerprint": self.fingerprint,
        }
        text = json.dumps(data, indent=1)
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    def plot(self, path: str | os.PathLike[str] | None = None, ax: Any = None) -> Any:
        """Draw the matrix as a heat map; returns the Axes, and saves it where a path is given."""
        from sequel.plot import plot_matrix

        return plot_matrix(self.matrix, path=path, ax=ax)
