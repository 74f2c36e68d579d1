"""Fold one preference into the weights: a plain model again, with no overhead left."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from palora.core import functional as PF
from palora.core.inject import adapted_layers, strip, weight_of
from palora.core.layers import Switched
from palora.core.preference import PreferenceLike, as_preference, state_of
from palora.core.targets import is_quantised

__all__ = ["layer_delta", "merge"]


def layer_delta(layer: Any, lam: Tensor, dtype: torch.dtype) -> Tensor:
    """Return s Σ λ_t B_t A_t of one adapted layer in the shape of its weight."""
    spec = layer._palora_spec
    A, B = layer.palora_A.detach().to(dtype), layer.palora_B.detach().to(dtype)
    lam = lam.to(A.device, dtype)
    if spec.exponent != 1.0:
        lam = lam.pow(spec.exponent)
        lam = lam / lam.sum()
    if spec.mode == "split":
        blocks = zip(A.chunk(3, 1), B.chunk(3, 1), strict=True)
        return torch.cat([PF.delta_weight(a, b, lam, spec.scale) for a, b in blocks])
    delta = PF.delta_weight(A, B, lam, spec.scale)
    return (delta.t() if spec.transposed else delta).reshape(weight_of(layer).shape)


def _detached_copy(model: nn.Module, share: bool) -> nn.Module:
    """A copy of the model; adapters are not copied, nor (``share``) weights that stay."""
    layers = [layer for _, layer in adapted_layers(model)]
    changed = {id(weight_of(layer)) for layer in layers}
    state = state_of(model)
    memo: dict[int, Any] = {id(state): state}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            adapter = isinstance(module, Switched) and key in ("palora_A", "palora_B")
            if parameter is not None and (adapter or (share and id(parameter) not in changed)):
                memo[id(parameter)] = parameter
        if share:
            for buffer in module._buffers.values():
                if buffer is not None:
                    memo[id(buffer)] = buffer
    return copy.deepcopy(model, memo)


def merge(
    model: nn.Module, lam: PreferenceLike, inplace: bool = False, *, share: bool = False
) -> nn.Module:
    """Return a plain model with the weights W(λ): original classes, keys and hooks, no adapters.

    The sum is formed in float64 on a CPU (float32 elsewhere) and then cast to the weight's dtype.

    Args:
        model: an injected model; it stays injected unless ``inplace``.
        lam: one preference, as in :func:`palora.preference`.
        inplace: merge into the model itself.
        share: with ``inplace=False``, let the copy refer to the weights that are not adapted
            instead of copying them.

    Raises:
        RuntimeError: the model is not injected (or merged already).
        ValueError: λ is one per sample, or not on the simplex.
        NotImplementedError: a base layer is quantised.

    Example:
        >>> import palora
        >>> net = palora.inject(nn.Linear(4, 2), 2, rank=1)
        >>> type(merge(net, [.5, .5]))
        <class 'torch.nn.modules.linear.Linear'>
    """
    state = state_of(model)
    value = as_preference(lam, state.tasks).detach()
    if value.dim() != 1:
        raise ValueError(
            f"merge takes one preference ({len(state.tasks)},), got one per sample: "
            f"{tuple(value.shape)}"
        )
    for name, layer in adapted_layers(model):
        if is_quantised(layer):
            raise NotImplementedError(
                f"layer {name!r} has a quantised weight: W(λ) cannot be written into it; keep the "
                "adapters, or dequantise the model first"
            )
    target = model if inplace else _detached_copy(model, share)
    layers = adapted_layers(target)
    holders: dict[int, set[int]] = {}
    for module in target.modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), set()).add(id(module))
    groups: dict[int, list[Any]] = {}
    for _, layer in layers:
        groups.setdefault(id(weight_of(layer)), []).append(layer)
    with torch.no_grad():
        for key, members in groups.items():
            first = members[0]
            weight = weight_of(first)
            exact = torch.float64 if weight.device.type == "cpu" else torch.float32
            merged = (weight.to(exact) + layer_delta(first, value, exact)).to(weight.dtype)
            if holders[key] == {id(m) for m in members}:
                weight.copy_(merged)
                continue
            # the weight is tied to a layer without adapters, which must keep W: untie it
            untied = nn.Parameter(merged, requires_grad=weight.requires_grad)
            for layer in members:
                slot = "in_proj_weight" if layer._palora_spec.kind == "attention" else "weight"
                layer._parameters[slot] = untied
    strip(target)
    return target
