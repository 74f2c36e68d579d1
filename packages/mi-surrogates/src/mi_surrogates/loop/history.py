"""What a run leaves behind: its iterations and its result."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mi_surrogates.design.choice import named
from mi_surrogates.errors import missing
from mi_surrogates.loop.store import write_atomically

Floats = NDArray[np.float64]


def valid_json(value: Any) -> Any:
    """Return the value with None for numbers that JSON does not have: NaN and infinities.

    Example:
        >>> valid_json({"a": [1.0, math.nan], "b": math.inf})
        {'a': [1.0, None], 'b': None}
    """
    if isinstance(value, dict):
        return {key: valid_json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [valid_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Iteration:
    """One turn of the loop.

    Attributes:
        index: from 0.
        theta: the nominal design that was simulated.
        value: its objective.
        stderr: the standard error of the value.
        accepted: False if it was worse than the one before it beyond two standard errors, and the loop
            went back.
        ratio: actual over predicted gain of the step that led here, or None.
        proposal: the design of the next iteration.
        gain: the predicted gain of that step.
        sigma: standard deviations of the region the step was made in.
        at_boundary: whether that region stopped the step.
        designs: how many were used.
        failed: index → reason of the designs that failed.
        events: simulated since the start of the run.
        violation: largest relative violation of a constraint by the nominal design.
        seconds: of the objective, the surrogate and the step.
    """

    index: int
    theta: list[float]
    value: float
    stderr: float
    accepted: bool
    ratio: float | None
    proposal: list[float]
    gain: float
    sigma: list[float]
    at_boundary: bool
    designs: int
    failed: dict[str, str]
    events: int
    violation: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and strings."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Iteration:
        """Return the iteration of a line of `history.jsonl`, where a value that is missing is null."""
        unknown = {key: math.nan for key in ("value", "stderr") if row[key] is None}
        return cls(**{**row, **unknown})


class History(list[Iteration]):
    """The iterations of a run, in order."""

    def __init__(self, iterations: Iterable[Iteration] = (), names: Iterable[str] = ()) -> None:
        super().__init__(iterations)
        self.names = list(names)

    def to_pandas(self) -> Any:
        """Return a DataFrame with one row for each iteration and a column for each parameter."""
        try:
            import pandas
        except ImportError as error:
            raise missing("pandas", "pandas") from error
        rows = []
        for each in self:
            row = each.as_dict()
            row.update(zip(self.names, row.pop("theta"), strict=True))
            sigma = [f"sigma_{name}" for name in self.names]
            row.update(zip(sigma, row.pop("sigma"), strict=True))
            del row["proposal"]
            row["failed"] = len(row["failed"])
            rows.append(row)
        return pandas.DataFrame(rows).set_index("index")


@dataclass
class OptimizeResult:
    """The end of a run.

    Attributes:
        theta: (F,) the last nominal design that was simulated and not rejected.
        value: its objective, with standard error `stderr`.
        stderr: standard error of the value.
        names: of the parameters; an option of a `Choice` is "name=option".
        history: the iterations.
        points: (P, F) all designs that were simulated; `values` and `stderrs` (P,) belong to them.
        values: objective of the points.
        stderrs: standard errors of the values.
        events: simulated in all.
        seconds: of the run, simulations included.
        constraint_violation: largest relative violation at theta.
        status: why it ended: "iterations", "events", "seconds", "patience", "floor" or "flat".
        choices: name → options of every `Choice`.
    """

    theta: Floats
    value: float
    stderr: float
    names: list[str]
    history: History
    points: Floats
    values: Floats
    stderrs: Floats
    events: int
    seconds: float
    constraint_violation: float
    status: str
    surrogate: Any = field(default=None, repr=False, compare=False)
    region: Any = field(default=None, repr=False, compare=False)
    choices: dict[str, list[str]] = field(default_factory=dict)

    @property
    def theta_dict(self) -> dict[str, float | str]:
        """Name → value, for a `Choice` the option."""
        return named(self.names, self.theta, self.choices)

    @property
    def best(self) -> Iteration:
        """The iteration whose nominal design has the highest value minus two standard errors."""

        def bound(each: Iteration) -> float:
            low = each.value - 2 * each.stderr
            return -math.inf if math.isnan(low) else low  # the nominal design may have failed

        return max(self.history, key=bound)

    def plot(self, kind: str = "objective", ax: Any = None) -> Any:
        """Draw one of `mi_surrogates.plot.KINDS` and return the matplotlib Axes."""
        from mi_surrogates.plot import plot_result

        return plot_result(self, kind, ax)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything but the surrogate, readable with torch.load(weights_only=True)."""
        state = {
            "theta": torch.from_numpy(self.theta),
            "points": torch.from_numpy(self.points),
            "values": torch.from_numpy(self.values),
            "stderrs": torch.from_numpy(self.stderrs),
            "history": [each.as_dict() for each in self.history],
            "rest": {
                name: getattr(self, name)
                for name in (
                    "value",
                    "stderr",
                    "names",
                    "events",
                    "seconds",
                    "constraint_violation",
                    "status",
                    "choices",
                )
            },
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(Path(path), buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> OptimizeResult:
        """Read what `save` wrote."""
        state = torch.load(path, weights_only=True)
        rest = state["rest"]
        history = History((Iteration(**row) for row in state["history"]), rest["names"])
        arrays = {key: state[key].numpy() for key in ("theta", "points", "values", "stderrs")}
        return cls(**arrays, history=history, **rest)
