"""Random directions with identity covariance, and the checks that every estimator makes of its numbers."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Distribution = Literal["rademacher", "gaussian", "sphere"]


def check_choice(name: str, value: object, choices: object) -> None:
    """Raise ValueError unless a value is one of a Literal's."""
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless a number is finite and above 0."""
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def check_count(name: str, value: object) -> None:
    """Raise ValueError unless a number is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def directions(
    x: Tensor,
    num_samples: int,
    distribution: Distribution = "rademacher",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return directions v with E v vᵀ = I for every sample, (num_samples, *x.shape).

    Args:
        x: a batch (B, ...), whose shape, type and device are taken.
        num_samples: draws for each sample.
        distribution: "rademacher" (entries +-1), "gaussian", or "sphere" (norm √D).
        generator: of x's device; None uses the global one.

    Raises:
        ValueError: an unknown distribution, or less than one draw.
    """
    check_choice("distribution", distribution, Distribution)
    check_count("num_samples", num_samples)
    shape = (num_samples, *x.shape)
    # in a compiled graph with symbolic sizes there is no room for a generator, not even None
    source: dict[str, Any] = {} if generator is None else {"generator": generator}
    if distribution == "rademacher":
        bits = torch.randint(0, 2, shape, device=x.device, **source)
        return bits.to(x.dtype).mul_(2).sub_(1)
    v = torch.randn(shape, device=x.device, dtype=x.dtype, **source)
    if distribution == "sphere":
        flat = v.flatten(2)
        v = (flat * (math.sqrt(flat.shape[2]) / flat.norm(dim=2, keepdim=True))).view(shape)
    return v


def check_directions(noise: Tensor, x: Tensor) -> None:
    """Raise ValueError unless directions are (K, *x.shape) with at least one draw."""
    if noise.shape[1:] != x.shape or not len(noise):
        shape = ", ".join(map(str, x.shape))
        raise ValueError(f"noise must be (K, {shape}), got {tuple(noise.shape)}")


def require_floating(x: object) -> None:
    """Raise TypeError for integer inputs, which have no derivative."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor, got {kind}; convert to float")


def require_precision(dtype: torch.dtype, what: str, allow_low_precision: bool) -> None:
    """Raise ValueError where a finite difference would be nothing but rounding."""
    if dtype in (torch.float16, torch.bfloat16) and not allow_low_precision:
        raise ValueError(
            f"{what} is {dtype}, in which a finite difference is rounding noise; evaluate in float32 "
            "(autocast is switched off for it) or pass allow_low_precision=True"
        )
