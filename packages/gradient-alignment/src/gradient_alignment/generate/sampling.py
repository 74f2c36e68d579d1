"""Samples of the density that a classifier implies, and their test by an independent judge (GAN-test)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradient_alignment.core.noise import check_count, require_floating
from gradient_alignment.interpret.saliency import Model, evaluation_mode, input_gradient


def sample(
    model: Model,
    y: Tensor,
    *,
    steps: int = 500,
    lr: float = 0.1,
    weight_decay: float = 1e-2,
    init: str | Tensor = "gaussian",
    center: float = 0.5,
    noise: float = 0.0,
    clip: tuple[float, float] = (0.0, 1.0),
    shape: Sequence[int] | None = None,
    project: bool = True,
    generator: torch.Generator | None = None,
    return_path: bool = False,
) -> Any:
    r"""Climb the class logit from noise to images of the given classes (Section 5.2).

    :math:`x \leftarrow \mathrm{clip}(x + \eta(\nabla f_y(x) - w(x - c)) + \sqrt{2\eta T}\,\xi)`

    The authors' code is this with T = 0, no noise at all; with `noise` T > 0 it is Langevin dynamics.

    Args:
        model: maps (B, ...) to logits (B, C); evaluated in evaluation mode.
        y: (B,) the classes.
        steps: 500 for the GAN-test, 1,000 for pictures (the authors' code).
        lr: η.
        weight_decay: w, the pull towards `center`.
        init: "gaussian" starts at clip(N(center, 0.2²)), of the model's type, which needs `shape`; a tensor (B, ...) starts there,
            clipped.
        center: c.
        noise: temperature T.
        clip: smallest and largest value.
        shape: of one image, e.g. (3, 32, 32).
        project: clip after every step; False lets x leave the box, evaluates the model at clip(x) and clips at the
            end (activation maximisation as in the authors' code).
        generator: source of start and noise, on y's device.
        return_path: also return the path, (steps + 1, B, ...).

    Returns:
        (B, ...), with `return_path` a pair.

    Raises:
        ValueError: a number out of range, an unknown `init`, no shape for it.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> sample(model, torch.tensor([0, 1, 1]), shape=(4,), steps=3).shape
        torch.Size([3, 4])
    """
    check_count("steps", steps)
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("noise", noise)):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    low, high = clip
    if not low < high:
        raise ValueError(f"clip must be (low, high) with low < high, got {clip!r}")
    if isinstance(init, Tensor):
        require_floating(init)
        if len(init) != len(y):
            raise ValueError(f"init has {len(init)} images, y has {len(y)} labels")
        x = init.detach().clone()
    elif init == "gaussian":
        if shape is None:
            raise ValueError("shape is needed, the shape of one image, e.g. shape=(3, 32, 32)")
        parameters = model.parameters() if isinstance(model, nn.Module) else ()
        dtype = next((p.dtype for p in parameters if p.is_floating_point()), None)
        start = torch.randn((len(y), *shape), generator=generator, device=y.device, dtype=dtype)
        x = center + 0.2 * start
    else:
        raise ValueError(f"init must be 'gaussian' or a tensor, got {init!r}")
    x.clamp_(low, high)
    path = [x.clone()] if return_path else []
    with evaluation_mode(model):

        def climbed(point: Tensor) -> Tensor:
            return model(point if project else point.clamp(low, high))

        for _ in range(steps):
            slope = input_gradient(climbed, x, y)
            x.add_(slope - weight_decay * (x - center), alpha=lr)
            if noise:
                kick = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
                x.add_(kick, alpha=math.sqrt(2 * lr * noise))
            if project:
                x.clamp_(low, high)
            if return_path:
                path.append(x.clone())
    x.clamp_(low, high)
    return (x, torch.stack(path)) if return_path else x


@dataclass(frozen=True)
class GanTest:
    """Result of `gan_test`.

    Attributes:
        accuracy: share of samples that the judge assigns to the class that they were made for, in [0, 1].
        per_class: the same for every class, (C,); NaN for a class without samples.
        samples: (N, ...).
        labels: (N,).
    """

    accuracy: float
    per_class: Tensor
    samples: Tensor
    labels: Tensor


def gan_test(
    model: Model,
    judge: Callable[[Tensor], Any],
    *,
    num_samples: int = 1000,
    labels: Tensor | None = None,
    num_classes: int | None = None,
    batch_size: int = 256,
    **sample_arguments: Any,
) -> GanTest:
    """Sample from a classifier and let an independently trained one recognise the samples (Section 5.2).

    Args:
        model: the classifier that is tested.
        judge: maps samples (N, ...) to logits (N, C) or to class indices (N,), as tensor or array, so that
            scikit-learn's `predict` fits (for images behind a function that flattens them).
        num_samples: used where `labels` is None: classes in turn.
        labels: (N,) the classes to sample, e.g. those of a test set.
        num_classes: C; None takes the largest label plus one, and is not allowed without labels.
        batch_size: samples made at once.
        **sample_arguments: of `sample`; `shape` above all.

    Raises:
        ValueError: neither labels nor num_classes, no labels, verdicts of another shape; what `sample` raises.
    """
    check_count("batch_size", batch_size)
    if labels is None:
        if num_classes is None:
            raise ValueError("pass labels or num_classes")
        check_count("num_samples", num_samples)
        labels = torch.arange(num_samples) % num_classes
        device = next(model.parameters()).device if isinstance(model, nn.Module) else None
        labels = labels.to(device)
    if not len(labels):
        raise ValueError("labels is empty")
    init = sample_arguments.pop("init", "gaussian")
    made = []
    for start in range(0, len(labels), batch_size):
        part = slice(start, start + batch_size)
        own = init[part] if isinstance(init, Tensor) else init
        made.append(sample(model, labels[part], init=own, **sample_arguments))
    samples = torch.cat(made)
    with torch.no_grad(), evaluation_mode(judge):
        verdict = torch.as_tensor(judge(samples))
    classes = verdict.ndim == 2 and verdict.shape[1] > 1
    if len(verdict) != len(labels) or not (classes or verdict.ndim == 1):
        raise ValueError(
            f"judge must return ({len(labels)}, C) logits or ({len(labels)},) classes, got {tuple(verdict.shape)}"
        )
    predicted = verdict.argmax(1) if verdict.ndim == 2 else verdict
    right = (predicted.to(labels.device) == labels).double()
    count = num_classes or int(labels.max()) + 1
    totals = torch.bincount(labels, minlength=count).double()
    per_class = torch.bincount(labels, weights=right, minlength=count) / totals
    return GanTest(float(right.mean()), per_class, samples, labels)
