"""Unrolling: a network's next Adam steps as a differentiable function, for the unrolled-GAN baseline."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Parameters = dict[str, Tensor]


def unroll_adam(
    module: nn.Module,
    optimizer: torch.optim.Adam,
    loss: Callable[[Callable[[Tensor], Tensor]], Tensor],
    steps: int,
) -> Callable[[Tensor], Tensor]:
    """Return the module as it will be after `steps` steps of its Adam, differentiably.

    The steps start from the module's weights and the optimizer's moments and leave both, and the
    buffers, as they are. What the returned function computes can be differentiated with respect to
    everything that `loss` depends on, through all steps (Metz et al. 2017; the paper's baseline
    unrolls the discriminator 20 steps on MNIST).

    Args:
        module: the network that is unrolled.
        optimizer: its Adam, one group, without weight decay or AMSGrad.
        loss: maps the network, as a function, to the scalar that Adam would minimise; called once a step.
        steps: how many, at least 0.

    Raises:
        ValueError: `steps` is negative, or the optimizer has an option that is not unrolled.
    """
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    if len(optimizer.param_groups) != 1:
        raise ValueError(
            f"only one parameter group is unrolled, the optimizer has {len(optimizer.param_groups)}"
        )
    (group,) = optimizer.param_groups
    if group["weight_decay"] or group["amsgrad"]:
        raise ValueError("only Adam without weight decay and AMSGrad is unrolled")
    (beta1, beta2), lr, eps = group["betas"], group["lr"], group["eps"]
    sign = -1 if group["maximize"] else 1
    weights: Parameters = dict(module.named_parameters())
    buffers = {name: value.clone() for name, value in module.named_buffers()}

    def moment(parameter: Tensor, key: str) -> Tensor:
        state = optimizer.state.get(parameter, {})
        return state[key].clone() if key in state else torch.zeros_like(parameter)

    first = {name: moment(value, "exp_avg") for name, value in weights.items()}
    second = {name: moment(value, "exp_avg_sq") for name, value in weights.items()}
    done = max((int(s["step"]) for s in optimizer.state.values() if "step" in s), default=0)

    def call(current: Parameters) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.func.functional_call(module, {**current, **buffers}, (x,))

    for step in range(done + 1, done + steps + 1):
        value = sign * loss(call(weights))
        gradients = torch.autograd.grad(value, list(weights.values()), create_graph=True)
        for name, gradient in zip(list(weights), gradients, strict=True):
            first[name] = beta1 * first[name] + (1 - beta1) * gradient
            second[name] = beta2 * second[name] + (1 - beta2) * gradient.square()
            scale = _safe_sqrt(second[name] / (1 - beta2**step)) + eps
            weights[name] = weights[name] - lr / (1 - beta1**step) * first[name] / scale
    return call(weights)


def _safe_sqrt(value: Tensor) -> Tensor:
    """Return the root, with the derivative 0 instead of infinity at 0 (a weight without gradient)."""
    positive = value > 0
    return torch.where(positive, value, 1).sqrt() * positive
