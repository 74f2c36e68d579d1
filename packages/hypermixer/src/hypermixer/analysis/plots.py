"""Plots, each on the Axes it is given or on new ones (matplotlib, the extra ``plot``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "hypermixer[plot]"') from error
    return Figure(figsize=(5, 4)).subplots()


def plot_pseudo_attention(energy: Tensor, ax: Axes | None = None, *, title: str = "") -> Axes:
    """Draw pseudo-attention (M, N), each row divided by its sum.

    Args:
        energy: (M, N), one sequence's result of :func:`hypermixer.analysis.pseudo_attention`.
        ax: Axes to draw on.
        title: above the map.

    Raises:
        ImportError: without matplotlib.
    """
    ax = _axes(ax)
    rows = energy / energy.sum(-1, keepdim=True).clamp(min=1e-30)
    ax.imshow(rows.numpy(), aspect="auto", cmap="magma_r", interpolation="nearest")
    ax.set(xlabel="input token j", ylabel="output token i", title=title)
    return ax


def plot_scene(
    signal: Tensor, target: Tensor, predictions: Mapping[str, Tensor], ax: Axes | None = None
) -> Axes:
    """Draw a scene of the shapes task: signal, target and models' outputs, each (100,)."""
    ax = _axes(ax)
    ax.fill_between(range(len(signal)), signal.numpy(), color="0.85", label="input")
    ax.plot(target.numpy(), color="black", lw=1.2, label="target")
    for (name, prediction), color in zip(predictions.items(), ("C3", "C0", "C2"), strict=False):
        ax.plot(prediction.numpy(), color=color, lw=1.2, ls="--", label=name)
    ax.set(xlabel="token", ylabel="height")
    ax.legend(fontsize="small", frameon=False, ncols=2)
    return ax


def plot_lengths(
    rows: Sequence[Mapping[str, Any]], forms: Sequence[str], ax: Axes | None = None
) -> Axes:
    """Draw milliseconds against the number of tokens, both logarithmic.

    Args:
        rows: of ``hypermixer.experiments.cost.measure_lengths``.
        forms: keys of the rows to draw.
        ax: Axes to draw on.
    """
    ax = _axes(ax)
    for form in forms:
        own = [row for row in rows if form in row]
        ax.plot([row["length"] for row in own], [row[form] for row in own], "o-", ms=4, label=form)
    ax.set(xscale="log", yscale="log", xlabel="tokens N", ylabel="milliseconds")
    ax.grid(alpha=0.3, which="both", lw=0.4)
    ax.legend(fontsize="small", frameon=False)
    return ax
