"""The operations on ``jax.Array``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sequel.ops.base import Array, Ops, Tree

__all__ = ["JaxOps"]


class JaxOps(Ops):
    """JAX's side of the layer: pure, traceable."""

    name = "jax"
    xp = jnp

    def relu(self, x: Array) -> Array:
        return jax.nn.relu(x)

    def elu(self, x: Array) -> Array:
        return jax.nn.elu(x)

    def sigmoid(self, x: Array) -> Array:
        return jax.nn.sigmoid(x)

    def softplus(self, x: Array) -> Array:
        return jnp.logaddexp(x, 0.0)

    def log_softmax(self, x: Array) -> Array:
        return jax.nn.log_softmax(x, axis=-1)

    def concat(self, arrays: Sequence[Array]) -> Array:
        return jnp.concatenate(list(arrays))

    def take(self, x: Array, index: Array) -> Array:
        return jnp.take(x, index, axis=0, mode="clip")

    def pick(self, x: Array, column: Array) -> Array:
        return jnp.take_along_axis(x, column[:, None], axis=1)[:, 0]

    def scatter(self, x: Array, rows: Array, values: Array) -> Array:
        return x.at[rows].set(values.astype(x.dtype), mode="drop")

    def one_hot(self, y: Array, n: int, like: Array) -> Array:
        return jax.nn.one_hot(y, n, dtype=like.dtype)

    def asarray(self, value: Any, like: Array | None = None) -> Array:
        out = jnp.asarray(value)
        if like is not None and jnp.issubdtype(out.dtype, jnp.floating):
            out = out.astype(like.dtype)
        return out

    def cast(self, x: Array, like: Array) -> Array:
        return x.astype(like.dtype)

    def numpy(self, x: Array) -> np.ndarray[Any, Any]:
        return np.asarray(x)

    def stop_gradient(self, x: Any) -> Any:
        return jax.lax.stop_gradient(x)

    def neg(self, x: Array) -> float:
        return float(jnp.finfo(x.dtype).min) / 2

    def cho_solve(self, a: Array, b: Array) -> Array:
        return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(a), True), b)

    def host_call(self, fn: Callable[..., Any], like: Array, *args: Array) -> Array:
        shape = jax.ShapeDtypeStruct(like.shape, like.dtype)

        def run(*values: Any) -> Any:
            return np.asarray(fn(*(np.asarray(v) for v in values)), dtype=like.dtype)

        return jax.pure_callback(run, shape, *args, vmap_method="sequential")

    def map_rows(self, fn: Callable[[Any], Array], n: int, known: int | None) -> Array:
        return jax.lax.map(fn, jnp.arange(n))

    def copy(self, tree: Tree) -> Tree:
        return dict(tree)  # arrays are immutable

    def sub(self, a: Tree, b: Tree) -> Tree:
        return {name: a[name] - b[name] for name in a}

    def add_scaled(self, a: Tree, b: Tree, scale: Any) -> Tree:
        return {name: a[name] + scale * b[name] for name in a}

    def addcmul(self, a: Tree, b: Tree, c: Tree, scale: float) -> Tree:
        return {k: (x + scale * b[k] * c[k]).astype(x.dtype) for k, x in a.items()}

    def value_and_grad(
        self, fn: Callable[[Tree], tuple[Array, Any]], params: Tree, *, create_graph: bool = False
    ) -> tuple[tuple[Array, Any], Tree]:
        out: tuple[tuple[Array, Any], Tree] = jax.value_and_grad(fn, has_aux=True)(params)
        return out

    def per_sample_grad(self, fn: Callable[..., Array], params: Tree, *batch: Array) -> Tree:
        axes = (None, *(0 for _ in batch))
        out: Tree = jax.vmap(jax.grad(fn), in_axes=axes)(params, *batch)
        return out

    def jit(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = jax.jit(fn)
        return compiled
