"""The rows of the paper's comparison, each as a choice of layers and loss terms (Section 5)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lcnn.adapters.convert import convert
from lcnn.core.activation import CenteredSoftplus

__all__ = ["METHODS", "Method", "build"]


@dataclass(frozen=True)
class Method:
    """How to build the network and what to add to the loss.

    ``beta``: the constant beta of plain softplus activations; None converts to learnable centered softplus.
    ``layers``: options of :func:`lcnn.convert`. ``loss``: options of :class:`lcnn.LCNNLoss`.
    ``adversarial``: training on l2 PGD examples of 3 steps with this radius.
    """

    title: str
    beta: float | None = 1000.0
    layers: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    adversarial: float = 0.0


_OFF = {"beta": 0.0, "lipschitz": 0.0}
_ON = {"beta": 1e-2, "lipschitz": 1e-2}
_BARE = {"norm": "keep", "conv": "none", "linear": "none"}

METHODS: dict[str, Method] = {
    "standard": Method("Standard", loss=_OFF),
    "lcnn": Method("LCNN", None, loss=_ON),
    "gradreg": Method("GradReg", loss={**_OFF, "gradnorm": 6.1e-3}),
    "lcnn+gradreg": Method("LCNN + GradReg", None, loss={**_ON, "gradnorm": 6.1e-3}),
    "cure": Method("CURE", loss={**_OFF, "cure": 6.1e-5}),
    "softplus": Method("Softplus + weight decay", 10.0, loss=_OFF),
    "log-bound": Method("LCNN, log-bound", None, loss={**_ON, "form": "log_bound"}),
    "jvp": Method("LCNN, JVP proxy", None, loss={**_OFF, "lipschitz": 1e-2, "jvp": 1e-2}),
    "minimal": Method("Minimal recipe", None, _BARE, {"beta": 1e-2, "gradnorm": 6.1e-3}),
    "adversarial": Method("Adversarial training, 3 steps", loss=_OFF, adversarial=0.1),
}


def _replaced(model: nn.Module, kind: type[nn.Module], make: Callable[[], nn.Module]) -> nn.Module:
    """Return a copy with a new module in place of every one of a kind."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, kind):
                setattr(module, name, make())
    return model


def with_softplus(model: nn.Module, beta: float) -> nn.Module:
    """Return a copy with ``nn.Softplus(beta)`` in place of every ReLU, so that Hessians exist.

    Example:
        >>> with_softplus(nn.Sequential(nn.ReLU()), 1000.0)
        Sequential(
          (0): Softplus(beta=1000.0, threshold=20.0)
        )
    """
    return _replaced(model, nn.ReLU, lambda: nn.Softplus(beta))


def with_own_activations(model: nn.Module, beta: float | None) -> nn.Module:
    """Return a copy of a standard network of ``lcnn.models`` with other activations and nothing else changed.

    ``beta`` is that of ``nn.Softplus``; None for learnable centered softplus (the minimal recipe).

    Example:
        >>> with_own_activations(nn.Sequential(nn.Softplus(1000.0)), 10.0)
        Sequential(
          (0): Softplus(beta=10.0, threshold=20.0)
        )
    """
    if beta is None:
        return _replaced(model, nn.Softplus, CenteredSoftplus)
    return _replaced(model, nn.Softplus, lambda: nn.Softplus(beta))


def build(
    model: nn.Module, method: str, example_input: Tensor, *, beta_init: float = 5.0
) -> nn.Module:
    """Return ``model``, a plain ReLU network, as a row of the comparison needs it.

    Args:
        model: a network with ``nn.ReLU`` modules.
        method: a key of ``METHODS``.
        example_input: one batch.
        beta_init: where learnable betas start.

    Raises:
        ValueError: for an unknown method.

    Example:
        >>> import torch
        >>> build(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "lcnn", torch.zeros(1, 2))[1]
        CenteredSoftplus(beta=5)
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    row = METHODS[method]
    if row.beta is not None:
        return with_softplus(model, row.beta)
    return convert(model, example_input, beta_init=beta_init, **row.layers)
