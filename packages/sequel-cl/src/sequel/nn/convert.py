"""Parameters of the zoo between PyTorch's layout and JAX's."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from sequel.nn.torch import CNN, MLP

__all__ = ["params_to_jax", "params_to_torch", "to_jax"]


def _swap(name: str, value: np.ndarray[Any, Any], back: bool) -> np.ndarray[Any, Any]:
    if value.ndim == 4:
        value = value.transpose((3, 2, 0, 1) if back else (2, 3, 1, 0))
    elif value.ndim == 2 and name.endswith("weight"):
        value = value.T
    return np.ascontiguousarray(value)


def params_to_jax(model: nn.Module, params: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the parameters of a zoo model as NumPy arrays in JAX's layout.

    Linear weights are transposed and kernels go from OIHW to HWIO. The zoo's JAX models flatten images in
    PyTorch's order, so the layer behind needs no more. ``params`` are other trees of the same names.
    """
    source = dict(model.named_parameters()) if params is None else params
    host = {
        k: v.detach().cpu().numpy() if hasattr(v, "detach") else np.asarray(v)
        for k, v in source.items()
    }
    return {k: _swap(k, v, False) for k, v in host.items()}


def params_to_torch(model: nn.Module, params: dict[str, Any]) -> dict[str, Any]:
    """Return JAX parameters of a zoo model in PyTorch's layout, as NumPy arrays."""
    names = {name for name, _ in model.named_parameters()}
    return {k: _swap(k, np.asarray(v), True) for k, v in params.items() if k in names}


def to_jax(model: MLP | CNN) -> Any:
    """Return the JAX model of the zoo with the same weights and dtype.

    >>> from sequel.nn import MLP
    >>> to_jax(MLP(4, (8,), 3)).params["classifier.weight"].shape
    (8, 3)
    """
    import jax.numpy as jnp

    from sequel.nn import jax as zoo

    first = model.encoder[0] if isinstance(model, CNN) else model.encoder[1]
    if isinstance(model, CNN):
        parts = [m for m in model.encoder if isinstance(m, nn.Conv2d)]
        made = zoo.CNN(
            (parts[0].in_channels, 1, 1),
            model.classifier.out_features,
            channels=[p.out_channels for p in parts],
        )
    else:
        layers = [m for m in model.encoder if isinstance(m, nn.Linear)]
        noise = [m.p for m in model.encoder if isinstance(m, nn.Dropout)]
        made = zoo.MLP(
            layers[0].in_features,
            [m.out_features for m in layers],
            model.classifier.out_features,
            dropout=noise[0] if noise else 0.0,
        )
    dtype = first.weight.detach().numpy().dtype  # type: ignore[operator]
    made.params = {k: jnp.asarray(v, dtype) for k, v in params_to_jax(model).items()}
    return made
