"""Saliency maps that show what one wants: functions added to all logits, and how to be immune to them.

For any g, the logits f_i + g give the same probabilities, the same loss and the same loss gradients as f_i, and the
logit gradients ∇f_i + ∇g, which can be anything (Srinivas and Fleuret 2021, Section 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradient_alignment.core.noise import check_choice, check_positive
from gradient_alignment.interpret.saliency import Model, input_gradient

Kind = Literal["linear", "quadratic", "masked", "highfreq"]
Invariance = Literal["mean", "logsumexp"]


class LinearShift(nn.Module):
    """g(x) = s⟨a, x⟩, whose gradient is s·a everywhere.

    Args:
        pattern: a, the shape of one input.
        scale: s.
        mask: multiplies the pattern; None is no mask.
    """

    pattern: Tensor

    def __init__(self, pattern: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("pattern", scale * (pattern if mask is None else pattern * mask))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B,)."""
        return x.flatten(1) @ self.pattern.flatten()


class QuadraticShift(nn.Module):
    """g(x) = -½ s‖x - a‖², whose gradient s(a - x) points from the input to the pattern.

    Args:
        pattern: a, the shape of one input.
        scale: s.
    """

    pattern: Tensor

    def __init__(self, pattern: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("pattern", pattern)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Return (B,)."""
        return -0.5 * self.scale * (x - self.pattern).flatten(1).square().sum(1)


class HighFrequencyShift(nn.Module):
    """g_i(x) = s sin(m⟨1, x⟩ + i) for class i: loss gradients, too, are fooled, at a change of at most 2s.

    Gradients change by up to s·m in every entry, without bound as m grows. This is no shift: the classes differ.

    Args:
        amplitude: s.
        frequency: m.
    """

    def __init__(self, amplitude: float = 1e-3, frequency: float = 1e4) -> None:
        super().__init__()
        self.amplitude, self.frequency = amplitude, frequency

    def forward(self, x: Tensor, num_classes: int) -> Tensor:
        """Return (B, C)."""
        phase = torch.arange(num_classes, device=x.device, dtype=x.dtype)
        angle = self.frequency * x.flatten(1).sum(1, keepdim=True) + phase
        return self.amplitude * torch.sin(angle)


def linear_shift(pattern: Tensor, scale: float = 1.0) -> LinearShift:
    """Return g(x) = s⟨a, x⟩ for a pattern a of one input's shape; see `LinearShift`."""
    return LinearShift(pattern, scale)


class ShiftedLogits(nn.Module):
    """A classifier with a function of the input added to its logits.

    Args:
        model: maps (B, ...) to logits (B, C).
        g: maps (B, ...) to (B,) (or (B, 1)), added to all classes; a `HighFrequencyShift` differs by class.

    Raises:
        ValueError: in the forward pass, if g returns anything else.

    Example:
        >>> import torch
        >>> from gradient_alignment import input_gradient
        >>> model, pattern = torch.nn.Linear(3, 2), torch.tensor([0.0, 9.0, 0.0])
        >>> fooled = ShiftedLogits(model, linear_shift(pattern))
        >>> x, y = torch.randn(1, 3), torch.tensor([0])
        >>> (input_gradient(fooled, x, y) - input_gradient(model, x, y)).round(decimals=4).tolist()
        [[0.0, 9.0, 0.0]]
    """

    def __init__(self, model: nn.Module, g: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.g = model, g

    def forward(self, x: Tensor) -> Tensor:
        """Return the shifted logits, (B, C)."""
        logits: Tensor = self.model(x)
        if isinstance(self.g, HighFrequencyShift):
            shift: Tensor = self.g(x, logits.shape[1])
            return logits + shift
        shift = self.g(x)
        if shift.shape not in ((len(x),), (len(x), 1)):
            raise ValueError(f"g must return ({len(x)},), got {tuple(shift.shape)}")
        return logits + shift.view(-1, 1)


def fool(
    model: nn.Module,
    target_map: Tensor,
    scale: float | None = None,
    kind: Kind = "linear",
    *,
    mask: Tensor | None = None,
    frequency: float = 1e4,
) -> ShiftedLogits:
    """Return a classifier with the same predictions whose logit gradients show a given map.

    For a map that depends on the input see `fit_shift`; to train the deception into the network itself,
    `train_fooled`.

    Args:
        model: classifier.
        target_map: what the gradients shall show, the shape of one input.
        scale: strength; large against the model's own gradients, default 100. For "highfreq" the amplitude of the
            sine, by twice which losses may change; default 1e-3.
        kind: "linear" (the same map everywhere), "masked" (within `mask`), "quadratic" (the direction from the
            input to the map), or "highfreq" (loss gradients as well, approximately; the map is not used).
        mask: of "masked", the shape of the map.
        frequency: of "highfreq".

    Raises:
        ValueError: an unknown kind, a scale that is not positive, "masked" without a mask.
    """
    check_choice("kind", kind, Kind)
    if scale is None:
        scale = 1e-3 if kind == "highfreq" else 100.0
    check_positive("scale", scale)
    if (kind == "masked") != (mask is not None):
        raise ValueError("mask is for kind='masked', which needs it")
    if kind == "highfreq":
        return ShiftedLogits(model, HighFrequencyShift(scale, frequency))
    if kind == "quadratic":
        return ShiftedLogits(model, QuadraticShift(target_map, scale))
    return ShiftedLogits(model, LinearShift(target_map, scale, mask))


def fit_shift(
    g: nn.Module,
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    target: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
) -> list[float]:
    r"""Train a shift that depends on the input: minimise :math:`\|\nabla f_y + \nabla g - T(x)\|^2`.

    `ShiftedLogits(model, g)` then predicts what the model predicts, with logit gradients near T(x) in so far as
    T - ∇f_y is a gradient.

    Args:
        g: maps (B, ...) to (B,) or (B, 1), smooth; changed in place.
        model: the classifier, evaluated in evaluation mode; left as it is.
        batches: pairs (x, y), passed through once.
        target: T, maps (B, ...) to the maps that the gradients shall show, of the same shape.
        optimizer: of g's parameters.

    Returns:
        the mean squared distance at every step.

    Raises:
        ValueError: g or the target return another shape.

    Example:
        >>> import torch
        >>> model, g = torch.nn.Linear(3, 2), torch.nn.Linear(3, 1)
        >>> data = [(torch.randn(8, 3), torch.zeros(8, dtype=torch.long))] * 100
        >>> losses = fit_shift(g, model, data, torch.ones_like, torch.optim.SGD(g.parameters(), lr=0.2))
        >>> (g.weight + model.weight[0]).detach().round(decimals=3).tolist()
        [[1.0, 1.0, 1.0]]
    """
    losses = []
    for x, y in batches:
        wanted = target(x.detach()).detach()
        if wanted.shape != x.shape:
            raise ValueError(f"target must return {tuple(x.shape)}, got {tuple(wanted.shape)}")
        missing = wanted - input_gradient(model, x, y)
        point = x.detach().requires_grad_()
        shift = g(point)
        if shift.shape not in ((len(x),), (len(x), 1)):
            raise ValueError(f"g must return ({len(x)},), got {tuple(shift.shape)}")
        (slope,) = torch.autograd.grad(shift.sum(), point, create_graph=True)
        loss = (slope - missing).flatten(1).square().sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def train_fooled(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    target_map: Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    weight: float = 1.0,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> list[float]:
    r"""Train a deception into a network: :math:`\ell + \lambda\|n(\nabla f_y) - n(T)\|^2`, n dividing by the norm.

    Args:
        model: classifier, smooth (see `soften`); changed in place, in the mode that it is in.
        batches: pairs (x, y), passed through once.
        target_map: T, the shape of one input.
        optimizer: of the model's parameters.
        weight: λ.
        loss_fn: the classifier's own loss.

    Returns:
        the mean cosine between gradients and map at every step.
    """
    if not math.isfinite(weight):
        raise ValueError(f"weight must be finite, got {weight!r}")
    wanted = F.normalize(target_map.flatten(), dim=0)
    cosines = []
    for x, y in batches:
        point = x.detach().requires_grad_()
        logits = model(point)
        chosen = logits.gather(1, y.unsqueeze(1)).sum()
        (slope,) = torch.autograd.grad(chosen, point, create_graph=True)
        shown = F.normalize(slope.flatten(1), dim=1)
        mismatch = (shown - wanted).square().sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss_fn(logits, y) + weight * mismatch)
        optimizer.step()
        cosines.append(float((shown.detach() @ wanted).mean()))
    return cosines


class ShiftInvariant(nn.Module):
    """A classifier with logits that no shift can change: minus their mean, or minus logsumexp.

    Args:
        model: maps (B, ...) to logits (B, C).
        mode: "mean" or "logsumexp" (log-probabilities).
    """

    def __init__(self, model: nn.Module, mode: Invariance = "mean") -> None:
        super().__init__()
        check_choice("mode", mode, Invariance)
        self.model, self.mode = model, mode

    def forward(self, x: Tensor) -> Tensor:
        """Return the centred logits, (B, C)."""
        logits: Tensor = self.model(x)
        if self.mode == "logsumexp":
            return logits.log_softmax(1)
        return logits - logits.mean(1, keepdim=True)


def shift_invariant(model: nn.Module, mode: Invariance = "mean") -> ShiftInvariant:
    """Return the classifier with logits that no shift can change; see `ShiftInvariant`.

    Raises:
        ValueError: an unknown mode.
    """
    return ShiftInvariant(model, mode)


def shift_sensitivity(
    attribution: Callable[[Model, Tensor, Tensor], Tensor],
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    g: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return how much an attribution changes when all logits shift, (B,): 1 - cosine between before and after.

    0 means that the method cannot be fooled by g, 1 that the maps have become unrelated, 2 opposite.

    Args:
        attribution: maps (model, x, y) to attributions of x's shape, e.g. `input_gradient`.
        model: classifier.
        x: (B, ...).
        y: (B,) class indices.
        g: the shift, maps (B, ...) to (B,).
    """
    before = attribution(model, x, y).flatten(1)
    after = attribution(ShiftedLogits(model, g), x, y).flatten(1)
    same = (before == after).all(1)
    cosine = F.cosine_similarity(before.double(), after.double(), dim=1)
    return torch.where(same, 0, 1 - cosine).to(x.dtype)
