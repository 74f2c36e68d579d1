"""Saving X instead of Y: the mix is cheap to compute again when backward wants it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from denseformer.core.run import DepthRun


class _Packed:
    """Stands for a saved tensor that shares the storage of Y."""

    def __init__(self, y: Tensor, mix: _Mix) -> None:
        self.mix = mix
        self.layout = y.size(), y.stride(), y.storage_offset()


class _Mix:
    """Computes Y again; several saved views of one Y share the result while it is alive."""

    def __init__(self, make: Callable[[], Tensor], stride: tuple[int, ...]) -> None:
        self.make, self.stride = make, stride
        self.cached: weakref.ref[Tensor] | None = None

    def __call__(self) -> Tensor:
        y = self.cached() if self.cached is not None else None
        if y is None:
            made = self.make()
            y = torch.empty_strided(made.shape, self.stride, dtype=made.dtype, device=made.device)
            y.copy_(made)
            self.cached = weakref.ref(y)
        return y


def _unpack(packed: Any) -> Tensor:
    if not isinstance(packed, _Packed):
        assert isinstance(packed, Tensor)
        return packed
    with torch.no_grad():
        y = packed.mix()
    return y.as_strided(*packed.layout)


@contextmanager
def recomputing(run: DepthRun) -> Iterator[None]:
    """Run the next block so that what it saves of its input Y is computed again in backward.

    Wrap the call of block i + 1 after ``y = run(...)``, for a run begun with ``recompute=True``. Combined
    with ``torch.utils.checkpoint`` of the block, only X_i is kept per block, as in a plain checkpointed
    network; without it, everything but Y itself is kept. Y is summed term by term when it is computed
    again, so gradients agree to rounding. Without a mix (Y is an X) nothing changes.

    >>> import torch
    >>> from denseformer import DWA, recomputing
    >>> run = DWA(2).begin(torch.ones(3), recompute=True)
    >>> y = run(torch.ones(3).sin())
    >>> with recomputing(run):
    ...     x2 = y.cos()
    >>> run(x2).sum().backward()
    """
    recipe = run.recipe()
    if recipe is None or torch.compiler.is_compiling():
        yield
        return
    y, make = recipe
    pointer, dtype, mix = y.untyped_storage().data_ptr(), y.dtype, _Mix(make, y.stride())
    offset = y.storage_offset()

    def pack(t: Tensor) -> Any:
        dense = t.layout == torch.strided and t.dtype == dtype and offset == 0
        if dense and t.untyped_storage().data_ptr() == pointer:
            return _Packed(t, mix)
        return t

    with saved_tensors_hooks(pack, _unpack):
        yield
