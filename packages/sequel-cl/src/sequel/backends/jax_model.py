"""A JAX model over a flat dict of parameters, and the operations that carry its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sequel.nn.jax import FunctionalModel
from sequel.ops.base import Array, Tree
from sequel.ops.jax import JaxOps

__all__ = ["CellOps", "JaxModel"]


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


class CellOps(JaxOps):
    """Carries running statistics and keys out of gradients, where they may not leak as side effects."""

    def __init__(self) -> None:
        self.cell: dict[str, Any] = {}

    def value_and_grad(
        self, fn: Callable[[Tree], tuple[Array, Any]], params: Tree, *, create_graph: bool = False
    ) -> tuple[tuple[Array, Any], Tree]:
        before = dict(self.cell)

        def kept(p: Tree) -> tuple[Array, Any]:
            self.cell = dict(before)
            value, aux = fn(p)
            return value, (aux, self.cell)

        (value, (aux, cell)), grads = jax.value_and_grad(kept, has_aux=True)(params)
        self.cell = cell
        return (value, aux), grads

    def map_rows(self, fn: Callable[[Any], Array], n: int, known: int | None) -> Array:
        before = dict(self.cell)
        out = super().map_rows(fn, n, known)
        self.cell = before
        return out


class JaxModel:
    """A functional model over a flat dict of parameters."""

    def __init__(self, model: FunctionalModel, ops: CellOps) -> None:
        self.model, self.ops = model, ops
        leaves, self.tree = jax.tree_util.tree_flatten_with_path(model.params)
        self.names = [_name(path) for path, _ in leaves]
        # Copies: the training state is donated to the compiled step.
        self.start: Tree = {n: jnp.array(v) for n, (_, v) in zip(self.names, leaves, strict=True)}
        self.dtype = leaves[0][1].dtype
        self.encoder_names = frozenset(
            n for n in self.names if n.startswith((model.encoder + ".", model.encoder + "/"))
        )
        self.mean: Any = None
        self.std: Any = None
        self.n_classes = 0

    def has_encoder(self) -> bool:
        """Tell whether the model has features."""
        return self.model.features is not None

    def normalize(self, mean: Any, std: Any) -> None:
        """Set how uint8 inputs are normalised."""
        if mean is not None:
            shape = (-1, 1, 1) if np.ndim(mean) else ()
            self.mean = jnp.asarray(np.reshape(mean, shape), self.dtype)
            self.std = jnp.asarray(np.reshape(std, shape), self.dtype)

    def prepare(self, x: Array) -> Array:
        """Bring inputs to the parameters' dtype and layout; uint8 becomes (x / 255 - mean) / std."""
        if x.dtype == jnp.uint8:
            x = x.astype(self.dtype) / 255
            if self.mean is not None:
                x = (x - self.mean) / self.std
        elif jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(self.dtype)
        if self.model.layout == "NHWC" and x.ndim == 4:
            x = jnp.transpose(x, (0, 2, 3, 1))
        return x

    def unflatten(self, params: Tree) -> Any:
        """Return the user's pytree."""
        return jax.tree_util.tree_unflatten(self.tree, [params[n] for n in self.names])

    def forward(self, params: Tree, x: Array, train: bool) -> Array:
        """Return logits (B, C)."""
        tree, x = self.unflatten(params), self.prepare(x)
        if not self.model.stateful:
            return self.model.apply(tree, x)
        cell = self.ops.cell
        key, mine = jax.random.split(cell["key"])
        out, new = self.model.apply(tree, cell["collections"], x, train, mine)
        if train:
            self.ops.cell = {"key": key, "collections": new}
        return out

    def features(self, params: Tree, x: Array, train: bool) -> Array:
        """Return the encoder's output (B, d)."""
        if self.model.features is None:
            raise TypeError("the model has no features: FunctionalModel(..., features=...)")
        out = self.model.features(self.unflatten(params), self.prepare(x))
        return out.reshape(len(out), -1)
