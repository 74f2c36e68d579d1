"""Figures of samples, saliency maps and curves; needs matplotlib (`pip install "gradient-alignment[plot]"`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def image_rows(
    rows: Mapping[str, Tensor], *, titles: Sequence[str] = (), signed: Sequence[str] = ()
) -> Any:
    """Draw labelled rows of images.

    Args:
        rows: by label, images (N, C, H, W) with C = 1 or 3, or (N, H, W).
        titles: of the columns.
        signed: labels of rows with values of both signs, drawn in colours around 0; each image has its own scale.

    Returns:
        a matplotlib figure.

    Raises:
        ValueError: no rows.
    """
    from matplotlib.figure import Figure

    if not rows:
        raise ValueError("rows is empty")
    columns = max(len(images) for images in rows.values())
    figure = Figure(figsize=(0.9 * columns + 1.6, 0.95 * len(rows) + 0.3))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(False)
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        for axis, image in zip(line, images.detach().cpu().numpy(), strict=False):
            picture = image
            if image.ndim == 3:
                picture = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
            if label in signed:
                bound = float(abs(picture).max()) or 1.0
                axis.imshow(picture, cmap="RdBu_r", vmin=-bound, vmax=bound)
            else:
                axis.imshow(picture, cmap="gray")
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=8)
    figure.tight_layout(pad=0.3, w_pad=0.6)
    return figure


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
) -> Any:
    """Draw labelled curves, e.g. of `pixel_perturbation` or `density_ratio`; returns a matplotlib figure.

    Args:
        lines: by label, the values along x and y.
        x_label: of the axis.
        y_label: of the axis.
        log_x: whether x is drawn in its logarithm.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.4))
    axis = figure.subplots()
    for label, (x, y) in lines.items():
        axis.plot(list(x), list(y), label=label)
    axis.set(xlabel=x_label, ylabel=y_label, xscale="log" if log_x else "linear")
    axis.legend(fontsize=8)
    figure.tight_layout()
    return figure
