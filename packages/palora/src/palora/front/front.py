"""Evaluate a model over a grid of preferences, and keep what came out."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from palora.core.checkpoint import atomically
from palora.core.loss import as_losses, split_batch
from palora.core.preference import as_preference, state_of
from palora.core.rays import batch_size, multi
from palora.front import indicators

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Front", "evaluate"]

Array = NDArray[np.float64]


@dataclass
class Front:
    """The losses (and metrics) of a model at m preferences.

    Attributes:
        prefs: ``(m, T)``.
        losses: ``(m, T)``, to minimise.
        metrics: ``(m, K)`` or None.
        tasks: T names.
    """

    prefs: Array
    losses: Array
    metrics: Array | None = None
    tasks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Convert to float64 arrays and check the shapes."""
        self.prefs = np.asarray(self.prefs, dtype=np.float64)
        self.losses = np.asarray(self.losses, dtype=np.float64)
        if self.prefs.ndim != 2 or self.prefs.shape != self.losses.shape:
            raise ValueError(
                f"prefs {self.prefs.shape} and losses {self.losses.shape} must be one (m, T)"
            )
        if self.metrics is not None:
            self.metrics = np.asarray(self.metrics, dtype=np.float64)
        if not self.tasks:
            self.tasks = [f"task{i}" for i in range(self.prefs.shape[1])]

    def __len__(self) -> int:
        """Number of preferences evaluated."""
        return len(self.prefs)

    def hypervolume(self, ref: Any) -> float:
        """Hypervolume of the losses; see :func:`palora.front.hypervolume`."""
        return indicators.hypervolume(self.losses, ref)

    def nondominated(self) -> NDArray[np.bool_]:
        """Which points are not dominated."""
        return indicators.nondominated(self.losses)

    def spearman(self, kind: Literal["preference", "losses"] = "preference") -> Array:
        """Rank correlations; ideal −1."""
        return indicators.spearman(self.losses, self.prefs, kind)

    def uniformity(self) -> Array:
        """u(λ) of each point; see :func:`palora.front.uniformity`."""
        return indicators.uniformity(self.losses, self.prefs)

    def select(
        self,
        constraint: Mapping[str, float] | Callable[[Array], bool],
        minimize: str | None = None,
    ) -> int:
        """Return the index of the best point among those that satisfy a constraint.

        Args:
            constraint: upper bounds of losses by task name, or a predicate of the loss vector.
            minimize: the task whose loss decides; None: the mean of all.

        Raises:
            ValueError: no point satisfies it.
            KeyError: an unknown task name.

        Example:
            >>> front = Front([[1, 0], [.5, .5], [0, 1]], [[1, 3], [2, 2], [3, 1]])
            >>> front.select({"task0": 2.5}, minimize="task1")
            1
        """
        if callable(constraint):
            allowed: Any = np.array([bool(constraint(row)) for row in self.losses])
        else:
            bounds = [constraint.get(t, np.inf) for t in self.tasks]
            if unknown := [t for t in constraint if t not in self.tasks]:
                raise KeyError(f"unknown task {unknown[0]!r}; the tasks are: {self.tasks}")
            allowed = (self.losses <= np.array(bounds)).all(1)
        if not allowed.any():
            raise ValueError(f"none of {len(self)} points satisfies {constraint!r}")
        if minimize is not None and minimize not in self.tasks:
            raise KeyError(f"unknown task {minimize!r}; the tasks are: {self.tasks}")
        score = (
            self.losses.mean(1) if minimize is None else self.losses[:, self.tasks.index(minimize)]
        )
        return int(np.where(allowed, score, np.inf).argmin())

    def to_json(self, path: str | Path | None = None) -> str:
        """Return (and write) the front as JSON."""
        data = {
            "tasks": self.tasks,
            "prefs": self.prefs.tolist(),
            "losses": self.losses.tolist(),
            "metrics": None if self.metrics is None else self.metrics.tolist(),
        }
        return _write(path, json.dumps(data, indent=1))

    @classmethod
    def from_json(cls, text: str) -> Front:
        """Read what :meth:`to_json` returned.

        Raises:
            ValueError: the text is no JSON, or not that of a front.
        """
        data = json.loads(text)
        keys = ("prefs", "losses", "metrics", "tasks")
        if not isinstance(data, dict) or any(key not in data for key in keys):
            raise ValueError(f"not the JSON of a front: it needs the entries {', '.join(keys)}")
        return cls(data["prefs"], data["losses"], data["metrics"], data["tasks"])

    def to_csv(self, path: str | Path | None = None) -> str:
        """Return (and write) the front as CSV, one row per preference."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        blocks = [("lambda", self.prefs, self.tasks), ("loss", self.losses, self.tasks)]
        if self.metrics is not None:
            blocks.append(("metric", self.metrics, [str(i) for i in range(self.metrics.shape[1])]))
        writer.writerow([f"{kind}_{name}" for kind, _, names in blocks for name in names])
        for i in range(len(self)):
            writer.writerow([repr(float(v)) for _, values, _ in blocks for v in values[i]])
        return _write(path, buffer.getvalue())

    def plot(self, ax: Axes | None = None, **kw: Any) -> Axes:
        """Draw the front and return the axes: needs matplotlib; see :mod:`palora.front.plot`."""
        from palora.front.plot import plot_front

        return plot_front(self, ax, **kw)


def _write(path: str | Path | None, text: str) -> str:
    if path is not None:
        atomically(Path(path), lambda name: _put(name, text))
    return text


def _put(name: str, text: str) -> None:
    Path(name).write_text(text, encoding="utf-8")


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    fn: Callable[..., Any],
    prefs: Any,
    *,
    chunk: int | None = None,
    tasks: Sequence[str] | None = None,
) -> Front:
    """Evaluate the model at every preference of a grid, in evaluation mode without gradients.

    Args:
        model: an injected model, or a baseline of :mod:`palora.baselines` (called
            ``model(lam, *inputs)``).
        loader: batches in the forms that :func:`palora.step_loss` takes: ``(inputs, *targets)``,
            or a dict.
        fn: ``fn(output, *targets)`` returns the T mean losses of the batch, or a pair of them and
            of metrics: a number, a sequence, a tensor or a dict of them. Means over batches are
            weighed by the batch size.
        prefs: ``(m, T)``, for example ``simplex_grid(2, 10)``, or one preference.
        chunk: preferences in one pass.
        tasks: names, for baselines.

    Raises:
        ValueError: an empty loader, or losses that are not T scalars.
    """
    baseline = bool(getattr(model, "takes_preference", False))
    if baseline:
        count = np.asarray(torch.as_tensor(prefs)).shape[-1]
        names = list(tasks) if tasks else [f"task{i}" for i in range(count)]
    else:
        names = state_of(model).tasks
    values = as_preference(prefs, names).detach().reshape(-1, len(names))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    total: Tensor | None = None
    seen = 0
    try:
        with torch.no_grad():
            for batch in loader:
                args, kw, targets = split_batch(batch)
                size = batch_size((args, kw))
                rows = _rows(model, args, kw, values, chunk, baseline)
                table = torch.stack([_scores(fn(row, *targets), names) for row in rows])
                total = size * table if total is None else total + size * table
                seen += size
    finally:
        for module, mode in modes:
            module.training = mode
    if total is None:
        raise ValueError("the loader gave no batch")
    result = (total / seen).cpu().double().numpy()
    split = len(names)
    metrics = result[:, split:] if result.shape[1] > split else None
    return Front(values.cpu().double().numpy(), result[:, :split], metrics, list(names))


def _rows(
    model: nn.Module,
    args: tuple[Any, ...],
    kw: dict[str, Any],
    values: Tensor,
    chunk: int | None,
    baseline: bool,
) -> list[Any]:
    """The outputs at each preference."""
    if baseline:
        return [model(lam, *args, **kw) for lam in values]
    outputs = multi(model, values, *args, chunk=chunk, **kw)
    return [
        tree_map(lambda leaf, m=m: leaf[m] if isinstance(leaf, Tensor) else leaf, outputs)
        for m in range(len(values))
    ]


def _scores(found: Any, names: Sequence[str]) -> Tensor:
    metrics: list[Tensor] = []
    if isinstance(found, tuple) and len(found) == 2 and not _is_scalar(found[0]):
        found, extra = found
        if isinstance(extra, Mapping):
            extra = list(extra.values())
        if _is_scalar(extra):
            extra = [extra]
        metrics = [torch.as_tensor(v).double().cpu() for v in extra]
    losses = torch.stack(as_losses(found, names)).double().cpu()
    return torch.cat([losses, torch.stack(metrics)]) if metrics else losses


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, Sequence | Mapping) and torch.as_tensor(value).dim() == 0
