"""Saliency maps: input gradients of logit, loss and shift-invariant targets, and SmoothGrad.

Plain tensors of the input's shape, so they go into captum's and quantus's functions as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from gradient_alignment.core.noise import check_choice, check_count, require_floating
from gradient_alignment.core.targets import check_labels, pick

Of = Literal["logit", "loss", "logprob", "centered", "logsumexp"]
Reduction = Literal["abs-sum", "abs-max", "std"]
Model = Callable[[Tensor], Tensor]


@contextmanager
def evaluation_mode(model: Model) -> Iterator[None]:
    """Put a module into evaluation mode inside the block, and every layer back as it was after it."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _target(logits: Tensor, y: Tensor | None, of: Of) -> Tensor:
    if of == "centered":
        check_labels(logits, y)
        return pick(logits, y, "label") - logits.mean(1)
    return pick(logits, y, "label" if of == "logit" else of)


def input_gradient(
    model: Model,
    x: Tensor,
    y: Tensor | None = None,
    of: Of = "logit",
    *,
    create_graph: bool = False,
) -> Tensor:
    r"""Return the gradient of a classifier's output in its input, the shape of x.

    Logit gradients are not determined by the classifier: adding the same function to all logits leaves its
    probabilities and changes these gradients at will (Section 2). "logprob", "loss" and "centered" do not change.

    Args:
        model: maps (B, ...) to logits (B, C); a module is evaluated in evaluation mode.
        x: (B, ...).
        y: (B,) class indices; None takes the predicted classes.
        of: "logit" :math:`\nabla f_y`, "logprob" :math:`\nabla\log p_y`, "loss" (its negative), "centered"
            :math:`\nabla(f_y - \frac1C\sum_i f_i)`, or "logsumexp", the marginal score.
        create_graph: whether the result can be differentiated.

    Raises:
        TypeError: x is not floating.
        ValueError: an unknown word, labels that do not fit.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> maps = input_gradient(model, torch.zeros(1, 3), torch.tensor([1]))
        >>> torch.equal(maps[0], model.weight[1])
        True
    """
    check_choice("of", of, Of)
    require_floating(x)
    off = torch.autocast(x.device.type, enabled=False)
    with torch.enable_grad(), evaluation_mode(model), off:
        point = x.detach().requires_grad_()
        logits = model(point)
        labels = logits.detach().argmax(1) if y is None else y
        value = _target(logits, labels, of)
        (slope,) = torch.autograd.grad(value.sum(), point, create_graph=create_graph)
    return slope


def smoothgrad(
    model: Model,
    x: Tensor,
    y: Tensor | None = None,
    of: Of = "logit",
    *,
    num_samples: int = 100,
    noise_level: float = 0.15,
    scale: Literal["image", "batch"] = "image",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the mean of input gradients at noisy inputs (Smilkov et al. 2017), the shape of x.

    Args:
        model: see `input_gradient`.
        x: (B, ...).
        y: (B,) class indices; None takes the classes predicted without noise.
        of: see `input_gradient`.
        num_samples: noisy copies, default 100, the authors'.
        noise_level: standard deviation of the noise as a fraction of the range of the values, default 0.15.
        scale: the range of each image, or of the whole batch as in the authors' code.
        generator: source of the noise, on x's device.

    Raises:
        ValueError: a number out of range.
    """
    check_count("num_samples", num_samples)
    check_choice("scale", scale, Literal["image", "batch"])
    if not math.isfinite(noise_level) or noise_level < 0:
        raise ValueError(f"noise_level must be a finite number of at least 0, got {noise_level!r}")
    require_floating(x)
    if y is None:
        with torch.no_grad(), evaluation_mode(model):
            y = model(x).argmax(1)
    flat = x.detach().flatten(1)
    span = flat.amax(1) - flat.amin(1)
    if scale == "batch":
        span = (flat.amax() - flat.amin()).expand(len(x))
    deviation = (noise_level * span).view(-1, *[1] * (x.ndim - 1))
    total = torch.zeros_like(x)
    for _ in range(num_samples):
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        total += input_gradient(model, x.detach() + deviation * noise, y, of)
    return total / num_samples


def reduce_channels(maps: Tensor, how: Reduction = "abs-sum") -> Tensor:
    """Return one value a pixel, (B, H, W), from maps (B, C, H, W); maps without channels keep their shape.

    Args:
        maps: input gradients.
        how: "abs-sum", "abs-max", or "std" over channels, the authors' code (0 for one channel).

    Raises:
        ValueError: an unknown word.
    """
    check_choice("how", how, Reduction)
    if maps.ndim < 4:
        return maps if how == "std" else maps.abs()
    if how == "std":
        return maps.std(1, correction=0)
    return maps.abs().sum(1) if how == "abs-sum" else maps.abs().amax(1)
