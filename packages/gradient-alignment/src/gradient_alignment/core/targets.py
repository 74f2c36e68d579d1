"""Scalar functions of a classifier's input: the class logit and its relatives, one number for each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Target = Literal["label", "predicted", "logsumexp", "logprob", "loss"] | Callable[[Tensor], Tensor]
_WORDS = ("label", "predicted", "logsumexp", "logprob", "loss")


def check_target(of: Target) -> None:
    """Raise ValueError unless `of` is a known word or callable."""
    if not callable(of) and of not in _WORDS:
        raise ValueError(
            f"of must be callable or one of {', '.join(map(repr, _WORDS))}; got {of!r}"
        )


def check_labels(logits: Tensor, y: Tensor | None, validate: bool | None = None) -> None:
    """Check class indices against logits.

    Args:
        logits: (B, C).
        y: (B,) integers in 0..C-1.
        validate: whether to look at the values; None looks on the CPU only, where it costs no
            synchronisation.

    Raises:
        ValueError: labels are missing, not integers, of another length, or out of range.
    """
    if y is None:
        raise ValueError("y is needed: this target depends on the labels")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"y must hold integer class indices, got {y.dtype}")
    if y.shape != logits.shape[:1]:
        raise ValueError(f"y must have shape ({len(logits)},), got {tuple(y.shape)}")
    look = y.device.type == "cpu" if validate is None else validate
    if look and len(y) and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in y.aminmax())
        if low < 0 or high >= logits.shape[1]:
            raise ValueError(f"y must be in 0..{logits.shape[1] - 1}, got {low}..{high}")


def pick(logits: Tensor, y: Tensor | None, of: Target = "label") -> Tensor:
    r"""Return one number for each sample from the logits, (B,).

    Args:
        logits: (B, C); with a callable `of` whatever it takes.
        y: (B,) class indices; needed by "label", "logprob" and "loss".
        of: "label" :math:`f_y`, "predicted" :math:`\max_i f_i`, "logsumexp" :math:`\log\sum_i e^{f_i}` (the marginal
            log-density), "logprob" :math:`\log\mathrm{softmax}(f)_y` (does not change when all logits shift), "loss"
            (its negative), or a function of the logits.

    Raises:
        ValueError: an unknown word, logits that are not (B, C), labels that do not fit.
    """
    check_target(of)
    if callable(of):
        return of(logits)
    if logits.ndim != 2:
        raise ValueError(
            f"the model must return (B, C) logits, got {tuple(logits.shape)}; other outputs need a callable `of`"
        )
    if of == "predicted":
        return logits.amax(1)
    if of == "logsumexp":
        return logits.logsumexp(1)
    check_labels(logits, y)
    assert y is not None
    y = y.long()
    if of == "label":
        return logits.gather(1, y.unsqueeze(1)).squeeze(1)
    loss = F.cross_entropy(logits, y, reduction="none")
    return loss if of == "loss" else -loss


def class_logit(
    model: Callable[[Tensor], Tensor], y: Tensor | None = None, of: Target = "label"
) -> Callable[[Tensor], Tensor]:
    """Return x -> (B,), a scalar function of a classifier's input, for the functions of this package.

    A batch that repeats the samples (several draws at once) gets its labels repeated.

    Args:
        model: maps (B, ...) to logits (B, C).
        y: (B,) class indices.
        of: see `pick`.

    Example:
        >>> import torch
        >>> fn = class_logit(torch.nn.Linear(3, 5), torch.tensor([0, 4]))
        >>> fn(torch.zeros(2, 3)).shape, fn(torch.zeros(6, 3)).shape
        (torch.Size([2]), torch.Size([6]))
    """
    check_target(of)

    def fn(x: Tensor) -> Tensor:
        labels = y
        if y is not None and len(y) and len(x) != len(y) and len(x) % len(y) == 0:
            labels = y.repeat(len(x) // len(y))
        return pick(model(x), labels, of)

    return fn
