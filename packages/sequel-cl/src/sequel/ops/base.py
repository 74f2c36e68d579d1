"""What an algorithm may do to arrays: operators common to both backends, and the names below.

An ``Array`` is a ``torch.Tensor`` or a ``jax.Array``; a ``Tree`` is a flat dict from parameter names to
arrays. Arithmetic, comparison, indexing, ``.sum()``, ``.mean()``, ``.reshape()`` and ``@`` are the arrays'
own; everything that differs between the backends is a method here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = Any
Tree = dict[str, Any]


class Ops(ABC):
    """Array operations of one backend; ``xp`` is its namespace (``torch`` or ``jax.numpy``)."""

    name: str
    xp: Any

    # ---------------------------------------------------------------- arrays
    def exp(self, x: Array) -> Array:
        """Return e^x."""
        return self.xp.exp(x)

    def log(self, x: Array) -> Array:
        """Return the natural logarithm."""
        return self.xp.log(x)

    def sqrt(self, x: Array) -> Array:
        """Return the square root."""
        return self.xp.sqrt(x)

    def abs(self, x: Array) -> Array:
        """Return the absolute value."""
        return self.xp.abs(x)

    def cos(self, x: Array) -> Array:
        """Return the cosine."""
        return self.xp.cos(x)

    def where(self, condition: Array, a: Array, b: Array) -> Array:
        """Return a where the condition holds, else b."""
        return self.xp.where(condition, a, b)

    def clip(self, x: Array, low: float | None, high: float | None) -> Array:
        """Return x limited to [low, high]."""
        return self.xp.clip(x, low, high)

    def einsum(self, formula: str, *arrays: Array) -> Array:
        """Return an Einstein summation."""
        return self.xp.einsum(formula, *arrays)

    def stack(self, arrays: Sequence[Array]) -> Array:
        """Stack along a new first axis."""
        return self.xp.stack(list(arrays))

    def isfinite(self, x: Array) -> Array:
        """Tell where x is finite."""
        return self.xp.isfinite(x)

    @abstractmethod
    def relu(self, x: Array) -> Array:
        """Return max(x, 0)."""

    @abstractmethod
    def elu(self, x: Array) -> Array:
        """Return x for x > 0, else e^x - 1."""

    @abstractmethod
    def sigmoid(self, x: Array) -> Array:
        """Return 1 / (1 + e^-x)."""

    @abstractmethod
    def softplus(self, x: Array) -> Array:
        """Return log(1 + e^x), stable."""

    @abstractmethod
    def log_softmax(self, x: Array) -> Array:
        """Return log softmax over the last axis."""

    @abstractmethod
    def concat(self, arrays: Sequence[Array]) -> Array:
        """Concatenate along the first axis."""

    @abstractmethod
    def take(self, x: Array, index: Array) -> Array:
        """Return rows of x."""

    @abstractmethod
    def pick(self, x: Array, column: Array) -> Array:
        """Return x[n, column[n]] of a matrix."""

    def nll(self, logits: Array, y: Array) -> Array:
        """Return the cross-entropy of every row."""
        return -self.pick(self.log_softmax(logits), y)

    def mean_nll(self, logits: Array, y: Array) -> Array:
        """Return the mean cross-entropy of all rows."""
        return self.nll(logits, y).mean()

    @abstractmethod
    def scatter(self, x: Array, rows: Array, values: Array) -> Array:
        """Write values into rows of x; rows >= len(x) are dropped. In place where that is possible."""

    @abstractmethod
    def one_hot(self, y: Array, n: int, like: Array) -> Array:
        """Return the (N, n) indicator matrix in the dtype of ``like``."""

    @abstractmethod
    def asarray(self, value: Any, like: Array | None = None) -> Array:
        """Bring host values to the device; floats take the dtype of ``like`` where it is given."""

    @abstractmethod
    def cast(self, x: Array, like: Array) -> Array:
        """Return x in the dtype of ``like``."""

    @abstractmethod
    def numpy(self, x: Array) -> np.ndarray[Any, Any]:
        """Return host values."""

    @abstractmethod
    def stop_gradient(self, x: Any) -> Any:
        """Treat an array, or every array of a tree, as a constant."""

    @abstractmethod
    def neg(self, x: Array) -> float:
        """Return the value that masks a logit: half of the most negative finite one."""

    @abstractmethod
    def cho_solve(self, a: Array, b: Array) -> Array:
        """Solve a x = b for a positive definite a, by its Cholesky factor."""

    @abstractmethod
    def host_call(self, fn: Callable[..., Any], like: Array, *args: Array) -> Array:
        """Call a NumPy function; the result has the shape and dtype of ``like``."""

    @abstractmethod
    def map_rows(self, fn: Callable[[Any], Array], n: int, known: int | None) -> Array:
        """Stack fn(0), ..., fn(n - 1); where ``known`` rows are wanted and loops are free, only those."""

    # ----------------------------------------------------------------- trees
    def map(self, fn: Callable[..., Array], *trees: Tree) -> Tree:
        """Apply fn to corresponding leaves."""
        return {name: fn(*(tree[name] for tree in trees)) for name in trees[0]}

    def zeros_like(self, tree: Tree) -> Tree:
        """Return a tree of zeros."""
        return {name: self.xp.zeros_like(leaf) for name, leaf in tree.items()}

    def wide(self, tree: Tree) -> Tree:
        """Return the tree with 16-bit floats as float32: importances are sums of tiny squares."""
        half, single = (self.xp.float16, self.xp.bfloat16), self.xp.zeros((), dtype=self.xp.float32)
        return self.map(lambda x: self.cast(x, single) if x.dtype in half else x, tree)

    @abstractmethod
    def copy(self, tree: Tree) -> Tree:
        """Return detached copies of the leaves."""

    @abstractmethod
    def sub(self, a: Tree, b: Tree) -> Tree:
        """Return a - b."""

    @abstractmethod
    def add_scaled(self, a: Tree, b: Tree, scale: Any) -> Tree:
        """Return a + scale b, as a new tree."""

    @abstractmethod
    def addcmul(self, a: Tree, b: Tree, c: Tree, scale: float) -> Tree:
        """Return a + scale b c, as a new tree."""

    def accumulate(self, total: Tree, b: Tree, c: Tree, scale: float) -> Tree:
        """Return total + scale b c; total is used up, so that PyTorch may write into it."""
        return self.addcmul(total, b, c, scale)

    def pull(
        self, grads: Tree, params: Tree, omega: Tree, anchor: Tree, lam: float, *, keep: bool
    ) -> Tree:
        """Return grads + lam omega (params - anchor); grads is used up unless it is to be kept."""
        return self.addcmul(grads, omega, self.sub(params, anchor), lam)

    def sub_from(self, a: Tree, b: Tree) -> Tree:
        """Return a - b; a is used up, so that PyTorch may write into it."""
        return self.sub(a, b)

    def dot(self, a: Tree, b: Tree) -> Array:
        """Return the inner product of two trees."""
        total: Array = sum((a[name] * b[name]).sum() for name in a)
        return total

    def flatten(self, tree: Tree) -> Array:
        """Concatenate all leaves into one vector."""
        return self.concat([leaf.reshape(-1) for leaf in tree.values()])

    def unflatten(self, vector: Array, like: Tree) -> Tree:
        """Cut a vector into leaves of the shapes of ``like``."""
        out, at = {}, 0
        for name, leaf in like.items():
            size = int(np.prod(leaf.shape))
            out[name] = vector[at : at + size].reshape(leaf.shape)
            at += size
        return out

    # ------------------------------------------------------------ derivatives
    @abstractmethod
    def value_and_grad(
        self, fn: Callable[[Tree], tuple[Array, Any]], params: Tree, *, create_graph: bool = False
    ) -> tuple[tuple[Array, Any], Tree]:
        """Return ``fn(params) = (value, aux)`` and the gradient of the value.

        ``create_graph=True`` lets an outer ``value_and_grad`` differentiate through the gradient.
        """

    def grad(
        self, fn: Callable[[Tree], Array], params: Tree, *, create_graph: bool = False
    ) -> Tree:
        """Return the gradient of a scalar function of the parameters."""
        return self.value_and_grad(lambda p: (fn(p), None), params, create_graph=create_graph)[1]

    @abstractmethod
    def per_sample_grad(self, fn: Callable[..., Array], params: Tree, *batch: Array) -> Tree:
        """Return the gradients of ``fn(params, *row)`` for every row, stacked along a first axis."""

    def per_sample_sum(
        self, fn: Callable[..., Array], params: Tree, w: Array, power: int, *batch: Array
    ) -> Tree:
        """Return ``Σ_n w_n |∂ fn(params, row n)|^power`` (power 1 or 2), in single precision or wider."""

        def total(g: Array) -> Array:
            size = g * g if power == 2 else self.abs(g)
            return (self.cast(w, g) @ size.reshape(len(w), -1)).reshape(g.shape[1:])

        return self.map(total, self.wide(self.per_sample_grad(fn, params, *batch)))

    @abstractmethod
    def jit(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Compile where the backend compiles."""
