"""Figures; matplotlib comes with the extra ``plot``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_decision", "plot_robustness"]


def plot_decision(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, ax: Axes, *, resolution: int = 160
) -> Axes:
    """Draw the probability of class 1 over the plane, the decision boundary, and the points.

    Args:
        model: from (n, 2) to (n, 2) logits.
        x: (n, 2) points.
        y: (n,) labels 0 or 1.
        ax: to draw on.
        resolution: grid lines an axis.
    """
    low, high = x.amin(0) - 0.3, x.amax(0) + 0.3
    first = torch.linspace(float(low[0]), float(high[0]), resolution)
    second = torch.linspace(float(low[1]), float(high[1]), resolution)
    grid = torch.cartesian_prod(first, second).to(x)
    with torch.no_grad():
        p = model(grid).softmax(1)[:, 1].view(resolution, resolution).T.cpu()
    ax.contourf(first, second, p, levels=20, cmap="RdBu", alpha=0.7)
    ax.contour(first, second, p, levels=[0.5], colors="black")
    ax.scatter(
        x[:, 0].cpu(),
        x[:, 1].cpu(),
        c=y.cpu(),
        cmap="RdBu",
        s=8,
        edgecolors="black",
        linewidths=0.3,
    )
    ax.set(xticks=[], yticks=[])
    return ax


def plot_robustness(results: dict[str, dict[float, float]], ax: Axes) -> Axes:
    """Draw accuracy against the attack's radius, one line for each network.

    Args:
        results: name to the result of :func:`lcnn.robust_accuracy`.
        ax: to draw on.
    """
    for name, values in results.items():
        ax.plot(list(values), list(values.values()), marker="o", ms=3, label=name)
    ax.set(xlabel="l2 radius", ylabel="accuracy", ylim=(0, 1.02))
    ax.legend(frameon=False, fontsize="small")
    return ax
