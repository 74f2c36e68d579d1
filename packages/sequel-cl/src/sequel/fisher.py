"""Fisher information and output sensitivity: one backend-free definition, and closed forms for PyTorch.

The definition takes per-sample gradients by vmap. For models made of ``nn.Linear`` and ``nn.Conv2d`` layers
that are used once, PyTorch needs none: a Linear layer's squared gradients sum to (δ²)'(a²). The closed
form is compared with the definition on the first samples and dropped where they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sequel import _check
from sequel.ops.base import Array, Ops, Tree
from sequel.rng import stream

KINDS = ("empirical", "true", "mc", "batch")

__all__ = ["KINDS", "Layers", "chunk_sums", "fisher_diagonal"]


def chunk_sums(
    ops: Ops, model: Any, kind: str, temperature: float, masked: Callable[[Array, Array], Array]
) -> Callable[..., Tree]:
    """Return f(params, x, y, t, w, u) = Σ_n w_n (per-sample contribution) over one chunk.

    ``kind``: a Fisher kind, ``"output"`` (|∂‖f‖²|, MAS) or ``"output_batch"``; u are uniforms for ``"mc"``.
    """

    def scores(params: Tree, x: Array, t: Array) -> Array:
        return masked(model.forward(params, x, False) / temperature, t)

    def nll(params: Tree, x: Array, y: Array, t: Array) -> Array:
        return -ops.pick(ops.log_softmax(scores(params, x[None], t[None])), y[None]).sum()

    def energy(params: Tree, x: Array) -> Array:
        return (model.forward(params, x[None], False) ** 2).sum()

    def sums(params: Tree, x: Array, y: Array, t: Array, w: Array, u: Array) -> Tree:
        if kind == "output":
            return ops.per_sample_sum(energy, params, w, 1, x)
        if kind == "output_batch":

            def mean_energy(p: Tree) -> Array:
                return (w * (model.forward(p, x, False) ** 2).sum(-1)).sum() / w.sum()

            return ops.map(ops.abs, ops.wide(ops.grad(mean_energy, params)))
        if kind == "batch":

            def mean_nll(p: Tree) -> Array:
                return -(w * ops.pick(ops.log_softmax(scores(p, x, t)), y)).sum() / w.sum()

            return ops.map(lambda g: g * g, ops.wide(ops.grad(mean_nll, params)))
        if kind == "empirical":
            return ops.per_sample_sum(nll, params, w, 2, x, y, t)
        p = ops.stop_gradient(ops.exp(ops.log_softmax(scores(params, x, t))))
        if kind == "mc":
            drawn = sample_labels(ops, p, u)
            return ops.per_sample_sum(nll, params, w, 2, x, drawn, t)
        total = ops.wide(ops.zeros_like(params))
        for c in range(p.shape[-1]):
            part = ops.per_sample_sum(nll, params, w * p[:, c], 2, x, y * 0 + c, t)
            total = ops.map(lambda a, b: a + b, total, part)
        return total

    return sums


def sample_labels(ops: Ops, p: Array, u: Array) -> Array:
    """Draw one label per row by inverting the distribution function at u."""
    return (p.cumsum(-1)[:, :-1] < u[:, None]).sum(-1)


class Layers:
    """Closed-form sums of squared (or absolute) per-sample gradients for Linear and Conv2d layers."""

    def __init__(self, module: nn.Module, names: Iterable[str]) -> None:
        self.module = module
        wanted = set(names)
        owner: dict[str, tuple[nn.Module, str]] = {}
        seen: set[int] = set()
        self.layers: list[nn.Module] = []
        shared = False
        for path, layer in module.named_modules():
            for key, p in layer.named_parameters(recurse=False):
                name = f"{path}.{key}" if path else key
                shared |= id(p) in seen
                seen.add(id(p))
                if name in wanted:
                    owner[name] = (layer, key)
                    if layer not in self.layers:
                        self.layers.append(layer)
        self.owner, self.in_place = owner, False
        self.possible = (
            not shared
            and set(owner) == wanted
            and all(_covered(layer) for layer in self.layers)
            and {key for _, key in owner.values()} <= {"weight", "bias"}  # not pruned, normalised
        )

    def sums(
        self, run: Callable[[], Tensor], scalars: Callable[[Tensor], Iterable[tuple[Tensor, Tensor]]],
        *, power: int = 2,
    ) -> Tree | None:  # fmt: skip
        """Return Σ_n v_n |g_n|^power; ``scalars(logits)`` yields (sum of losses, v (N,)) pairs.

        None where a layer was used more than once or on inputs that are not one row per sample.
        """
        taken: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

        versions: list[tuple[Tensor, int]] = []

        def hook(layer: nn.Module, args: Any, kwargs: dict[str, Any], out: Tensor) -> Tensor:
            a = args[0] if args else kwargs["input"]
            taken.setdefault(layer, []).append((a.detach(), out))
            versions.append((out, out._version))
            return out.clone() if self.in_place else out

        handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in self.layers]
        try:
            with torch.enable_grad():
                logits = run()
        finally:
            for handle in handles:
                handle.remove()
        if any(out._version != version for out, version in versions):
            self.in_place = True  # an activation has overwritten a layer's own output
            return self.sums(run, scalars, power=power)
        for layer in self.layers:
            rank = 2 if isinstance(layer, nn.Linear) else 4
            calls = taken.get(layer, [])
            if len(calls) != 1 or calls[0][0].dim() != rank or len(calls[0][0]) != len(logits):
                return None
        outputs = [taken[layer][0][1] for layer in self.layers]
        total: Tree = {}
        with torch.enable_grad():
            losses = list(scalars(logits))
        for loss, v in losses:
            deltas = torch.autograd.grad(loss, outputs, retain_graph=True)
            for layer, delta in zip(self.layers, deltas, strict=True):
                self._add(total, layer, taken[layer][0][0], delta, v, power)
        return {name: total[name] for name in self.owner}

    def _add(
        self, total: Tree, layer: nn.Module, a: Tensor, delta: Tensor, v: Tensor, power: int
    ) -> None:
        for name, (owner, key) in self.owner.items():
            if owner is not layer:
                continue
            v = v.to(torch.promote_types(v.dtype, torch.float32))
            a, delta = a.to(v.dtype), delta.to(v.dtype)  # autocast
            if isinstance(layer, nn.Linear):
                d, rows = _power(delta, power), _power(a, power)
                part = (v[:, None] * d).T @ rows if key == "weight" else v @ d
            elif key == "bias":
                part = v @ _power(delta.sum((2, 3)), power)
            else:
                part = _conv(layer, a, delta, v, power)
            total[name] = total[name] + part if name in total else part


def _power(x: Tensor, power: int) -> Tensor:
    return x * x if power == 2 else x.abs()


def _conv(layer: nn.Module, a: Tensor, delta: Tensor, v: Tensor, power: int) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    total = torch.zeros_like(layer.weight, dtype=v.dtype).reshape(len(layer.weight), -1)
    for at in range(0, len(a), 64):
        cut = slice(at, at + 64)
        g = torch.bmm(delta[cut].flatten(2), _patches(layer, a[cut]).transpose(1, 2))
        g = g.mul_(g) if power == 2 else g.abs_()
        total += (v[cut] @ g.flatten(1)).view_as(total)
    return total.reshape(layer.weight.shape)


def _patches(layer: nn.Conv2d, a: Tensor) -> Tensor:
    """Return what each output pixel sees, (N, C kh kw, pixels); faster than nn.functional.unfold."""
    top, left = map(int, layer.padding)
    a = nn.functional.pad(a, (left, left, top, top))
    for axis in (0, 1):
        gap = layer.dilation[axis]
        a = a.unfold(2 + axis, gap * (layer.kernel_size[axis] - 1) + 1, layer.stride[axis])
        a = a[..., ::gap]
    return a.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)


def _covered(layer: nn.Module) -> bool:
    if type(layer) is nn.Linear:
        return True
    return (
        type(layer) is nn.Conv2d
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def closed_sums(
    layers: Layers,
    run: Callable[[], Tensor],
    kind: str,
    temperature: float,
    masked: Callable[[Array, Array], Array],
    y: Tensor,
    t: Tensor,
    w: Tensor,
    u: Tensor,
) -> Tree | None:
    """Evaluate :func:`chunk_sums` by the closed forms of ``layers``; None where they do not apply."""

    def scalars(logits: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        if kind == "output":
            yield (logits**2).sum(), w
            return
        log_p = torch.log_softmax(masked(logits / temperature, t), -1)
        if kind == "empirical":
            yield -log_p.gather(1, y[:, None]).sum(), w
            return
        p = log_p.detach().exp()
        if kind == "mc":
            drawn = (p.cumsum(-1)[:, :-1] < u[:, None]).sum(-1)
            yield -log_p.gather(1, drawn[:, None]).sum(), w
            return
        for c in range(p.shape[-1]):
            yield -torch.where(p[:, c] > 0, log_p[:, c], 0.0).sum(), w * p[:, c]

    return layers.sums(run, scalars, power=1 if kind == "output" else 2)


def fisher_diagonal(
    model: nn.Module,
    loader: Iterable[Any],
    kind: str = "empirical",
    *,
    params: Callable[[str, nn.Parameter], bool] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    temperature: float = 1.0,
    chunk: int = 128,
    seed: int = 0,
    accumulate: str = "plain",
    closed_form: bool = True,
) -> dict[str, Tensor]:
    """Return the diagonal Fisher information (or MAS sensitivity) of a PyTorch classifier.

    Args:
        model: any module whose output is logits (or a tuple, or has ``.logits``).
        loader: yields (x, y) batches; the last may be empty.
        kind: ``"empirical"``, ``"true"``, ``"mc"``, ``"batch"``, or ``"output"`` for MAS.
        params: which parameters, by name and value; None is all that require gradients.
        forward: ``forward(model, x) -> logits`` for models that are not called on x alone.
        temperature: of the softmax, > 0.
        chunk: samples whose gradients are in memory at once.
        seed: of the labels drawn by ``"mc"``.
        accumulate: ``"kahan"`` compensates the rounding of the running sums.
        closed_form: False always takes per-sample gradients.

    Returns:
        {name: (1/N) Σ_n g_n²}, in the parameters' dtype, at least float32. The model's mode, gradients and running statistics
        stay as they are. With torch.distributed initialised the sum runs over all ranks.

    Raises:
        ValueError: unknown kind, no samples, temperature <= 0.
    """
    from sequel.backends.torch_model import TorchModel
    from sequel.ops.torch import TorchOps

    _check.one_of("kind", kind, (*KINDS, "output", "output_batch"))
    _check.above("temperature", temperature, 0.0)
    _check.one_of("accumulate", accumulate, ("plain", "kahan"))
    first = next(model.parameters())
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no parameter that requires gradients")
    ops = TorchOps(first.device)
    wrapped = TorchModel(model, ops, forward=forward)
    tree: Tree = {name: p for name, p in wrapped.live.items() if params is None or params(name, p)}
    if len(tree) == len(wrapped.live):
        tree = wrapped.live
    layers = Layers(model, tree)
    if not closed_form or forward is not None:
        layers.possible = False
    sums = Sums(ops, wrapped, kind, temperature, lambda logits, t: logits, layers)
    total = Total(ops, tree, accumulate == "kahan")
    count = 0.0
    for number, batch in enumerate(loader):
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise TypeError(
                f"loader must yield (x, y) batches, got {type(batch).__name__}; a generator can unpack it"
            )
        x, y = batch[:2]
        size = len(y) if kind in ("batch", "output_batch") else chunk
        for at in range(0, len(y), max(size, 1)):
            part, labels = x[at : at + size].to(first.device), y[at : at + size].to(first.device)
            n = len(labels)
            u = stream(seed, "fisher", number, at).random(n) if kind == "mc" else np.zeros(n)
            ones = torch.ones(n, dtype=first.dtype, device=first.device)
            zeros = torch.zeros(n, dtype=torch.int64, device=first.device)
            total.add(sums(tree, part, labels, zeros, ones, ops.asarray(u, first)))
            count += 1 if kind in ("batch", "output_batch") else n
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        number_ = torch.tensor(count, dtype=torch.float64, device=first.device)
        torch.distributed.all_reduce(number_)
        count = float(number_)
        for leaf in total.tree.values():
            torch.distributed.all_reduce(leaf)
    if count == 0:
        raise ValueError("the loader gave no samples")
    return {name: leaf / count for name, leaf in total.tree.items()}


class Total:
    """A running sum of trees, compensated (Kahan) if asked."""

    def __init__(self, ops: Ops, like: Tree, kahan: bool = False) -> None:
        self.ops, self.kahan = ops, kahan
        self.tree = ops.wide(ops.zeros_like(ops.copy(like)))
        self.rest = ops.zeros_like(self.tree) if kahan else {}

    def add(self, part: Tree) -> None:
        """Add one tree."""
        if not self.kahan:
            torch._foreach_add_(list(self.tree.values()), [part[n] for n in self.tree])
            return
        part = self.ops.map(lambda b, r: b - r, part, self.rest)
        new = self.ops.map(lambda a, b: a + b, self.tree, part)
        self.rest = self.ops.map(lambda n, a, b: (n - a) - b, new, self.tree, part)
        self.tree = new


class Sums:
    """Per-chunk sums under PyTorch: the closed form where it holds on the first samples."""

    def __init__(
        self,
        ops: Ops,
        model: Any,
        kind: str,
        temperature: float,
        masked: Callable[[Array, Array], Array],
        layers: Layers,
    ) -> None:
        self.ops, self.model, self.layers = ops, model, layers
        self.kind, self.temperature, self.masked = kind, temperature, masked
        self.exact = chunk_sums(ops, model, kind, temperature, masked)
        self.checked = False

    def __call__(self, params: Tree, x: Array, y: Array, t: Array, w: Array, u: Array) -> Tree:
        if self.kind in ("batch", "output_batch") or not self.layers.possible or len(y) == 0:
            return self.exact(params, x, y, t, w, u) if len(y) else self.ops.zeros_like(params)
        if not self.checked:
            self.checked = True
            few = tuple(part[:2] for part in (x, y, t, w, u))  # two show a use across samples
            fast, exact = self._closed(*few), self.exact(params, *few)
            self.layers.possible = fast is not None and _agree(fast, exact)
        found = self._closed(x, y, t, w, u) if self.layers.possible else None
        return self.exact(params, x, y, t, w, u) if found is None else found

    def _closed(self, x: Array, y: Array, t: Array, w: Array, u: Array) -> Tree | None:
        def run() -> Tensor:
            out: Tensor = self.model.forward(self.model.live, x, False)
            return out

        return closed_sums(self.layers, run, self.kind, self.temperature, self.masked, y, t, w, u)


def _agree(a: Tree, b: Tree) -> bool:
    def close(p: Tensor, q: Tensor) -> bool:
        scale = max(float(q.abs().max()), 1e-30)
        return float((p - q).abs().max()) <= 1e-3 * scale

    return all(close(a[name], b[name]) for name in b)
