"""The boundary: clouds, masks and weights are checked once per call, here."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Clouds(NamedTuple):
    """A checked pair: batched clouds in their own dtype, masks, and whether the input was batched."""

    x: Tensor
    y: Tensor
    mask_x: Tensor | None
    mask_y: Tensor | None
    batched: bool


def check_clouds(
    x: Tensor,
    y: Tensor,
    mask_x: Tensor | None = None,
    mask_y: Tensor | None = None,
    *,
    check_finite: bool = True,
) -> Clouds:
    """Check a pair of clouds and give both a batch dimension.

    Args:
        x, y: (B, N, D) and (B, M, D), or (N, D) and (M, D).
        mask_x, mask_y: (B, N) and (B, M) bool (or without B), True for real points.
        check_finite: look at every coordinate once; False saves that pass (and a synchronisation on an
            accelerator). Inside a compiled region nothing is looked at.

    Raises:
        TypeError: not tensors, or not floating point; masks that are not bool.
        ValueError: rank, batch, D or device differ, a cloud has no point, or a real point is not finite.
    """
    given: tuple[tuple[str, Any], ...] = (("x", x), ("y", y))
    for name, cloud in given:
        if not isinstance(cloud, Tensor):
            raise TypeError(
                f"{name} must be a torch.Tensor of coordinates, got {type(cloud).__name__}; "
                "use torch.as_tensor"
            )
        if not cloud.is_floating_point():
            raise TypeError(
                f"{name} must hold floating-point coordinates, got {cloud.dtype}; use {name}.float()"
            )
        if cloud.ndim not in (2, 3):
            raise ValueError(
                f"{name} must be (B, N, D) or (N, D), got {cloud.ndim} dimensions: "
                f"{tuple(cloud.shape)}"
            )
    if x.ndim != y.ndim:
        raise ValueError(f"x and y differ in rank: {tuple(x.shape)} and {tuple(y.shape)}")
    if x.device != y.device:
        raise ValueError(f"x is on {x.device} and y on {y.device}; move one with .to()")
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"points of x have D={x.shape[-1]} coordinates and those of y {y.shape[-1]}"
        )
    if x.shape[-1] == 0:
        raise ValueError("points must have at least one coordinate, got D=0")
    batched = x.ndim == 3
    mask_x = _check_mask("mask_x", mask_x, x)
    mask_y = _check_mask("mask_y", mask_y, y)
    if not batched:
        x, y = x.unsqueeze(0), y.unsqueeze(0)
        mask_x = None if mask_x is None else mask_x.unsqueeze(0)
        mask_y = None if mask_y is None else mask_y.unsqueeze(0)
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"batch sizes differ: {x.shape[0]} for x and {y.shape[0]} for y")
    for name, cloud, mask in (("x", x, mask_x), ("y", y, mask_y)):
        if cloud.shape[1] == 0:
            raise ValueError(f"{name} has no points: {tuple(cloud.shape)}; N must be at least 1")
        if check_finite and not torch.compiler.is_compiling():  # a graph cannot look at values
            finite = cloud.detach().isfinite().all(-1)
            if mask is not None:
                if not bool(mask.any(1).all()):
                    raise ValueError(f"mask_{name} leaves a cloud without any point")
                finite = finite | ~mask
            if not bool(finite.all()):
                raise ValueError(
                    f"{name} holds {int((~finite).sum())} points that are not finite (NaN or inf); "
                    "mask them out, or pass check_finite=False to skip this check"
                )
    return Clouds(x, y, mask_x, mask_y, batched)


def _check_mask(name: str, mask: Any, cloud: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor, True for real points, got {kind}")
    if mask.shape != cloud.shape[:-1]:
        raise ValueError(f"{name} must be {tuple(cloud.shape[:-1])}, got {tuple(mask.shape)}")
    if mask.device != cloud.device:
        raise ValueError(f"{name} is on {mask.device} and its cloud on {cloud.device}")
    return mask


def check_weights(
    name: str, weight: Any, cloud: Tensor, mask: Tensor | None = None
) -> Tensor | None:
    """Check the weights of the points of a batched cloud: at least 0, and 1 in all on its real points."""
    if weight is None:
        return None
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
    if weight.ndim == 1:
        weight = weight.unsqueeze(0)
    if weight.shape != cloud.shape[:2]:
        raise ValueError(f"{name} must be {tuple(cloud.shape[:2])}, got {tuple(weight.shape)}")
    if mask is not None:
        weight = torch.where(mask, weight, torch.zeros_like(weight))
    totals = weight.detach().double().sum(1)
    if not bool(((totals - 1).abs() < 1e-3).all()) or not bool((weight >= 0).all()):
        raise ValueError(
            f"{name} must be at least 0 and sum to 1 in every cloud, got sums {totals.tolist()[:4]}; "
            f"divide by {name}.sum(-1, keepdim=True)"
        )
    checked: Tensor = weight
    return checked


def check_prices(prices: Any, cloud: Tensor) -> Tensor:
    """Check the starting prices of the points of a batched cloud, and give them a batch dimension."""
    if not isinstance(prices, Tensor) or not prices.is_floating_point():
        kind = prices.dtype if isinstance(prices, Tensor) else type(prices).__name__
        raise TypeError(f"prices must be a floating-point tensor, got {kind}")
    checked: Tensor = prices.unsqueeze(0) if prices.ndim == 1 else prices
    if checked.shape != cloud.shape[:2]:
        raise ValueError(f"prices must be {tuple(cloud.shape[:2])}, got {tuple(prices.shape)}")
    return checked.detach()
