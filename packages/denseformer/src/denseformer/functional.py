"""One depth-weighted average as a function of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from denseformer.core import kernels
from denseformer.core.run import beside, literal, needs_functional


def dwa(xs: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Return ``Σ_j weight[j] · xs[j]``, one row of the method (paper, equation 1).

    Differentiable in both arguments, any number of times; works under torch.compile, vmap and jvp. Sums of
    float16 and bfloat16 run in float32, the result has the type of ``xs``. The representations are saved
    for backward by reference.

    Args:
        xs: tensors of one shape, floating-point type and device.
        weight: (len(xs),), floating point.

    Raises:
        ValueError: no tensor, different shapes, types or devices, or a weight of another length.
        TypeError: not floating point.

    >>> dwa([torch.ones(2), torch.full((2,), 3.0)], torch.tensor([0.5, 1.0])).tolist()
    [3.5, 3.5]
    """
    xs = list(xs)
    if not xs:
        raise ValueError("xs must hold at least one tensor")
    terms: list[object] = [*xs, weight]
    if not all(isinstance(t, Tensor) and t.is_floating_point() for t in terms):
        raise TypeError("xs and weight must be tensors of floating-point types")
    if weight.shape != (len(xs),):
        raise ValueError(f"weight must have shape ({len(xs)},), got {tuple(weight.shape)}")
    first = xs[0]
    for n, t in enumerate(xs):
        if (t.shape, t.dtype, t.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"xs[{n}] is {tuple(t.shape)} {t.dtype} on {t.device}, expected as xs[0] "
                f"{tuple(first.shape)} {first.dtype} on {first.device}"
            )
    if any(map(needs_functional, xs)) or needs_functional(weight):
        return literal(xs, beside(weight, first))
    made = torch.ops.denseformer.mix(xs, weight)
    assert isinstance(made, Tensor)
    return made


@torch.library.custom_op(  # the schema in words: releases before 2.7 do not read list[Tensor]
    "denseformer::mix", mutates_args=(), schema="(Tensor[] xs, Tensor weight) -> Tensor"
)
def _mix(xs: list[Tensor], weight: Tensor) -> Tensor:
    scalars = weight.to(kernels.accumulate_dtype(xs[0].dtype))
    host = weight.device.type == "cpu"
    return kernels.combine(xs, scalars.tolist() if host else scalars.unbind())


@_mix.register_fake
def _mix_fake(xs: list[Tensor], weight: Tensor) -> Tensor:
    return torch.empty_like(xs[-1])


def _setup(ctx: Any, inputs: tuple[list[Tensor], Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], *inputs[0])


def _backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor], Tensor]:
    weight, *xs = ctx.saved_tensors
    dtype = kernels.accumulate_dtype(grad.dtype)
    wide = grad.to(dtype)
    pulled = [(wide * w).to(grad.dtype) for w in weight.to(dtype).unbind()]
    inner = [torch.dot(wide.reshape(-1), x.to(dtype).reshape(-1)) for x in xs]
    return pulled, torch.stack(inner).to(weight.dtype)


_mix.register_autograd(_backward, setup_context=_setup)
