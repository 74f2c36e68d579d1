"""Optimiser groups: the adapters learn T times faster than the base."""

from __future__ import annotations

from typing import Any

from torch import nn

from palora.core.preference import state_of

__all__ = ["param_groups"]


def param_groups(
    model: nn.Module,
    lr: float,
    adapter_lr_scale: float | None = None,
    weight_decay: float = 0.0,
    *,
    decay_adapters: bool = False,
) -> list[dict[str, Any]]:
    """Return optimiser groups with the adapters' learning rate at ``lr·T``, the rest at ``lr``.

    Task t's adapter sees its gradient scaled by λ_t, which is 1/T on average.

    Args:
        model: an injected model.
        lr: learning rate of the base.
        adapter_lr_scale: factor for the adapters; None: T, as in the paper.
        weight_decay: of the base parameters.
        decay_adapters: apply it to the adapters as well.

    Raises:
        ValueError: the model has no trainable parameter.
        RuntimeError: the model is not injected.

    Example:
        >>> import torch, palora
        >>> net = palora.inject(nn.Linear(4, 4), 3, rank=1)
        >>> [g["lr"] for g in param_groups(net, lr=.5)]
        [0.5, 1.5]
    """
    tasks = len(state_of(model).tasks)
    base: list[nn.Parameter] = []
    adapters: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = name.rpartition(".")[2] in ("palora_A", "palora_B")
            (adapters if own else base).append(parameter)
    if not base and not adapters:
        raise ValueError("the model has no trainable parameter")
    factor = tasks if adapter_lr_scale is None else adapter_lr_scale
    groups: list[dict[str, Any]] = []
    if base:
        groups.append({"name": "base", "params": base, "lr": lr, "weight_decay": weight_decay})
    if adapters:
        decay = weight_decay if decay_adapters else 0.0
        groups.append(
            {"name": "adapters", "params": adapters, "lr": lr * factor, "weight_decay": decay}
        )
    return groups
