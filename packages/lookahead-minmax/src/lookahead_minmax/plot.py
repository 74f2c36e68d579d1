"""Pictures of runs: distances over rounds, rates over step size and k, GANs (needs matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lookahead_minmax.spectral import Method, stability_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lookahead_minmax.games.run import Trajectory


def _axes(ax: Axes | None) -> Axes:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "lookahead-minmax[plot]"') from error
    return plt.subplots()[1] if ax is None else ax


def plot_distances(runs: Mapping[str, Trajectory], ax: Axes | None = None) -> Axes:
    """Draw the mean distance to the solution over passes, one line for each run.

    Args:
        runs: trajectories by label.
        ax: where to draw; new axes by default.

    Raises:
        ImportError: matplotlib is missing.
    """
    ax = _axes(ax)
    for label, run in runs.items():
        distance = run.distance.mean(1)
        shown = torch.isfinite(distance) & (distance < 1e6)
        ax.plot(run.oracle_calls[shown].numpy(), distance[shown].numpy(), label=label)
    ax.set(yscale="log", xlabel="passes over the field", ylabel="distance to the solution")
    ax.legend()
    return ax


def plot_phase(points: Mapping[str, Sequence[tuple[float, float]]], ax: Axes | None = None) -> Axes:
    """Draw paths of two-dimensional games in the plane, {label: [(x, y), ...]}."""
    ax = _axes(ax)
    for label, path in points.items():
        ax.plot(*zip(*path, strict=True), ".-", ms=3, lw=0.8, label=label)
    ax.plot(0, 0, "k*")
    ax.set(xlabel="x (minimises)", ylabel="y (maximises)", aspect="equal")
    ax.legend()
    return ax


def plot_stability(
    alpha: float = 0.5, method: Method = "gda", k_max: int = 60, ax: Axes | None = None
) -> Axes:
    """Draw the contraction per round over lr sigma and k; the line is the border of stability."""
    ax = _axes(ax)
    steps, periods = torch.linspace(0.01, 1.0, 100), torch.arange(1, k_max + 1)
    rates = stability_map(steps, periods, alpha, method)
    mesh = ax.pcolormesh(
        steps.numpy(),
        periods.numpy(),
        rates.numpy(),
        vmin=0.8,
        vmax=1.2,
        cmap="RdBu_r",
        shading="auto",
    )
    ax.contour(
        steps.numpy(), periods.numpy(), rates.numpy(), levels=[1.0], colors="k", linewidths=1
    )
    ax.set(xlabel="lr sigma", ylabel="k", title=f"rate per round, {method}, alpha = {alpha}")
    ax.figure.colorbar(mesh, ax=ax)
    return ax


def plot_gan_curves(curves: Mapping[str, Sequence[Any]], ax: Axes | None = None) -> Axes:
    """Draw the Fréchet distance of the live generators over rounds, a thin line for each seed.

    Args:
        curves: `gan.train.Curve` objects by label, one for each seed.
        ax: where to draw; new axes by default.
    """
    ax = _axes(ax)
    for number, (label, runs) in enumerate(curves.items()):
        for run in runs:
            ax.plot(run.rounds, run.live, color=f"C{number}", lw=0.6, alpha=0.5)
        mean = torch.tensor([run.live for run in runs]).mean(0)
        ax.plot(runs[0].rounds, mean.numpy(), color=f"C{number}", lw=2, label=label)
    ax.set(yscale="log", xlabel="rounds", ylabel="Fréchet distance, live generator")
    ax.legend()
    return ax


def plot_samples(samples: Mapping[str, Tensor], ax: Axes | None = None) -> Axes:
    """Draw generated images (or points in the plane) side by side, one panel for each label.

    Args:
        samples: up to 25 images (n, 1, height, width) or (n, pixels), or points (n, 2), by label.
        ax: where to draw; new axes by default.
    """
    ax = _axes(ax)
    if next(iter(samples.values())).shape[1:] == (2,):
        for label, points in samples.items():
            ax.plot(*points.T.numpy(), ".", label=label)
        ax.set_aspect("equal")
        ax.legend()
        return ax
    panels = []
    for images in samples.values():
        side = int(images[0].numel() ** 0.5)
        tiles = torch.full((25, side, side), float(images.min()))
        tiles[: len(images)] = images.reshape(-1, side, side)
        panel = tiles.view(5, 5, side, side).transpose(1, 2).reshape(5 * side, 5 * side)
        panels += [panel, torch.full((5 * side, 2), float("nan"))]
    ax.imshow(torch.cat(panels[:-1], 1).numpy(), cmap="gray")
    ax.set(title=" | ".join(samples), xticks=[], yticks=[])
    return ax
