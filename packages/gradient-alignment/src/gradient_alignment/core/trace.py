"""Estimators of the trace of the input Hessian, one number for each sample, differentiable in the parameters.

Throughout, f maps a batch (B, ...) to (B,), sample by sample; H is the Hessian of f at one sample, D its size,
v a direction with E v vᵀ = I. The Taylor estimators are Srinivas and Fleuret (2021), Eq. 3, and its
variance-reduced forms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from gradient_alignment.core.deflation import hutch_plus_plus, variance_of_mean, xtrace
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

Function = Callable[[Tensor], Tensor]
Method = Literal[
    "taylor",
    "taylor-cv",
    "antithetic",
    "hutchinson",
    "forward-over-reverse",
    "forward-forward",
    "exact",
    "hutch++",
    "xtrace",
]
FINITE_DIFFERENCES = ("taylor", "taylor-cv", "antithetic")
"""Methods that compare values of f at nearby points, and need single precision or better."""
TRANSFORMS = ("forward-over-reverse", "forward-forward")
"""Methods made of torch.func's transforms, under which no buffer can be updated."""


def hessian_trace(
    fn: Function,
    x: Tensor,
    *,
    method: Method = "hutchinson",
    num_samples: int = 1,
    sigma: float = 1e-2,
    distribution: Distribution | None = None,
    generator: torch.Generator | None = None,
    create_graph: bool = True,
    chunk: int | None = None,
    return_var: bool = False,
    noise: Tensor | None = None,
    allow_low_precision: bool = False,
) -> Any:
    r"""Estimate :math:`\mathrm{tr}\,\nabla^2 f(x_b)` for every sample b.

    =========================  ======================================================  =============  ==================
    method                     one draw                                                unbiased       variance of a draw
    =========================  ======================================================  =============  ==================
    ``taylor``, as published   :math:`\frac{2}{\sigma^2}(f(x+\sigma v)-f(x))`          to O(σ²)       4‖∇f‖²/σ² + 2‖H‖²
    ``taylor-cv``              the same, minus :math:`\frac{2}{\sigma}\nabla f^T v`    to O(σ²)       2‖H‖²
    ``antithetic``             :math:`(f(x+\sigma v)+f(x-\sigma v)-2f(x))/\sigma^2`    to O(σ²)       2‖H‖²
    ``hutchinson``             vᵀHv by a second backward pass                          yes            2‖H‖²
    ``forward-over-reverse``   vᵀHv by a JVP of the gradient                           yes            2‖H‖²
    ``forward-forward``        vᵀHv by two nested JVPs, no backward pass               yes            2‖H‖²
    ``exact``                  the D diagonal entries                                  exact          0
    ``hutch++``, ``xtrace``    a low-rank part exactly, the rest by draws              yes            often smaller
    =========================  ======================================================  =============  ==================

    Variances are to leading order in σ; those of the last row are small if H has a few large eigenvalues.
    With Rademacher directions the squares of the diagonal drop out of ‖H‖². The bias of the Taylor forms is
    :math:`\frac{\sigma^2}{4}\Delta^2 f` for Gaussian directions.

    Args:
        fn: maps (B, ...) to (B,); row b of the result depends on row b of the input alone.
        x: (B, ...), floating; it need not require a gradient, and its `.grad` is left alone.
        method: see the table; default "hutchinson".
        num_samples: draws K that are averaged (for "hutch++" and "xtrace" the number of Hessian-vector
            products); ignored by "exact".
        sigma: length of a finite step, in units of x; default 0.01, the published value.
        distribution: of v; None is "gaussian" for "taylor", as published, and "rademacher" otherwise.
        generator: source of the directions, on x's device.
        create_graph: whether the result can be differentiated, in the parameters of `fn` above all.
        chunk: how many draws (of "exact": diagonal entries) are evaluated at once; None is all draws in one
            pass, and 16 entries.
        return_var: also return the variance of the estimate, from the spread of the draws.
        noise: directions to use instead of random ones, (K, B, ...), unscaled.
        allow_low_precision: let finite differences of half-precision values pass.

    Autocast is switched off inside.

    Returns:
        (B,); with `return_var` a pair of (B,), estimate and its estimated variance (NaN for one draw).

    Raises:
        TypeError: x is not floating.
        ValueError: an unknown word, a number out of range, a result of `fn` that is not (B,), or a finite
            difference in half precision.

    Example:
        >>> import torch
        >>> a = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> x = torch.randn(4, 2)
        >>> trace = hessian_trace(lambda x: 0.5 * torch.einsum("bi,ij,bj->b", x, a, x), x, method="exact")
        >>> trace.tolist()
        [5.0, 5.0, 5.0, 5.0]
    """
    check_choice("method", method, Method)
    check_positive("sigma", sigma)
    check_count("num_samples", num_samples)
    if chunk is not None:
        check_count("chunk", chunk)
    require_floating(x)
    with torch.autocast(x.device.type, enabled=False), torch.set_grad_enabled(create_graph):
        x = x.detach()
        if noise is None:
            default: Distribution = "gaussian" if method == "taylor" else "rademacher"
            noise = directions(x, num_samples, distribution or default, generator)
        else:
            check_directions(noise, x)
        if method == "exact":
            diagonal = hessian_diagonal(fn, x, chunk=chunk, create_graph=create_graph)
            mean = diagonal.flatten(1).sum(1)
            variance = torch.zeros_like(mean)
        elif method in ("hutch++", "xtrace"):
            deflated = hutch_plus_plus if method == "hutch++" else xtrace
            mean, variance = deflated(lambda v: products(fn, x, v, create_graph), noise)
        else:
            draws = _DRAWS[method](fn, x, noise, sigma, create_graph, chunk, allow_low_precision)
            mean, variance = draws.mean(0), variance_of_mean(draws, 0)
    mean = mean if create_graph else mean.detach()
    return (mean, variance.detach()) if return_var else mean


def evaluate(fn: Function, x: Tensor) -> Tensor:
    """Return fn(x), or raise ValueError unless it is one number for each sample."""
    value = fn(x)
    if value.shape != x.shape[:1]:
        raise ValueError(
            f"fn must map {tuple(x.shape)} to ({len(x)},), one number a sample; got {tuple(value.shape)}"
        )
    return value


def gradient(fn: Function, x: Tensor, create_graph: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return a fresh leaf with the values of x, f there, and its gradient.

    In a compiled region, which has no autograd.grad, by torch.func; then x is no leaf of the result's graph.
    """
    if torch.compiler.is_compiling():

        def total(point: Tensor) -> tuple[Tensor, Tensor]:
            value = evaluate(fn, point)
            return value.sum(), value

        slope, (_, value) = torch.func.grad_and_value(total, has_aux=True)(x)
        return x, value, slope
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = evaluate(fn, leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf, create_graph=create_graph)
    return leaf, value, slope


def inner(directions: Tensor, slope: Tensor) -> Tensor:
    """Return the inner products of directions (K, B, ...) with one vector a sample (B, ...), (K, B)."""
    return (directions * slope).flatten(2).sum(2)


def at_points(fn: Function, points: Tensor, chunk: int | None) -> Tensor:
    """Return f at (K, B, ...) points as (K, B), `chunk` draws in one call."""
    return torch.cat(
        [
            evaluate(fn, part.flatten(0, 1)).view(part.shape[:2])
            for part in torch.split(points, chunk or len(points))
        ]
    )


def second_difference(
    fn: Function,
    x: Tensor,
    noise: Tensor,
    sigma: float,
    *,
    value: Tensor,
    slope: Tensor | None = None,
    chunk: int | None = None,
    allow_low_precision: bool = False,
) -> Tensor:
    r"""Return :math:`\frac{2}{\sigma^2}(f(x+\sigma v) - f(x) - \sigma\nabla f^T v)` for every draw, (K, B).

    Without `slope` the last term is left out: the published estimator. Autocast is off inside.
    """
    require_precision(x.dtype, "x", allow_low_precision)
    with torch.autocast(x.device.type, enabled=False):
        ahead = at_points(fn, x + sigma * noise, chunk)
        require_precision(ahead.dtype, "the value of fn", allow_low_precision)
        change = ahead - value
        if slope is not None:
            change = change - sigma * inner(noise, slope)
        return 2 / sigma**2 * change


def _taylor(
    fn: Function, x: Tensor, noise: Tensor, sigma: float, graph: bool, chunk: int | None, low: bool
) -> Tensor:
    require_precision(x.dtype, "x", low)
    value = evaluate(fn, x)
    return second_difference(fn, x, noise, sigma, value=value, chunk=chunk, allow_low_precision=low)


def _taylor_cv(
    fn: Function, x: Tensor, noise: Tensor, sigma: float, graph: bool, chunk: int | None, low: bool
) -> Tensor:
    require_precision(x.dtype, "x", low)
    leaf, value, slope = gradient(fn, x, graph)
    return second_difference(
        fn, leaf, noise, sigma, value=value, slope=slope, chunk=chunk, allow_low_precision=low
    )


def _antithetic(
    fn: Function, x: Tensor, noise: Tensor, sigma: float, graph: bool, chunk: int | None, low: bool
) -> Tensor:
    require_precision(x.dtype, "x", low)
    value = evaluate(fn, x)
    require_precision(value.dtype, "the value of fn", low)
    ahead = at_points(fn, x + sigma * noise, chunk)
    behind = at_points(fn, x - sigma * noise, chunk)
    return (ahead + behind - 2 * value) / sigma**2


def products(fn: Function, x: Tensor, noise: Tensor, create_graph: bool) -> Tensor:
    """Return H v for every draw, (K, B, ...), by a backward pass through the gradient."""
    leaf, _, slope = gradient(fn, x, True)
    if not slope.requires_grad:  # f is linear
        return torch.zeros_like(noise)
    return torch.stack(
        [
            torch.autograd.grad(
                slope, leaf, v, create_graph=create_graph, retain_graph=True, materialize_grads=True
            )[0]
            for v in noise
        ]
    )


def _hutchinson(
    fn: Function, x: Tensor, noise: Tensor, sigma: float, graph: bool, chunk: int | None, low: bool
) -> Tensor:
    return (noise * products(fn, x, noise, graph)).flatten(2).sum(2)


def _forward_over_reverse(
    fn: Function, x: Tensor, noise: Tensor, sigma: float, graph: bool, chunk: int | None, low: bool
) -> Tensor:
    slope = torch.func.grad(lambda point: evaluate(fn, point).sum())
    rows = [(v * torch.func.jvp(slope, (x,), (v,))[1]).flatten(1).sum(1) for v in noise]
    return torch.stack(rows)


def _forward_forward(
    fn: Function, x: Tensor, noise: Tensor, sigma: float, graph: bool, chunk: int | None, low: bool
) -> Tensor:
    def along(v: Tensor) -> Tensor:
        def first(point: Tensor) -> Tensor:
            result: Tensor = torch.func.jvp(lambda p: evaluate(fn, p), (point,), (v,))[1]
            return result

        result: Tensor = torch.func.jvp(first, (x,), (v,))[1]
        return result

    return torch.stack([along(v) for v in noise])


_DRAWS: dict[str, Callable[..., Tensor]] = {
    "taylor": _taylor,
    "taylor-cv": _taylor_cv,
    "antithetic": _antithetic,
    "hutchinson": _hutchinson,
    "forward-over-reverse": _forward_over_reverse,
    "forward-forward": _forward_forward,
}


def hessian_diagonal(
    fn: Function, x: Tensor, *, chunk: int | None = None, create_graph: bool = True
) -> Tensor:
    """Return the diagonal of every sample's Hessian, (B, ...) as x, by D Hessian-vector products.

    Args:
        fn: see `hessian_trace`.
        x: (B, ...).
        chunk: products that are taken in one vectorised backward pass, default 16; 1 is a plain loop.
        create_graph: see `hessian_trace`.

    Example:
        >>> import torch
        >>> hessian_diagonal(lambda x: (x**3).sum(1), torch.tensor([[1.0, 2.0]])).tolist()
        [[6.0, 12.0]]
    """
    leaf, _, slope = gradient(fn, x, True)
    if not slope.requires_grad:
        return torch.zeros_like(x)
    size = leaf[0].numel()
    columns = []
    for index in torch.split(torch.arange(size, device=x.device), chunk or 16):
        basis = torch.nn.functional.one_hot(index, size).to(x.dtype)
        tangents = basis.view(len(index), 1, *x.shape[1:]).expand(len(index), *x.shape)
        (rows,) = torch.autograd.grad(
            slope,
            leaf,
            tangents,
            is_grads_batched=True,
            create_graph=create_graph,
            retain_graph=True,
            materialize_grads=True,
        )
        columns.append(rows.flatten(2).gather(2, index.view(-1, 1, 1).expand(-1, len(x), 1)))
    return torch.cat(columns).squeeze(2).t().reshape(x.shape)
