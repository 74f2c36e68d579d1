"""Figures; every function returns the Axes it drew on. Needs matplotlib (``sequel-cl[plot]``)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_curves", "plot_matrix"]


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install sequel-cl[plot]") from error
    return Figure(figsize=(4.5, 4), layout="constrained").add_subplot()


def _save(ax: Any, path: str | os.PathLike[str] | None) -> None:
    if path is not None:
        ax.figure.savefig(path, dpi=110)


def plot_matrix(
    R: Any, *, ax: Axes | None = None, path: str | os.PathLike[str] | None = None, title: str = ""
) -> Axes:
    """Draw the accuracy matrix as a heat map: row, the task trained last; column, the task tested."""
    ax = _axes(ax)
    R = np.asarray(R, dtype=np.float64)
    ax.imshow(R, vmin=0, vmax=1, cmap="viridis")
    for (i, j), value in np.ndenumerate(R):
        if np.isfinite(value):
            colour = "black" if value > 0.6 else "white"
            ax.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    ax.set_xlabel("tested on task")
    ax.set_ylabel("after task")
    ax.set_title(title)
    _save(ax, path)
    return ax


def plot_curves(
    curves: Mapping[str, Sequence[Any]],
    *,
    ax: Axes | None = None,
    path: str | os.PathLike[str] | None = None,
    title: str = "",
) -> Axes:
    """Draw the mean accuracy over the tasks seen, after each task; one line per name, seeds as a band."""
    ax = _axes(ax)
    for name, matrices in curves.items():
        lines = np.array(
            [[np.mean(R[i, : i + 1]) for i in range(len(R))] for R in map(np.asarray, matrices)]
        )
        x = np.arange(1, lines.shape[1] + 1)
        mean = lines.mean(0)
        ax.plot(x, mean, marker=".", label=name)
        ax.fill_between(x, lines.min(0), lines.max(0), alpha=0.15)
    ax.set_xlabel("tasks seen")
    ax.set_ylabel("mean accuracy on them")
    ax.set_title(title)
    ax.legend(fontsize=8)
    _save(ax, path)
    return ax
