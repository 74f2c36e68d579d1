"""CSV and JSON lines."""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, Any

from sequel.loggers.base import Logger

if TYPE_CHECKING:
    from sequel.learner import Learner

__all__ = ["CSVLogger"]


class CSVLogger(Logger):
    """Write ``metrics.csv`` (step, name, value) and ``metrics.jsonl`` into a folder.

    A resumed run goes on behind what was recorded up to its checkpoint; later lines are dropped.

    >>> CSVLogger("runs/a").folder.name
    'a'
    """

    def on_before_fit(self, learner: Learner, **info: Any) -> None:
        """Open the files, without the lines of steps that will be taken again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        kept = []
        if path.exists() and learner.global_step:
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    break
                if entry["step"] <= learner.global_step:
                    kept.append(entry)
        self._rows = open(self.folder / "metrics.csv", "w", newline="")  # noqa: SIM115
        self._lines = open(path, "w")  # noqa: SIM115
        self._csv = csv.writer(self._rows)
        self._csv.writerow(["step", "name", "value"])
        for entry in kept:
            self.write(entry.pop("step"), entry)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append the values."""
        self._csv.writerows([step, name, repr(value)] for name, value in values.items())
        self._lines.write(json.dumps({"step": step, **values}) + "\n")

    def on_after_training_epoch(self, learner: Learner, **info: Any) -> None:
        """Flush."""
        self._rows.flush()
        self._lines.flush()

    def on_after_teardown(self, learner: Learner, **info: Any) -> None:
        """Close the files and, where the run has not failed, write ``result.json``."""
        self._rows.close()
        self._lines.close()
        if info.get("failed") or learner.position["task"] == 0:
            return
        learner.result().to_json(self.folder / "result.json")
