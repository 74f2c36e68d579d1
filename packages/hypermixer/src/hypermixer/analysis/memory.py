"""The largest tensor and the most memory that a computation holds, counted operation by operation."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryUse(NamedTuple):
    """What a computation holds beyond what existed before it.

    Attributes:
        peak_bytes: most bytes of tensor storage alive at a time.
        largest_numel: elements of the largest tensor that an operation returned.
    """

    peak_bytes: int
    largest_numel: int


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[int, int] = {}
        self.now = self.peak = self.largest = 0

    def _forget(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        known = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in known or key in self.alive:
                continue
            # A view's elements are those of what it looks at: only what is new is counted.
            self.largest = max(self.largest, tensor.numel())
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)
        return out


def measure_memory(function: Callable[[], object]) -> MemoryUse:
    """Run a function and count the tensors it makes.

    Args:
        function: called once, without arguments.

    Example:
        >>> import torch
        >>> measure_memory(lambda: torch.ones(10) + 1)
        MemoryUse(peak_bytes=80, largest_numel=10)
    """
    with _Watch() as watch:
        function()
    return MemoryUse(watch.peak, watch.largest)
