"""Figures of a run (extra `plot`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mi_surrogates.errors import missing
from mi_surrogates.loop.history import OptimizeResult


def _parameters(result: OptimizeResult, ax: Any) -> None:
    steps = [each.index for each in result.history]
    for i, name in enumerate(result.names):
        center = np.array([each.theta[i] for each in result.history])
        sigma = np.array([each.sigma[i] for each in result.history])
        (line,) = ax.plot(steps, center, label=name)
        ax.fill_between(steps, center - sigma, center + sigma, color=line.get_color(), alpha=0.12)
    ax.set(xlabel="iteration", ylabel="parameter")
    ax.legend(fontsize="small", ncols=2)


def _objective(result: OptimizeResult, ax: Any) -> None:
    for accepted, colour in ((True, "tab:blue"), (False, "tab:red")):
        rows = [each for each in result.history if each.accepted is accepted]
        ax.errorbar(
            [each.events for each in rows],
            [each.value for each in rows],
            [each.stderr for each in rows],
            fmt="o",
            ms=3,
            color=colour,
            label="accepted" if accepted else "rejected",
        )
    ax.set(xlabel="events", ylabel="objective at the nominal design")
    ax.legend(fontsize="small")


def _surrogate(result: OptimizeResult, ax: Any) -> None:
    """Predicted against measured values of the designs of the last iteration."""
    near = [result.region.distance(p) < 3 * np.sqrt(p.size) for p in result.points]
    z = torch.from_numpy(result.region.to_z(result.points[near])).float()
    with torch.no_grad():
        mean, std = result.surrogate(z)
    ax.errorbar(
        result.values[near],
        mean.numpy(),
        std.numpy(),
        result.stderrs[near],
        fmt="o",
        ms=3,
        alpha=0.5,
    )
    ends = [float(result.values[near].min()), float(result.values[near].max())]
    ax.plot(ends, ends, color="0.6", lw=1)
    ax.set(xlabel="measured", ylabel="surrogate")


def _slices(result: OptimizeResult, ax: Any) -> None:
    """The surrogate along every coordinate of its region."""
    t = np.linspace(-1.5, 1.5, 61)
    for i, name in enumerate(result.names):
        z = torch.zeros(len(t), len(result.names))
        z[:, i] = torch.from_numpy(t).float()
        with torch.no_grad():
            mean, std = (part.numpy() for part in result.surrogate(z))
        (line,) = ax.plot(t, mean, label=name)
        ax.fill_between(t, mean - std, mean + std, color=line.get_color(), alpha=0.12)
    ax.set(xlabel="z of one parameter, the others at the center", ylabel="surrogate")
    ax.legend(fontsize="small", ncols=2)


KINDS: dict[str, Callable[[OptimizeResult, Any], None]] = {
    "parameters": _parameters,
    "objective": _objective,
    "surrogate": _surrogate,
    "slices": _slices,
}


def plot_result(result: OptimizeResult, kind: str = "objective", ax: Any = None) -> Any:
    """Draw a result and return the Axes.

    Args:
        result: of `optimize`.
        kind: "parameters", "objective", "surrogate" or "slices".
        ax: a matplotlib Axes; a new figure by default.

    Raises:
        ValueError: another kind, or a surrogate is needed and the result was loaded from a file.
        MissingExtra: matplotlib is not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind in ("surrogate", "slices") and result.surrogate is None:
        raise ValueError(f"kind {kind!r} needs the surrogate, which a saved result does not have")
    if ax is None:
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise missing("matplotlib", "plot") from error
        ax = plt.figure().add_subplot()
    KINDS[kind](result, ax)
    return ax
