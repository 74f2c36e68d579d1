"""The centered softplus: one fused function, one saved tensor, exact at every beta."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CenteredSoftplus", "centered_softplus", "positive"]


def positive(name: str, value: float) -> float:
    """Return ``value`` as a float, or raise ValueError where it is not positive and finite."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return float(value)


def in_backward() -> bool:
    """Tell whether a checkpointed forward is running again inside the backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _wide(x: Tensor) -> Tensor:
    """Half precision is computed in float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _value(x: Tensor, beta: Tensor) -> Tensor:
    """s0 = max(x, 0) + log1p(expm1(-beta |x|) / 2) / beta: no cancellation on either side."""
    x = _wide(x)
    t = (x * beta).abs_().neg_()
    return torch.addcdiv(x.clamp_min(0), t.expm1_().mul_(0.5).log1p_(), beta)


def _traced_value(x: Tensor, beta: Tensor) -> Tensor:
    """x/2 + log cosh(z) / beta in plain operations, for torch.compile, which knows no ``jvp`` of a Function.

    Smooth branches only, so that whatever differentiates the trace, however often, is right.
    """
    wide = _wide(x)
    z = wide * beta * 0.5
    small = z.abs() <= 1
    near, far = torch.where(small, z, 0.0), torch.where(small, 2.0, z).abs()
    bell = torch.log1p(2 * torch.sinh(near / 2).square())
    tail = far + torch.log1p(torch.exp(-2 * far)) - math.log(2)
    return (wide / 2 + torch.where(small, bell, tail) / beta).to(x.dtype)


def _slope(x: Tensor, beta: Tensor) -> Tensor:
    return torch.sigmoid(x * beta)


def _beta_slope(x: Tensor, beta: Tensor) -> Tensor:
    """d s0 / d beta = (z tanh z - log cosh z) / beta^2 with z = beta x / 2; even, nonnegative."""
    z = (x * beta).abs() * 0.5
    q = torch.expm1(-z)
    p = q * (q + 2)  # expm1(-2z)
    small = z < 1
    argument = torch.where(small, q * q / (2 + 2 * torch.where(small, q, 0.0)), 0.5 * p)
    # small: z tanh z - log cosh z; large: the same with the two z cancelled by hand
    part = torch.where(small, p, 2 * (1 + q) * (1 + q))
    return (-torch.log1p(argument) - z * part / (2 + p)) / (beta * beta)


def _beta_curve(x: Tensor, beta: Tensor) -> Tensor:
    """d^2 s0 / d beta^2 = (x^2 s(1-s) - 2 d_beta) / beta, by its series where that cancels."""
    s = _slope(x, beta)
    t = x * beta
    series = x.pow(3) * t * (-1 / 32 + t * t / 144)
    exact = (x * x * s * (1 - s) - 2 * _beta_slope(x, beta)) / beta
    return torch.where(t.abs() < 0.03, series, exact)


def _reduce(value: Tensor, like: Tensor) -> Tensor:
    return value.sum_to_size(like.shape).to(like.dtype)


BLOCK = 2**16  # elements that stay in a core's cache through all passes


def _in_blocks(g: Tensor, x: Tensor, beta: Tensor) -> bool:
    same = g.dtype == x.dtype == beta.dtype and g.is_contiguous() and x.is_contiguous()
    same = same and x.dtype in (torch.float32, torch.float64)  # half precision is summed in float32
    return x.device.type == "cpu" and same and beta.dim() == 0 and x.numel() > BLOCK


def _backward_in_blocks(g: Tensor, x: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """(g s0', sum g d_beta s0) for one beta on a CPU, block by block.

    With t = beta |x|, m = exp(-t): beta^2 d_beta s0 = -t m / (1 + m) - log((1 + m) / 2), whose error is
    some eps t: used where a block reaches t = 1/2, and the exact form otherwise.
    """
    gx, total = torch.empty_like(x), torch.zeros_like(beta)
    blocks = (part.view(-1).split(BLOCK) for part in (g, x, gx))
    for gi, xi, out in zip(*blocks, strict=True):
        t = xi * beta
        torch.sigmoid(t, out=out)
        out.mul_(gi)
        t.abs_()
        if float(t.max()) < 0.5:
            total += torch.dot(gi, _beta_slope(xi, beta)) * beta * beta
            continue
        m = torch.neg(t).expm1_()
        h = (m * 0.5).log1p_()
        t.mul_(m.add_(1)).div_(m.add_(1))
        total -= torch.dot(gi, h.add_(t))
    return gx, total / (beta * beta)


def _vmap(function: Any, info: Any, dims: tuple[int | None, ...], *args: Tensor) -> Any:
    """Give every argument a leading batch axis, beta (the last one) with the rank of the others."""
    moved = [
        a.unsqueeze(0).expand(info.batch_size, *a.shape) if d is None else a.movedim(d, 0)
        for a, d in zip(args, dims, strict=True)
    ]
    *tensors, beta = moved
    shape, rank = beta.shape[1:], tensors[0].dim() - 1
    beta = beta.reshape(info.batch_size, *[1] * (rank - len(shape)), *shape)
    out = function.apply(*tensors, beta)
    if not isinstance(out, tuple):
        return out, 0
    return (out[0], out[1].reshape(info.batch_size, *shape)), (0, 0)


class _Softplus(torch.autograd.Function):
    """y = s0(x; beta), saving x alone."""

    @staticmethod
    def forward(x: Tensor, beta: Tensor) -> Tensor:
        return _value(x, beta).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        x, beta = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            gx, gb = _Backward.apply(grads[0], x, beta)  # type: ignore[no-untyped-call]
            return gx, gb
        return grads[0] * _slope(_wide(x), beta).to(x.dtype), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        x, beta = ctx.saved_tensors
        wide, out = _wide(x), torch.zeros_like(x)
        if tangents[0] is not None:
            out = out + tangents[0] * _slope(wide, beta)
        if tangents[1] is not None:
            out = out + tangents[1] * _beta_slope(wide, beta)
        return out.to(x.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> Any:
        return _vmap(_Softplus, info, in_dims, *args)


class _Backward(torch.autograd.Function):
    """(g s0', sum g d_beta s0): a function of its own, so that Hessians save inputs only."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        if _in_blocks(g, x, beta):
            return _backward_in_blocks(g, x, beta)
        wide = _wide(x)
        gb = _reduce(g * _beta_slope(wide, beta), beta)
        return (g * _slope(wide, beta)).to(x.dtype), gb

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, beta = ctx.saved_tensors
        u, w = grads
        wide, s = _wide(x), _slope(_wide(x), beta)
        if u is None and w is None:
            return None, None, None
        both = torch.zeros_like(wide) if u is None else g * u
        both = both * (s * (1 - s))
        d_g = torch.zeros_like(wide) if u is None else u * s
        d_x, d_b = both * beta, both * wide
        if w is not None:  # only where the gradient of beta is itself differentiated
            d_g = d_g + w * _beta_slope(wide, beta)
            d_x = d_x + g * w * wide * (s * (1 - s))
            d_b = d_b + g * w * _beta_curve(wide, beta)
        return d_g.to(g.dtype), d_x.to(x.dtype), _reduce(d_b, beta)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        g, x, beta = ctx.saved_tensors
        wide, s = _wide(x), _slope(_wide(x), beta)
        bell, slope = s * (1 - s), _beta_slope(wide, beta)
        d_gx, d_gb = torch.zeros_like(wide), torch.zeros_like(wide)
        if tangents[0] is not None:
            d_gx, d_gb = d_gx + tangents[0] * s, d_gb + tangents[0] * slope
        if tangents[1] is not None:
            d_gx = d_gx + tangents[1] * g * bell * beta
            d_gb = d_gb + tangents[1] * g * bell * wide
        if tangents[2] is not None:
            d_gx = d_gx + tangents[2] * g * bell * wide
            d_gb = d_gb + tangents[2] * g * _beta_curve(wide, beta)
        return d_gx.to(x.dtype), _reduce(d_gb, beta)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> Any:
        return _vmap(_Backward, info, in_dims, *args)


def centered_softplus(x: Tensor, beta: Tensor | float) -> Tensor:
    """Return s0(x; beta) = log((1 + exp(beta x)) / 2) / beta (paper, Section 4.1).

    Equal to ``x/2 + log cosh(beta x / 2) / beta``: ReLU as beta grows, x/2 as it vanishes, 0 at 0; its
    slope sigmoid(beta x) is below 1 and its second derivative at most beta/4. Relative error of a few
    units in the last place at every beta. Differentiable any number of times in both arguments, in reverse
    and forward mode; ``torch.func`` transforms apply.

    Args:
        x: any shape; half precision is computed in float32 and returned as it came.
        beta: positive; a number or a tensor that broadcasts against ``x``.

    Returns:
        A tensor of the shape and dtype of ``x``.

    Raises:
        ValueError: for a number that is not positive and finite.

    Example:
        >>> centered_softplus(torch.tensor([-1.0, 0.0, 1.0]), 2.0)
        tensor([-0.2831,  0.0000,  0.7169])
    """
    if not isinstance(beta, Tensor):
        beta = torch.tensor(
            positive("beta", beta), dtype=_wide(x.new_empty(0)).dtype, device=x.device
        )
    if torch.compiler.is_compiling():
        return _traced_value(x, beta)
    out: Tensor = _Softplus.apply(x, beta)  # type: ignore[no-untyped-call]
    return out


class CenteredSoftplus(nn.Module):
    """Centered softplus with a learnable beta, stored as its logarithm.

    Args:
        beta: initial value, positive. Default 5, as in the published runs.
        learnable: whether ``log_beta`` is a parameter; a buffer otherwise.
        num_parameters: 1 for one beta, or the number of channels for one each.
        channel_dim: axis of the channels in the input.
        floor: added to exp(log_beta); 1e-3 in the authors' code, 0 here.
        device: of the parameter.
        dtype: of the parameter.

    Raises:
        ValueError: for a beta that is not positive and finite, or a negative floor.

    Example:
        >>> act = CenteredSoftplus(beta=5.0)
        >>> act(torch.zeros(2, 3)).abs().max().item()
        0.0
        >>> [name for name, _ in act.named_parameters()]
        ['log_beta']
    """

    log_beta: Tensor

    def __init__(
        self,
        beta: float = 5.0,
        *,
        learnable: bool = True,
        num_parameters: int = 1,
        channel_dim: int = 1,
        floor: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Check and keep the arguments; the class says what they are."""
        super().__init__()
        if not (math.isfinite(floor) and floor >= 0):
            raise ValueError(f"floor must be a finite number of at least 0, got {floor!r}")
        if num_parameters < 1:
            raise ValueError(f"num_parameters must be at least 1, got {num_parameters!r}")
        shape = () if num_parameters == 1 else (num_parameters,)
        start = positive("beta - floor", positive("beta", beta) - floor)
        value = torch.full(shape, math.log(start), device=device, dtype=dtype)
        if learnable:
            self.log_beta = nn.Parameter(value)
        else:
            self.register_buffer("log_beta", value)
        self.channel_dim = channel_dim
        self.floor = floor

    @property
    def beta(self) -> Tensor:
        """The present beta: shape () or (channels,)."""
        value = self.log_beta.exp()
        return value + self.floor if self.floor else value

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function elementwise."""
        beta = self.beta
        if beta.dim():
            inside = -x.dim() <= self.channel_dim < x.dim()
            channels = x.shape[self.channel_dim] if inside else "no"
            if channels != beta.numel():
                raise RuntimeError(
                    f"CenteredSoftplus has {beta.numel()} betas, but the input of shape "
                    f"{tuple(x.shape)} has {channels} channels on axis {self.channel_dim}"
                )
            axis = self.channel_dim % x.dim()
            beta = beta.view([-1 if i == axis else 1 for i in range(x.dim())])
        return centered_softplus(x, beta)

    def extra_repr(self) -> str:
        """Show the present betas."""
        beta = self.beta.detach()
        known = beta.numel() == 1 and not beta.is_meta
        shown = f"beta={beta.item():.4g}" if known else f"betas={beta.numel()}"
        return shown + ("" if isinstance(self.log_beta, nn.Parameter) else ", learnable=False")
