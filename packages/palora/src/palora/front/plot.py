"""Pictures of a front: two losses coloured by preference, a ternary map, parallel coordinates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from palora.front.front import Front

__all__ = ["plot_front"]


def _axes(ax: Axes | None) -> Axes:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "palora[plot]"') from error
    return plt.subplots(figsize=(5, 4))[1] if ax is None else ax


def plot_front(front: Front, ax: Axes | None = None, *, task: int = 0, **kw: Any) -> Axes:
    """Draw a front and return the axes it was drawn on.

    Two tasks: one loss against the other, coloured by λ of the first, dominated points hollow.
    Three: the simplex of preferences coloured by the loss of ``task``. More: parallel coordinates
    coloured by λ of ``task``.

    Args:
        front: what was evaluated.
        ax: axes to draw on; None makes a figure.
        task: which loss or preference gives the colour.
        **kw: for the scatter or the lines.

    Raises:
        ImportError: matplotlib is not installed.
    """
    ax = _axes(ax)
    tasks = front.prefs.shape[1]
    if not 0 <= task < tasks:
        raise ValueError(f"task must be in 0..{tasks - 1}, got {task}")
    draw = {2: _plane, 3: _ternary}.get(tasks, _parallel)
    return draw(front, ax, task, kw)


def _plane(front: Front, ax: Axes, task: int, kw: dict[str, Any]) -> Axes:
    keep = front.nondominated()
    x, y = front.losses.T
    colour = front.prefs[:, task]
    ax.plot(x, y, color="0.8", lw=1, zorder=1)
    shown = {"cmap": "viridis", "vmin": 0.0, "vmax": 1.0, **kw}
    points = ax.scatter(x[keep], y[keep], c=colour[keep], zorder=3, **shown)
    ax.scatter(x[~keep], y[~keep], facecolors="none", edgecolors="0.5", zorder=2)
    ax.figure.colorbar(points, ax=ax, label=f"preference for {front.tasks[task]}")
    ax.set_xlabel(f"loss of {front.tasks[0]}")
    ax.set_ylabel(f"loss of {front.tasks[1]}")
    return ax


def _ternary(front: Front, ax: Axes, task: int, kw: dict[str, Any]) -> Axes:
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(3) / 2]])
    x, y = (front.prefs @ corners).T
    points = ax.scatter(x, y, c=front.losses[:, task], **{"cmap": "viridis", "s": 60, **kw})
    ax.figure.colorbar(points, ax=ax, label=f"loss of {front.tasks[task]}")
    outline = np.vstack([corners, corners[:1]])
    ax.plot(*outline.T, color="0.7", lw=1, zorder=0)
    for name, corner, place in zip(
        front.tasks, corners, [("right", "top"), ("left", "top"), ("center", "bottom")], strict=True
    ):
        ax.text(corner[0], corner[1], name, ha=place[0], va=place[1])
    ax.set_aspect("equal")
    ax.axis("off")
    return ax


def _parallel(front: Front, ax: Axes, task: int, kw: dict[str, Any]) -> Axes:
    import matplotlib.pyplot as plt

    low, high = front.losses.min(0), front.losses.max(0)
    scaled = (front.losses - low) / np.where(high > low, high - low, 1.0)
    colours = plt.get_cmap("viridis")(front.prefs[:, task])
    for row, colour in zip(scaled, colours, strict=True):
        ax.plot(range(len(low)), row, **{"color": colour, **kw})
    ax.set_xticks(range(len(low)), front.tasks)
    ax.set_ylabel("loss, scaled to its range")
    return ax
