"""How a model is evaluated more than once in a step: batch-norm statistics, dropout masks, training mode.

A regulariser needs f as a function of one sample. In training, batch normalisation couples the samples, updates
its running statistics at every pass, and a noisy pass would be normalised by the noisy batch. `bn` says what
happens instead:

    "shared"  statistics of the clean pass for all passes, constant in x; running statistics move once
    "frozen"  running statistics for all passes of the regulariser
    "batch"   every pass by itself, as the authors' code does: K + 1 updates, statistics differentiated in x
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

BatchNormMode = Literal["shared", "frozen", "batch"]


def active_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch-norm layers that would use the statistics of the batch."""
    return [
        m
        for m in model.modules()
        if isinstance(m, _BatchNorm) and (m.training or not m.track_running_stats)
    ]


def has_active_dropout(model: nn.Module) -> bool:
    """Tell whether a dropout layer would draw a mask; functional dropout cannot be seen."""
    return any(isinstance(m, _DropoutNd) and m.training and m.p > 0 for m in model.modules())


@contextmanager
def frozen_norms(model: nn.Module) -> Iterator[None]:
    """Let batch-norm layers use their running statistics, and restore their modes, also on an error.

    Raises:
        ValueError: a layer keeps no running statistics.
    """
    layers = active_norms(model)
    for layer in layers:
        if layer.running_mean is None:
            raise ValueError(
                "bn='frozen' needs running statistics; a layer has none, use bn='shared'"
            )
    modes = [layer.training for layer in layers]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode


class _Gate(torch.autograd.Function):
    """The identity, through which no derivative in x passes while the gate is closed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: SharedNorms) -> Tensor:
        ctx.gate = gate
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        return (None if ctx.gate.closed else grads[0]), None


class SharedNorms:
    """Batch normalisation by the statistics of the clean pass, constant in x and not in the parameters.

    The clean pass runs inside `record()`, the noisy ones inside `replay()`, and input gradients are taken
    inside `constant_statistics()`, where the statistics count as constants.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = active_norms(model)
        self.closed = False
        self._move = True
        self._kept: dict[_BatchNorm, list[tuple[Tensor, Tensor]]] = {}
        for layer in self.layers:
            if isinstance(layer, nn.SyncBatchNorm):
                message = "bn='shared' cannot see SyncBatchNorm's statistics; use bn='frozen'"
                raise ValueError(message)

    @contextmanager
    def record(self, move: bool = True) -> Iterator[None]:
        """Keep the statistics of every layer, each time that it is called; `move` the running ones, too."""
        self._kept, self._move = {layer: [] for layer in self.layers}, move
        with self._patched(self._normalise_and_keep):
            yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Normalise by the kept statistics; running statistics stay as they are."""
        calls = dict.fromkeys(self.layers, 0)

        def normalise(layer: _BatchNorm, x: Tensor) -> Tensor:
            kept = self._kept[layer]
            mean, var = kept[min(calls[layer], len(kept) - 1)]
            calls[layer] += 1
            return _apply(layer, x, mean, var)

        with self._patched(normalise):
            yield

    @contextmanager
    def constant_statistics(self) -> Iterator[None]:
        """Let no derivative pass through the statistics."""
        self.closed = True
        try:
            yield
        finally:
            self.closed = False

    def _normalise_and_keep(self, layer: _BatchNorm, x: Tensor) -> Tensor:
        if layer.training and x.numel() == x.shape[1]:  # torch's own condition
            raise ValueError(
                f"batch normalisation in training needs more than one value a channel, got {tuple(x.shape)}"
            )
        gated = _Gate.apply(x, self)  # type: ignore[no-untyped-call]
        dims = [0, *range(2, x.ndim)]
        mean, var = gated.mean(dims), gated.var(dims, correction=0)
        self._kept[layer].append((mean, var))
        if self._move:
            _move_running_statistics(layer, x, mean.detach(), var.detach())
        return _apply(layer, x, mean, var)

    @contextmanager
    def _patched(self, normalise: Callable[[_BatchNorm, Tensor], Tensor]) -> Iterator[None]:
        for layer in self.layers:
            layer.forward = _bound(normalise, layer)  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward


def _bound(
    normalise: Callable[[_BatchNorm, Tensor], Tensor], layer: _BatchNorm
) -> Callable[[Tensor], Tensor]:
    return lambda x: normalise(layer, x)


def _apply(layer: _BatchNorm, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    shape = [1, -1] + [1] * (x.ndim - 2)
    scale = (var + layer.eps).rsqrt()
    if layer.affine:
        scale = scale * layer.weight
    result = (x - mean.view(shape)) * scale.view(shape)
    return result + layer.bias.view(shape) if layer.affine else result


@torch.no_grad()
def _move_running_statistics(layer: _BatchNorm, x: Tensor, mean: Tensor, var: Tensor) -> None:
    """Update as torch does: the variance without bias, momentum or a cumulative mean."""
    if not layer.training or layer.running_mean is None or layer.running_var is None:
        return
    count = x.numel() // x.shape[1]
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
    if layer.momentum is None:
        assert layer.num_batches_tracked is not None
        factor = 1 / float(layer.num_batches_tracked)
    else:
        factor = layer.momentum
    layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), factor)
    unbiased = var * (count / max(count - 1, 1))
    layer.running_var.lerp_(unbiased.to(layer.running_var.dtype), factor)


class RandomState:
    """The state of the random streams before the clean pass, so that noisy passes draw the same masks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._other = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def again(self) -> Iterator[None]:
        """Replay the streams from there inside the block; afterwards they go on as if nothing had run."""
        devices = [self._device] if self._other is not None else []
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self._cpu)
            if self._other is not None:
                torch.cuda.set_rng_state(self._other, self._device)
            yield
