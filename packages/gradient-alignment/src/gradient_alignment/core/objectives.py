"""Score-matching objectives: one number for each sample, whose mean over the data is minimised at the data's density."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from gradient_alignment.core.noise import (
    Distribution,
    check_choice,
    check_count,
    check_directions,
    check_positive,
    directions,
    require_floating,
    require_precision,
)
from gradient_alignment.core.trace import (
    Function,
    Method,
    at_points,
    evaluate,
    gradient,
    hessian_diagonal,
    hessian_trace,
    inner,
    products,
)

Objective = Literal["esm", "ssm", "ssm-vr", "fd-ssm", "dsm", "ksm"]


def score(fn: Function, x: Tensor, create_graph: bool = False) -> Tensor:
    r"""Return the score :math:`\nabla_x f(x)` of a log-density, the shape of x.

    For the class logit this is :math:`\nabla_x \log p_\theta(x \mid y)`, since the normaliser does not depend on x
    (Srinivas and Fleuret 2021, Section 3).

    Args:
        fn: log-density, maps (B, ...) to (B,).
        x: (B, ...).
        create_graph: whether the result can be differentiated.
    """
    require_floating(x)
    return gradient(fn, x, create_graph)[2]


def half_square(slope: Tensor) -> Tensor:
    """Return ½‖slope‖² of every sample, (B,)."""
    return 0.5 * slope.flatten(1).square().sum(1)


def score_matching_loss(
    fn: Function,
    x: Tensor,
    objective: Objective = "esm",
    *,
    method: Method = "hutchinson",
    num_samples: int = 1,
    sigma: float = 1e-2,
    distribution: Distribution | None = None,
    generator: torch.Generator | None = None,
    create_graph: bool = True,
    chunk: int | None = None,
    noise: Tensor | None = None,
    curvature: float = 1e-3,
    variance_reduction: bool = False,
    sigma_weighted: bool = False,
    allow_low_precision: bool = False,
) -> Tensor:
    r"""Return a score-matching objective of a log-density at every sample, (B,).

    With s = ∇f and H = ∇²f:

    ==========  =========================================================  =======================
    objective   per sample                                                 source
    ==========  =========================================================  =======================
    ``esm``     tr H + ½‖s‖², the trace by `method`                        Hyvärinen 2005
    ``ssm``     vᵀHv + ½(vᵀs)²                                             Song et al. 2019
    ``ssm-vr``  vᵀHv + ½‖s‖²                                               Song et al. 2019
    ``fd-ssm``  (f(x+εv)+f(x-εv)-2f(x))/ε² + (f(x+εv)-f(x-εv))²/(8ε²)      Pang et al. 2020
    ``dsm``     ½‖s(x+σz) + z/σ‖²                                          Vincent 2011
    ``ksm``     ``esm`` + `curvature` Σ_j H_jj²                            Kingma and LeCun 2010
    ==========  =========================================================  =======================

    "fd-ssm" takes no gradient at all.
    "dsm" is the score of the data smoothed by N(0, σ²I). Its variance grows like D/σ²;
    `variance_reduction` gives ½‖s(x+σz)‖² + (s(x+σz) - s(x))ᵀz/σ + D/(2σ²), which has the same mean and does
    not blow up.

    Args:
        fn: log-density, maps (B, ...) to (B,); for energies pass the negative.
        x: (B, ...).
        objective: see the table.
        method: estimator of the trace for "esm", see `hessian_trace`; "ksm" takes the exact diagonal.
        num_samples: draws that are averaged.
        sigma: step of finite differences (ε), or standard deviation of the smoothing ("dsm").
        distribution: of the directions; "dsm" is Gaussian always.
        generator: source of the directions, on x's device.
        create_graph: whether the result can be differentiated.
        chunk: see `hessian_trace`.
        noise: directions to use, (K, B, ...).
        curvature: weight of the curvature penalty of "ksm".
        variance_reduction: of "dsm".
        sigma_weighted: multiply "dsm" by σ², which makes noise levels comparable.
        allow_low_precision: see `hessian_trace`.

    Raises:
        TypeError: x is not floating.
        ValueError: an unknown word or a number out of range.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, -2.0]])
        >>> gaussian = lambda x: -0.5 * x.square().sum(1)
        >>> score_matching_loss(gaussian, x, "ssm-vr").item()  # -2 + ½(1 + 4)
        0.5
    """
    check_choice("objective", objective, Objective)
    check_positive("sigma", sigma)
    check_count("num_samples", num_samples)
    if not math.isfinite(curvature):
        raise ValueError(f"curvature must be finite, got {curvature!r}")
    check_choice("method", method, Method)
    require_floating(x)
    if noise is not None:
        check_directions(noise, x)
    x = x.detach()
    with torch.autocast(x.device.type, enabled=False), torch.set_grad_enabled(create_graph):
        if objective == "esm":
            trace = hessian_trace(
                fn,
                x,
                method=method,
                num_samples=num_samples,
                sigma=sigma,
                distribution=distribution,
                generator=generator,
                create_graph=create_graph,
                chunk=chunk,
                noise=noise,
                allow_low_precision=allow_low_precision,
            )
            result: Tensor = trace + half_square(gradient(fn, x, create_graph)[2])
        elif objective == "ksm":
            diagonal = hessian_diagonal(fn, x, chunk=chunk, create_graph=create_graph).flatten(1)
            slope = gradient(fn, x, create_graph)[2]
            result = diagonal.sum(1) + half_square(slope) + curvature * diagonal.square().sum(1)
        elif objective == "dsm":
            z = directions(x, num_samples, "gaussian", generator) if noise is None else noise
            result = _denoising(fn, x, z, sigma, create_graph, variance_reduction)
            result = result * sigma**2 if sigma_weighted else result
        else:
            kind = distribution or "rademacher"
            v = directions(x, num_samples, kind, generator) if noise is None else noise
            if objective == "fd-ssm":
                require_precision(x.dtype, "x", allow_low_precision)
                result = _finite_difference(fn, x, v, sigma, chunk, allow_low_precision)
            else:
                result = _sliced(fn, x, v, create_graph, reduced=objective == "ssm-vr")
    return result if create_graph else result.detach()


def _sliced(fn: Function, x: Tensor, v: Tensor, create_graph: bool, *, reduced: bool) -> Tensor:
    curvature = (v * products(fn, x, v, create_graph)).flatten(2).sum(2).mean(0)
    slope = gradient(fn, x, create_graph)[2]
    return curvature + (half_square(slope) if reduced else 0.5 * inner(v, slope).square().mean(0))


def _finite_difference(
    fn: Function, x: Tensor, v: Tensor, step: float, chunk: int | None, low: bool
) -> Tensor:
    value = evaluate(fn, x)
    require_precision(value.dtype, "the value of fn", low)
    ahead, behind = at_points(fn, x + step * v, chunk), at_points(fn, x - step * v, chunk)
    curvature = (ahead + behind - 2 * value) / step**2
    return (curvature + (ahead - behind).square() / (8 * step**2)).mean(0)


def _denoising(
    fn: Function, x: Tensor, z: Tensor, sigma: float, create_graph: bool, reduced: bool
) -> Tensor:
    rows = []
    clean = gradient(fn, x, create_graph)[2] if reduced else None
    for row in z:
        noisy = gradient(fn, x + sigma * row, create_graph)[2]
        if clean is None:
            rows.append(half_square(noisy + row / sigma))
        else:
            change = ((noisy - clean) * row).flatten(1).sum(1) / sigma
            rows.append(half_square(noisy) + change + x[0].numel() / (2 * sigma**2))
    return torch.stack(rows).mean(0)
