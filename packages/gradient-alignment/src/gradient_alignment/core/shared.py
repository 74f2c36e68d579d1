"""One forward pass and one input gradient of a classifier, shared by the loss and all regularisers of a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gradient_alignment.core.modes import (
    BatchNormMode,
    RandomState,
    SharedNorms,
    active_norms,
    frozen_norms,
    has_active_dropout,
)
from gradient_alignment.core.noise import require_floating
from gradient_alignment.core.targets import Target, pick

_PIECEWISE_LINEAR = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Threshold, nn.Hardtanh)
_SMOOTH = (
    nn.Softplus,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.ELU,
    nn.CELU,
    nn.Mish,
    nn.Softsign,
)


class SharedPass:
    """A clean pass of a model over a batch, with what the regularisers ask of it, each computed once.

    Args:
        model: classifier; a plain function is taken as it is.
        x: (B, ...), floating.
        y: (B,) class indices, or None.
        bn: see `modes`.
        logits: of x, computed by the caller from an x that requires a gradient; then no pass is made.
        again: whether the caller has made a pass already, so that running statistics stay ("shared").

    The pass is made with autocast off: finite differences and input gradients need single precision.

    Raises:
        TypeError: x is not floating.
        ValueError: `logits` of an x that needs no gradient, or with active batch normalisation and
            bn other than "batch".
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        x: Tensor,
        y: Tensor | None = None,
        *,
        bn: BatchNormMode = "shared",
        logits: Tensor | None = None,
        again: bool = False,
    ) -> None:
        require_floating(x)
        self.model, self.y, self.bn = model, y, bn
        self.given = logits is not None
        module = model if isinstance(model, nn.Module) else None
        self._module = module
        self._norms: SharedNorms | None = None
        active = module is not None and bool(active_norms(module))
        self.random = RandomState(x.device)
        self._values: dict[Any, Tensor] = {}
        self._gradients: dict[Any, Tensor] = {}
        if logits is not None:
            if not x.requires_grad:
                raise ValueError(
                    "logits need an x that required a gradient when they were computed"
                )
            if active and bn != "batch":
                raise ValueError("logits of a pass that was not ours fit bn='batch' only")
            self.x, self.logits = x, logits
            return
        self.x = x.detach().requires_grad_()
        if active and bn == "shared":
            assert module is not None
            self._norms = SharedNorms(module)
        off = torch.autocast(x.device.type, enabled=False)
        norms = self._norms.record(not again) if self._norms else self._frozen()
        with torch.enable_grad(), off, norms:
            self.logits = model(self.x)

    def _frozen(self) -> Any:
        frozen = self.bn == "frozen" and self._module is not None
        return frozen_norms(self._module) if frozen and self._module is not None else nullcontext()

    def value(self, of: Target = "label") -> Tensor:
        """Return the target function of the clean pass, (B,), in float32 or better."""
        if of not in self._values:
            logits = self.logits
            wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
            with torch.enable_grad():
                value = pick(wide, self.y, of)
            if value.shape != self.x.shape[:1]:
                raise ValueError(f"`of` must return ({len(self.x)},), got {tuple(value.shape)}")
            self._values[of] = value
        return self._values[of]

    def gradient(self, of: Target = "label") -> Tensor:
        """Return the input gradient of the target, the shape of x, differentiable.

        Raises:
            RuntimeError: the model is compiled, which has no double backward.
        """
        refuse_compiled(self.model)
        if of not in self._gradients:
            # the backward pass would run in half precision under autocast
            off = torch.autocast(self.x.device.type, enabled=False)
            norms = self._norms.constant_statistics() if self._norms else nullcontext()
            with torch.enable_grad(), off, norms:
                (self._gradients[of],) = torch.autograd.grad(
                    self.value(of).sum(), self.x, create_graph=True
                )
        return self._gradients[of]

    @property
    def batched_draws(self) -> bool:
        """Whether several draws may be evaluated in one pass: no masks to share, no statistics to move."""
        if self._module is None:
            return True
        return not (self.moves_statistics or has_active_dropout(self._module))

    @property
    def foreign_masks(self) -> bool:
        """Whether the clean pass was the caller's, with dropout masks that cannot be drawn again."""
        return self.given and self._module is not None and has_active_dropout(self._module)

    @property
    def moves_statistics(self) -> bool:
        """Whether every pass updates running statistics, as published: bn="batch" with active batch norms."""
        return self.bn == "batch" and self._module is not None and bool(active_norms(self._module))

    def function(self, of: Target = "label") -> Callable[[Tensor], Tensor]:
        """Return x -> (B,), evaluated as `bn` says and with the dropout masks of the clean pass.

        A batch that repeats the samples (several draws) gets its labels repeated.
        """

        def fn(points: Tensor) -> Tensor:
            labels = self.y
            if labels is not None and len(labels) and len(points) != len(labels):
                labels = labels.repeat(len(points) // len(labels))
            with self._again():
                return pick(self.model(points), labels, of)

        return fn

    @contextmanager
    def _again(self) -> Iterator[None]:
        with self.random.again(), self._norms.replay() if self._norms else self._frozen():
            yield


def refuse_compiled(model: Callable[[Tensor], Tensor]) -> None:
    """Raise RuntimeError for a model wrapped by torch.compile, whose graphs have no double backward."""
    if hasattr(model, "_orig_mod") or hasattr(model, "_torchdynamo_orig_callable"):
        raise RuntimeError(
            "the model is compiled, and torch.compile does not support double backward: pass the model "
            "itself (model._orig_mod), or an estimator without input gradients"
        )


_warned: set[type] = set()


def warn_if_piecewise_linear(model: Callable[[Tensor], Tensor]) -> None:
    """Warn, once for each class of model, that a ReLU network has no Hessian to regularise."""
    if not isinstance(model, nn.Module) or type(model) in _warned:
        return
    kinds = [type(m) for m in model.modules()]
    relu = any(issubclass(kind, _PIECEWISE_LINEAR) for kind in kinds)
    if relu and not any(issubclass(kind, _SMOOTH) for kind in kinds):
        _warned.add(type(model))
        warnings.warn(
            "the Hessian of a ReLU network is zero almost everywhere, so its trace is, too: replace the "
            "activations by gradient_alignment.soften(model)",
            UserWarning,
            stacklevel=4,
        )
