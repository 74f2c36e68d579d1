"""A PyTorch module as a function of its parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sequel.ops.base import Tree
from sequel.ops.torch import TorchOps

__all__ = ["TorchModel", "evaluating", "logits_of"]


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode and give every part its own mode back."""
    modes = [(m, m.training) for m in module.modules() if m.training]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


class TorchModel:
    """A module called with any parameters; the module's own (``live``) take the short way."""

    def __init__(
        self,
        module: nn.Module,
        ops: TorchOps,
        *,
        encoder: str | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        compile: bool = False,
        amp: str | None = None,
    ) -> None:
        self.module, self.ops, self.amp = module, ops, amp
        self.live: Tree = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.encoder_path = encoder or "encoder"
        self.encoder_names = frozenset(
            name for name in self.live if name.startswith(self.encoder_path + ".")
        )
        self.forward_fn = forward
        self.call: Callable[..., Any] = torch.compile(module) if compile else module
        self.mean: Tensor | None = None
        self.std: Tensor | None = None
        self.n_classes = 0

    def has_encoder(self) -> bool:
        """Tell whether the module has the encoder."""
        try:
            self.module.get_submodule(self.encoder_path)
        except AttributeError:
            return False
        return True

    def normalize(self, mean: Any, std: Any) -> None:
        """Set how uint8 inputs are normalised."""
        if mean is not None:
            like = next(iter(self.live.values()))
            shape = (-1, 1, 1) if np.ndim(mean) else ()
            self.mean = self.ops.asarray(np.asarray(mean, dtype=np.float64), like).reshape(shape)
            self.std = self.ops.asarray(np.asarray(std, dtype=np.float64), like).reshape(shape)

    def prepare(self, x: Tensor) -> Tensor:
        """Bring inputs to the parameters' dtype; uint8 becomes (x / 255 - mean) / std."""
        if not (x.is_floating_point() or x.dtype == torch.uint8):
            return x
        like = next(iter(self.live.values()))
        out = x.to(like.dtype)
        if x.dtype == torch.uint8:
            out = out / 255
            if self.mean is not None and self.std is not None:
                out = (out - self.mean) / self.std
        return out

    def forward(self, params: Tree, x: Tensor, train: bool) -> Tensor:
        """Return logits (B, C)."""
        return self._run(params, x, train, None)

    def features(self, params: Tree, x: Tensor, train: bool) -> Tensor:
        """Return the encoder's output (B, d)."""
        return self._run(params, x, train, self.encoder_path).flatten(1)

    def _run(self, params: Tree, x: Tensor, train: bool, part: str | None) -> Tensor:
        x = self.prepare(x)
        module = self.module if part is None else self.module.get_submodule(part)
        mode = contextlib.nullcontext() if train else evaluating(self.module)
        with mode, self._autocast(x):
            if self.forward_fn is not None and part is None:
                out = _Forward(module, self.forward_fn)(x) if params is self.live else (
                    torch.func.functional_call(
                        _Forward(module, self.forward_fn),
                        {f"module.{k}": v for k, v in params.items()},
                        (x,),
                    )
                )  # fmt: skip
            elif params is self.live:
                out = (self.call if part is None else module)(x)
            else:
                start = "" if part is None else part + "."
                mine = {
                    k[len(start) :]: v
                    for k, v in params.items()
                    if k.startswith(start) and not k.startswith("algo/")
                }
                out = torch.func.functional_call(module, mine, (x,))
        return logits_of(out)

    def _autocast(self, x: Tensor) -> Any:
        if self.amp is None:
            return contextlib.nullcontext()
        dtype = torch.float16 if self.amp == "fp16" else torch.bfloat16
        return torch.autocast(x.device.type, dtype=dtype)

    @contextlib.contextmanager
    def single(self) -> Iterator[None]:
        """Leave float16 for a while: importances and what a task's end computes would underflow."""
        amp = self.amp
        self.amp = None if amp == "fp16" else amp
        try:
            yield
        finally:
            self.amp = amp


class _Forward(nn.Module):
    def __init__(self, module: nn.Module, fn: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.module, self.fn = module, fn

    def forward(self, x: Any) -> Any:
        return self.fn(self.module, x)


def logits_of(out: Any) -> Tensor:
    """Take the logits of a tensor, a tuple or an output object."""
    if isinstance(out, Tensor):
        return out.float() if out.dtype in (torch.bfloat16, torch.float16) else out
    found: Tensor = out.logits if hasattr(out, "logits") else out[0]
    return found
