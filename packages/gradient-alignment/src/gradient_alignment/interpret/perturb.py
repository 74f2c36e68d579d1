"""Discriminative pixel perturbation: does removing the least salient pixels change the prediction? (Section 5.3)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradient_alignment.core.noise import check_choice, check_count, require_floating
from gradient_alignment.core.targets import pick
from gradient_alignment.interpret.saliency import Model, evaluation_mode

Order = Literal["lerf", "morf"]
Metric = Literal["accuracy", "prob", "logit"]
Fill = Literal["mean", "blur"] | float | Tensor


@dataclass(frozen=True)
class Curve:
    """Result of `pixel_perturbation`.

    Attributes:
        fractions: of the pixels that were replaced, (F,).
        values: the metric, mean over images, (F,).
        auc: area under the curve over the fractions by the trapezoidal rule, divided by their range.
        removed: number of pixels that were replaced, (F,).
    """

    fractions: Tensor
    values: Tensor
    auc: float
    removed: Tensor


def default_fractions() -> Tensor:
    """Return the 25 fractions of the authors' code, from 0.01 to 1, evenly spaced in their logarithm."""
    return torch.logspace(-2, 0, 25, dtype=torch.float64)


def ranks(saliency: Tensor, order: Order = "lerf") -> Tensor:
    """Return the position of every pixel in the order of removal, (B, P); ties go by index.

    Args:
        saliency: (B, ...), one value a pixel.
        order: "lerf" removes the least relevant first, "morf" the most relevant.
    """
    flat = saliency.flatten(1)
    sequence = torch.argsort(flat, dim=1, stable=True, descending=order == "morf")
    positions = torch.arange(flat.shape[1], device=flat.device).expand_as(flat)
    return torch.empty_like(sequence).scatter_(1, sequence, positions)


def removal_counts(fractions: Tensor, pixels: int) -> Tensor:
    """Return the number of pixels for every fraction, to the nearest, at least 1."""
    return (fractions * pixels).round().long().clamp_(min=1)


@torch.no_grad()
def pixel_perturbation(
    model: Model,
    x: Tensor,
    y: Tensor,
    saliency: Tensor,
    *,
    fractions: Sequence[float] | Tensor | None = None,
    order: Order = "lerf",
    fill: Fill = "mean",
    metric: Metric = "accuracy",
    batch_size: int | None = None,
) -> Curve:
    """Replace a growing fraction of pixels in the order of their saliency, and measure what the model makes of it.

    Exactly round(fraction · pixels) pixels of every image are replaced, in all channels; ties go by index, so the
    result is the same at every run. All fractions go through the model as one stream of batches.

    Args:
        model: maps (B, C, H, W) (or (B, P) without channels) to logits; evaluated in evaluation mode.
        x: (B, C, H, W) or (B, P).
        y: (B,) class indices.
        saliency: one value a pixel, (B, H, W) or (B, P); see `reduce_channels`. It is not changed.
        fractions: in (0, 1]; None is `default_fractions`.
        order: "lerf", least relevant first (the paper), or "morf".
        fill: "mean" of each image and channel (the paper), "blur" (a 5x5 mean), a number (0.5 in the authors'
            code), or a tensor that broadcasts to x, e.g. the mean of a data set.
        metric: "accuracy" (the paper: with logits the test is a density ratio only), "prob" of the label, or "logit".
        batch_size: images in one pass; None is 32 on the CPU, where small batches stay in the cache, else 512.

    Raises:
        ValueError: fractions outside (0, 1], a saliency of another shape, labels that do not fit, an unknown word.

    Example:
        >>> import torch
        >>> x, model = torch.rand(3, 1, 4, 4), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
        >>> curve = pixel_perturbation(model, x, torch.tensor([0, 1, 1]), x[:, 0], fractions=[0.25, 1.0])
        >>> curve.removed.tolist()
        [4, 16]
    """
    check_choice("order", order, Order)
    check_choice("metric", metric, Metric)
    if batch_size is None:
        batch_size = 32 if x.device.type == "cpu" else 512
    check_count("batch_size", batch_size)
    require_floating(x)
    if not len(x):
        raise ValueError("x is empty")
    if y.shape != (len(x),):
        raise ValueError(f"y must have shape ({len(x)},), got {tuple(y.shape)}")
    spatial = x.shape[2:] if x.ndim > 2 else x.shape[1:]
    if saliency.shape != (len(x), *spatial):
        raise ValueError(
            f"saliency must be {(len(x), *spatial)}, one value a pixel (see reduce_channels), got {tuple(saliency.shape)}"
        )
    steps = (
        default_fractions()
        if fractions is None
        else torch.as_tensor(fractions, dtype=torch.float64)
    )
    if not len(steps) or not bool(((steps > 0) & (steps <= 1)).all()):
        raise ValueError(f"fractions must be in (0, 1], got {steps.tolist()}")
    rank = ranks(saliency, order)
    counts = removal_counts(steps, rank.shape[1])
    filled = _filling(x, fill)
    view = (-1, *([1] if x.ndim > 2 else []), *spatial)
    sums = torch.zeros(len(steps), dtype=torch.float64)
    jobs = torch.cartesian_prod(torch.arange(len(steps)), torch.arange(len(x)))
    with evaluation_mode(model):
        for part in torch.split(jobs, batch_size):
            step, image = part.unbind(1)
            rows = image.to(x.device)
            gone = rank[rows] < counts[step].to(x.device).unsqueeze(1)
            points = torch.where(gone.view(view), filled[rows], x[rows])
            logits, labels = model(points), y[rows]
            chosen = pick(logits, labels)
            if metric == "accuracy":
                values = (logits.argmax(1) == labels).double()
            elif metric == "prob":
                values = pick(logits, labels, "logprob").exp().double()
            else:
                values = chosen.double()
            sums.index_add_(0, step, values.cpu())
    means = sums / len(x)
    along = torch.argsort(steps)
    span = float(steps[along[-1]] - steps[along[0]])
    area = (
        float(torch.trapezoid(means[along], steps[along])) / span if span else float(means.mean())
    )
    return Curve(steps, means, area, counts)


def _filling(x: Tensor, fill: Fill) -> Tensor:
    """Return what replaces the pixels, of x's shape."""
    if isinstance(fill, Tensor):
        return fill.to(x.device, x.dtype).expand_as(x)
    if isinstance(fill, (int, float)) and not isinstance(fill, bool):
        return torch.full_like(x, float(fill))
    if fill == "mean":
        dims = list(range(2, x.ndim)) or [1]
        return x.mean(dims, keepdim=True).expand_as(x)
    if fill == "blur" and x.ndim == 4:
        padded = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="replicate")
        return torch.nn.functional.avg_pool2d(padded, 5, stride=1)
    raise ValueError(
        f"fill must be 'mean', 'blur' (for images), a number or a tensor; got {fill!r}"
    )
