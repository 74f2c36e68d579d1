"""The operations on ``torch.Tensor``; trees go through the foreach kernels."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sequel.ops.base import Array, Ops, Tree

__all__ = ["TorchOps"]


class TorchOps(Ops):
    """PyTorch's side of the layer, on one device."""

    name = "torch"
    xp = torch

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.loss_scale = 1.0  # float16: losses are multiplied, and their gradients divided
        self.last_value: Tensor | None = None

    def relu(self, x: Array) -> Array:
        return torch.relu(x)

    def elu(self, x: Array) -> Array:
        return torch.nn.functional.elu(x)

    def sigmoid(self, x: Array) -> Array:
        return torch.sigmoid(x)

    def softplus(self, x: Array) -> Array:
        return torch.logaddexp(x, torch.zeros_like(x))

    def log_softmax(self, x: Array) -> Array:
        return torch.log_softmax(x, -1)

    def concat(self, arrays: Sequence[Array]) -> Array:
        return torch.cat(list(arrays))

    def take(self, x: Array, index: Array) -> Array:
        if isinstance(index, Tensor) and index.dtype == torch.int64 and index.ndim == 1:
            return x.index_select(0, index)  # a quarter of the time of x[index]
        return x[index]

    def pick(self, x: Array, column: Array) -> Array:
        return x.gather(1, column[:, None])[:, 0]

    def nll(self, logits: Array, y: Array) -> Array:
        return torch.nn.functional.cross_entropy(logits, y, reduction="none")

    def mean_nll(self, logits: Array, y: Array) -> Array:
        return torch.nn.functional.cross_entropy(logits, y)

    def scatter(self, x: Array, rows: Array, values: Array) -> Array:
        keep = rows < len(x)
        x[rows[keep]] = values[keep].to(x.dtype)
        return x

    def one_hot(self, y: Array, n: int, like: Array) -> Array:
        return torch.nn.functional.one_hot(y, n).to(like.dtype)

    def asarray(self, value: Any, like: Array | None = None) -> Array:
        plain = type(value) is np.ndarray and value.dtype == np.int64 and value.ndim == 1
        if plain and value.flags.c_contiguous and value.flags.writeable:
            return torch.from_numpy(value).to(self.device)  # a step's indices take the short way
        if isinstance(value, Tensor):
            out = value.to(self.device)
        else:
            array = np.ascontiguousarray(value)
            if np.ndim(value) == 0:
                array = array.reshape(())
            if not array.flags.writeable:
                array = array.copy()
            out = torch.from_numpy(array).to(self.device)
        if like is not None and out.is_floating_point():
            out = out.to(like.dtype)
        elif not out.is_floating_point() and out.dtype in (torch.int32, torch.int16):
            out = out.long()
        return out

    def cast(self, x: Array, like: Array) -> Array:
        return x.to(like.dtype)

    def numpy(self, x: Array) -> np.ndarray[Any, Any]:
        x = x.detach().cpu()
        out: np.ndarray[Any, Any] = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
        return out

    def stop_gradient(self, x: Any) -> Any:
        if isinstance(x, dict):
            return {name: leaf.detach() for name, leaf in x.items()}
        return x.detach()

    def neg(self, x: Array) -> float:
        return float(torch.finfo(x.dtype).min) / 2

    def cho_solve(self, a: Array, b: Array) -> Array:
        return torch.cholesky_solve(b, torch.linalg.cholesky(a))

    def host_call(self, fn: Callable[..., Any], like: Array, *args: Array) -> Array:
        return self.asarray(fn(*(self.numpy(a) for a in args)), like)

    def map_rows(self, fn: Callable[[Any], Array], n: int, known: int | None) -> Array:
        return torch.stack([fn(i) for i in range(n if known is None else known)])

    def copy(self, tree: Tree) -> Tree:
        with torch.no_grad():
            return {name: leaf.detach().clone() for name, leaf in tree.items()}

    def sub(self, a: Tree, b: Tree) -> Tree:
        with torch.no_grad():
            return _named(a, torch._foreach_sub(_leaves(a), _leaves(b)))

    def add_scaled(self, a: Tree, b: Tree, scale: Any) -> Tree:
        with torch.no_grad():
            if isinstance(scale, (int, float)):
                return _named(a, torch._foreach_add(_leaves(a), _leaves(b), alpha=scale))
            return _named(a, torch._foreach_add(_leaves(a), torch._foreach_mul(_leaves(b), scale)))

    def addcmul(self, a: Tree, b: Tree, c: Tree, scale: float) -> Tree:
        with torch.no_grad():
            leaves = torch._foreach_addcmul(_leaves(a), _leaves(b), _leaves(c), value=scale)
            return _named(a, [new.to(x.dtype) for new, x in zip(leaves, _leaves(a), strict=True)])

    def pull(
        self, grads: Tree, params: Tree, omega: Tree, anchor: Tree, lam: float, *, keep: bool
    ) -> Tree:
        # Leaf by leaf: the difference is still in the cache, and no second tree is held.
        out: Tree = {}
        users = Counter(g.untyped_storage().data_ptr() for g in grads.values())
        with torch.no_grad():
            for name, g in grads.items():
                away = params[name] - anchor[name]
                whole = g.untyped_storage().nbytes() == g.nbytes  # else it may be expanded
                if keep or not whole or users[g.untyped_storage().data_ptr()] > 1:
                    torch.addcmul(g, omega[name], away, value=lam, out=away)
                    out[name] = away if away.dtype == g.dtype else away.to(g.dtype)
                else:
                    out[name] = g.addcmul_(omega[name], away, value=lam)
        return out

    def accumulate(self, total: Tree, b: Tree, c: Tree, scale: float) -> Tree:
        with torch.no_grad():
            torch._foreach_addcmul_(_leaves(total), _leaves(b), _leaves(c), value=scale)
        return total

    def sub_from(self, a: Tree, b: Tree) -> Tree:
        with torch.no_grad():
            torch._foreach_sub_(_leaves(a), _leaves(b))
        return a

    def value_and_grad(
        self, fn: Callable[[Tree], tuple[Array, Any]], params: Tree, *, create_graph: bool = False
    ) -> tuple[tuple[Array, Any], Tree]:
        with torch.enable_grad():
            if not create_graph and not all(p.is_leaf and p.requires_grad for p in params.values()):
                params = {name: p.detach().requires_grad_() for name, p in params.items()}
            value, aux = fn(params)
            if not value.requires_grad:
                return (value, aux), self.zeros_like(self.stop_gradient(params))
            scale = self.loss_scale
            found: Any = torch.autograd.grad(  # None where a parameter is unused
                value if scale == 1 else value * scale,
                _leaves(params),
                allow_unused=True,
                create_graph=create_graph,
            )
            if scale != 1:
                found = tuple([g if g is None else g / scale for g in found])
                self.last_value = value.detach()
        grads = {}
        for (name, p), g in zip(params.items(), found, strict=True):
            unused: Any = g is None
            grads[name] = torch.zeros_like(p) if unused else g
        return (value if create_graph else value.detach(), aux), grads

    def per_sample_grad(self, fn: Callable[..., Array], params: Tree, *batch: Array) -> Tree:
        dims = (None, *(0 for _ in batch))
        plain = {name: leaf.detach() for name, leaf in params.items()}
        out: Tree = torch.func.vmap(torch.func.grad(fn), in_dims=dims, randomness="different")(
            plain, *batch
        )
        return out

    def per_sample_sum(
        self, fn: Callable[..., Array], params: Tree, w: Array, power: int, *batch: Array
    ) -> Tree:
        if len(w) > 2:
            # vmap cannot follow values into control flow (transformers' masks), nor recurrent layers;
            # an error of the model's own comes again below.
            with contextlib.suppress(RuntimeError):
                return super().per_sample_sum(fn, params, w, power, *batch)
        out = self.wide(self.zeros_like(self.stop_gradient(params)))
        for weight, row in zip(w.tolist(), zip(*batch, strict=True), strict=True):
            grads = self.wide(self.grad(partial(_on_row, fn, row), params))
            for name, g in grads.items():  # cheaper than to set up a vmap
                out[name].addcmul_(g, g if power == 2 else g.sign(), value=weight)
        return out

    def jit(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return fn


def _on_row(fn: Callable[..., Array], row: tuple[Array, ...], params: Tree) -> Array:
    return fn(params, *row)


def _leaves(tree: Tree) -> list[Tensor]:
    return list(tree.values())


def _named(like: Tree, leaves: Any) -> Tree:
    return dict(zip(like, leaves, strict=True))
