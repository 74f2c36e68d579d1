"""How the implied density treats noise, and how far input gradients point towards the data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gradient_alignment.core.noise import check_choice, check_count, check_positive
from gradient_alignment.core.targets import pick
from gradient_alignment.interpret.saliency import Model, evaluation_mode, input_gradient


@torch.no_grad()
def density_ratio(
    model: Model,
    loader: Iterable[tuple[Tensor, Tensor]],
    scales: Sequence[float],
    *,
    num_noise: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return the mean of :math:`\log p(x+\eta \mid y) - \log p(x \mid y)`, η ~ N(0, s²I), for every scale s (Section 5.1).

    The difference of class logits; below 0 where noise is less likely than the data, as it should be. Autocast is
    switched off inside.

    Args:
        model: maps (B, ...) to logits (B, C); evaluated in evaluation mode.
        loader: pairs (x, y).
        scales: standard deviations s, above 0.
        num_noise: draws for each sample and scale.
        generator: source of the noise, on the data's device.

    Returns:
        (S,) in float64.

    Raises:
        ValueError: no data, a scale that is not positive.
    """
    for scale in scales:
        check_positive("scales", scale)
    check_count("num_noise", num_noise)
    totals, count = torch.zeros(len(scales), dtype=torch.float64), 0
    with evaluation_mode(model):
        for x, y in loader:
            count += len(x)
            with torch.autocast(x.device.type, enabled=False):
                clean = pick(model(x), y).double()
                for index, scale in enumerate(scales):
                    for _ in range(num_noise):
                        noise = torch.randn(
                            x.shape, generator=generator, device=x.device, dtype=x.dtype
                        )
                        change = pick(model(x + scale * noise), y).double() - clean
                        totals[index] += change.sum().cpu() / num_noise
    if not count:
        raise ValueError("the loader is empty")
    return totals / count


def alignment(
    model: Model,
    x: Tensor,
    y: Tensor,
    reference: Literal["class-mean", "kde"] = "class-mean",
    *,
    data: tuple[Tensor, Tensor] | None = None,
    bandwidth: float = 1.0,
) -> Tensor:
    """Return the cosine of every logit gradient with an estimate of the data's score, (B,).

    Args:
        model: maps (B, ...) to logits (B, C).
        x: (B, ...).
        y: (B,) class indices.
        reference: "class-mean", the direction to the mean of the class; or "kde", the score of a Gaussian
            kernel density estimate of the class.
        data: pairs (images, labels) that the reference is made of; None takes x and y themselves (for "kde" a
            sample is left out of its own density).
        bandwidth: of the kernel, in units of x.

    Raises:
        ValueError: an unknown reference, a class without data.
    """
    check_choice("reference", reference, Literal["class-mean", "kde"])
    check_positive("bandwidth", bandwidth)
    images, labels = (x, y) if data is None else data
    slope = input_gradient(model, x, y).flatten(1)
    points, kernels = x.detach().flatten(1), images.detach().flatten(1)
    wanted = torch.empty_like(points)
    for label in torch.unique(y):
        rows, members = y == label, kernels[labels == label]
        if len(members) < (1 if data is not None or reference == "class-mean" else 2):
            raise ValueError(f"class {int(label)} has too few data for the reference")
        own = points[rows]
        if reference == "class-mean":
            wanted[rows] = members.mean(0) - own
            continue
        logits = -0.5 * torch.cdist(own, members).square() / bandwidth**2
        if data is None:
            logits.fill_diagonal_(-torch.inf)
        wanted[rows] = logits.softmax(1) @ members - own
    return F.cosine_similarity(slope, wanted, dim=1)
