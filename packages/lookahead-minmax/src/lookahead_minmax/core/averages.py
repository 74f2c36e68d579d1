"""Averages of the iterates that are evaluated and never trained on, and BatchNorm re-estimation."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from lookahead_minmax.core import tensors


class _Average:
    """A running average of a module's parameters, in float32 for half-precision ones."""

    def __init__(self, module: nn.Module, buffers: Literal["copy", "ema"]) -> None:
        if buffers not in ("copy", "ema"):
            raise ValueError(f"buffers must be 'copy' or 'ema', got {buffers!r}")
        self.module = module
        self.buffers = buffers
        self.updates = 0
        self._values = {name: _wide(tensor) for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, Tensor]:
        """Return what is averaged, by name."""
        result: dict[str, Tensor] = dict(self.module.named_parameters())
        if self.buffers == "ema":
            result |= {n: b for n, b in self.module.named_buffers() if b.is_floating_point()}
        return {name: tensor.detach() for name, tensor in result.items()}

    def __repr__(self) -> str:
        """Show the module's class and the number of updates."""
        return f"{type(self).__name__}({type(self.module).__name__}, updates={self.updates})"

    def _weight(self) -> float:
        """Return the weight of the next iterate in the average."""
        raise AssertionError("an average defines its weights")  # pragma: no cover

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's present weights into the average."""
        weight = self._weight()
        for name, tensor in self._tensors().items():
            if self._values[name].device != tensor.device:  # the module moved
                self._values[name] = self._values[name].to(tensor.device)
            value = self._values[name]
            tensors.local(value).lerp_(tensors.local(tensor).to(value.dtype), weight)
        self.updates += 1

    @contextmanager
    def average(self) -> Iterator[None]:
        """Put the average into the module inside a `with` block, and the live weights back after it."""
        live = self._tensors()
        with torch.no_grad():
            held = [tensor.clone() for tensor in live.values()]
            tensors.copy_all(list(live.values()), [self._values[name] for name in live])
        try:
            yield
        finally:
            with torch.no_grad():
                tensors.copy_all(list(live.values()), held)

    def averaged_module(self) -> nn.Module:
        """Return a copy of the module with the average in it; buffers are the module's present ones."""
        result = copy.deepcopy(self.module)
        result.load_state_dict(self.module_state_dict())
        return result

    def module_state_dict(self) -> dict[str, Tensor]:
        """Return `module.state_dict()` with the average in place of the live weights."""
        names = {id(t): n for n, t in self.module.named_parameters()}
        names |= {id(b): n for n, b in self.module.named_buffers()}
        live: dict[str, Tensor] = dict(self.module.named_parameters(remove_duplicate=False))
        live |= dict(self.module.named_buffers(remove_duplicate=False))
        result = {}
        for key, tensor in self.module.state_dict().items():
            if not isinstance(tensor, Tensor):  # what a layer's get_extra_state returned
                result[key] = tensor
                continue
            source = self._values.get(names.get(id(live.get(key)), ""), tensor)
            result[key] = source.to(tensor.device, tensor.dtype, copy=True)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and the number of updates."""
        return {"updates": self.updates, "values": dict(self._values)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: names or shapes are not those of the module.
        """
        saved = {name: tuple(value.shape) for name, value in state_dict["values"].items()}
        here = {name: tuple(value.shape) for name, value in self._values.items()}
        if saved != here:
            wrong = sorted(set(saved.items()) ^ set(here.items()))
            raise ValueError(f"the saved average does not fit the module: {wrong}")
        for name, value in state_dict["values"].items():
            self._values[name].copy_(value)
        self.updates = state_dict["updates"]


class EMA(_Average):
    r"""Exponential moving average, :math:`\bar w \leftarrow b \bar w + (1 - b) w`.

    Update it at the end of every round, after `LookaheadMinmax.step`; or with
    `la.on_sync(ema.update)`, which makes the EMA of the slow weights (EMA-slow).

    Args:
        module: whose weights are averaged; the average starts as these.
        decay: b in [0, 1), default 0.9999, the paper's value.
        buffers: "copy" leaves buffers as they are in the module when the average is used; "ema" averages
            the floating ones with the weights.

    Raises:
        ValueError: `decay` is outside [0, 1) or `buffers` is unknown.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(layer.weight)
        >>> ema = EMA(layer, decay=0.75)
        >>> _ = torch.nn.init.ones_(layer.weight)
        >>> ema.update()
        >>> with ema.average():
        ...     layer.weight.item()
        0.25
    """

    def __init__(
        self, module: nn.Module, decay: float = 0.9999, *, buffers: Literal["copy", "ema"] = "copy"
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        super().__init__(module, buffers)
        self.decay = decay

    def _weight(self) -> float:
        return 1 - self.decay


class UniformAverage(_Average):
    r"""Plain mean of all updates, :math:`\bar w \leftarrow \bar w + (w - \bar w) / (n + 1)`.

    n counts the updates before this one, so the weights at construction do not count.

    Args:
        module: whose weights are averaged.
        buffers: as for `EMA`.
    """

    def __init__(self, module: nn.Module, *, buffers: Literal["copy", "ema"] = "copy") -> None:
        super().__init__(module, buffers)

    def _weight(self) -> float:
        return 1 / (self.updates + 1)


def _wide(tensor: Tensor) -> Tensor:
    """Return a copy, in float32 if the tensor has half precision."""
    return tensor.to(torch.float32 if tensor.dtype in tensors.HALF else tensor.dtype, copy=True)


def recalibrate(
    module: nn.Module, batches: Iterable[Any], device: torch.device | str | None = None
) -> None:
    """Re-estimate BatchNorm statistics for the weights that are in place now.

    The statistics become the plain mean over the batches (`torch.optim.swa_utils.update_bn`); modes and
    momenta of the layers are as before afterwards.

    Args:
        module: whose normalisation layers are re-estimated.
        batches: inputs of the module; of a list or tuple the first element is the input.
        device: where to move the batches; None leaves them.
    """
    update_bn(batches, module, None if device is None else torch.device(device))
