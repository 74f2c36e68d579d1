"""Parameters of the zoo between PyTorch's layout and JAX's."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from sequel.nn.torch import CNN, MLP

__all__ = ["params_to_jax", "params_to_torch", "to_jax"]


def _swap(name: str, value: np.ndarray[Any, Any], image: Any, back: bool) -> np.ndarray[Any, Any]:
    if value.ndim == 4:
        return value.transpose((3, 2, 0, 1) if back else (2, 3, 1, 0))
    if value.ndim != 2 or not name.endswith("weight"):
        return value
    if image is not None and name.startswith("classifier"):
        c, h, w = image
        if back:
            return value.reshape(h, w, c, -1).transpose(3, 2, 0, 1).reshape(value.shape[1], -1)
        return value.reshape(-1, c, h, w).transpose(2, 3, 1, 0).reshape(-1, len(value))
    return value.T


def params_to_jax(model: nn.Module, params: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the parameters of a zoo model as NumPy arrays in JAX's layout.

    Linear weights are transposed, kernels go from OIHW to HWIO, and the layer after a flattened image has its
    inputs reordered from (C, H, W) to (H, W, C). ``params`` are other trees of the same names.
    """
    source = dict(model.named_parameters()) if params is None else params
    image = getattr(model, "image", None)
    host = {k: np.array(v.detach() if hasattr(v, "detach") else v) for k, v in source.items()}
    return {k: np.ascontiguousarray(_swap(k, v, image, False)) for k, v in host.items()}


def params_to_torch(model: nn.Module, params: dict[str, Any]) -> dict[str, Any]:
    """Return JAX parameters of a zoo model in PyTorch's layout, as NumPy arrays."""
    image = getattr(model, "image", None)
    return {
        k: np.ascontiguousarray(_swap(k, np.asarray(v), image, True)) for k, v in params.items()
    }


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
    dtype = first.weight.detach().numpy().dtype  # type: ignore[union-attr, operator]
    made.params = {k: jnp.asarray(v, dtype) for k, v in params_to_jax(model).items()}
    return made
