"""Running statistics and Gammas of a converted network that was trained before."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lcnn.core.norm import LipschitzNorm
from lcnn.core.parametrize import refresh

__all__ = ["calibrate", "calibrate_calls"]


def calibrate(
    model: nn.Module, batches: Iterable[Any], *, margin: float = 1.0, power_iterations: int = 50
) -> nn.Module:
    """Fit a converted network to data, without gradients and in place.

    Normalising the convolutions of a trained network changes the scale that its batch norms see. This iterates
    the operator norms to convergence, re-estimates the running statistics as averages over ``batches``
    (inputs, or (input, label) pairs), and raises each Gamma that clips its layer to ``margin`` times the
    layer's slope, so that training starts from a network that computes what it computed.

    Args:
        model: a converted network.
        batches: tensors, or tuples whose first entry is the input.
        margin: factor on the slope.
        power_iterations: of every normalised convolution.

    Returns:
        ``model``.

    Raises:
        ValueError: for no batches.

    Example:
        >>> import lcnn
        >>> net = lcnn.convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), torch.zeros(1, 1, 6, 6))
        >>> _ = calibrate(net, [torch.randn(8, 1, 6, 6)])
        >>> bool(net[1].slope() == 1 / (net[1].running_var + 1e-5).sqrt().min())
        True
    """
    calls = ((batch,) if isinstance(batch, Tensor) else (batch[0],) for batch in batches)
    return calibrate_calls(model, calls, margin, power_iterations)


@torch.no_grad()
def calibrate_calls(
    model: nn.Module,
    calls: Iterable[tuple[Any, ...]],
    margin: float = 1.0,
    power_iterations: int = 50,
) -> nn.Module:
    """Calibrate on calls of the model, each a tuple of its arguments; see :func:`calibrate`."""
    calls = iter(calls)
    first = next(calls, None)
    if first is None:
        raise ValueError("batches is empty: calibration needs data")
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_var is not None]
    modes = {m: m.training for m in model.modules()}
    momenta = [(n, n.momentum) for n in norms]
    model.eval()
    for module in model.modules():
        for part in getattr(module, "parametrizations", {}).values():
            refresh(part[0], part.original, power_iterations)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True
    ours = [(n, n.log_lipschitz.clone()) for n in norms if isinstance(n, LipschitzNorm)]
    for gated, _ in ours:
        gated.log_lipschitz.fill_(80.0)  # nothing clips while the statistics are taken
    try:
        for args in itertools.chain([first], calls):
            model(*args)
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
        for gated, gamma in ours:
            gated.log_lipschitz.copy_(gamma)
        for module, mode in modes.items():
            module.training = mode
    for gated, gamma in ours:
        assert gated.running_var is not None
        own = -gated._inverse_slope(gated.running_var).log() + math.log(margin)
        gated.log_lipschitz.copy_(torch.maximum(gamma, own))
    return model
