"""Batch normalisation whose slope is at most a learnable Gamma."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lcnn.core.activation import in_backward, positive

__all__ = [
    "LipschitzBatchNorm1d",
    "LipschitzBatchNorm2d",
    "LipschitzBatchNorm3d",
    "LipschitzBatchNormAct2d",
    "LipschitzNorm",
    "LipschitzSyncBatchNorm",
    "from_batchnorm",
]

Stats = Literal["running", "batch"]


class LipschitzNorm(_BatchNorm):
    """What the Lipschitz batch norms share (paper, Section 4.2).

    With ``l = max_c |w_c| / sqrt(var_c + eps)`` the slope of plain batch norm,
    ``y = min(1, Gamma / l) (BN(x) - b) + b``: plain batch norm while its slope is at most Gamma, scaled
    down otherwise. In evaluation the Lipschitz constant is exactly min(l, Gamma).

    Args:
        num_features: channels.
        eps: added to the variance. Default 1e-5.
        momentum: of the running statistics. Default 0.1; None averages.
        affine: whether weight and bias are learnt. Default False, as in the paper.
        track_running_stats: as in ``nn.BatchNorm2d``.
        device: of the parameters.
        dtype: of the parameters.
        lipschitz: initial Gamma, positive. Default 10.
        stats: where l comes from in training: ``"running"`` (the paper: the running variance before this
            batch's update, without gradient) or ``"batch"`` (the biased variance of the batch itself,
            differentiable, exact).

    Raises:
        ValueError: for a Gamma that is not positive and finite, or unknown ``stats``.

    Example:
        >>> norm = LipschitzBatchNorm1d(2, lipschitz=0.5).eval()
        >>> norm(torch.tensor([[1.0, -1.0]]))
        tensor([[ 0.5000, -0.5000]], grad_fn=<NativeBatchNormBackward0>)
    """

    log_lipschitz: nn.Parameter
    _before: Tensor | None = None  # 1 / l of the last training forward
    weight: Any
    bias: Any
    running_mean: Any
    running_var: Any
    num_batches_tracked: Any

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        lipschitz: float = 10.0,
        stats: Stats = "running",
    ) -> None:
        """Check and keep the arguments; the class says what they are."""
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        if stats not in ("running", "batch"):
            raise ValueError(f"stats must be 'running' or 'batch', got {stats!r}")
        self.stats = stats
        start = math.log(positive("lipschitz", lipschitz))
        self.log_lipschitz = nn.Parameter(torch.tensor(start, device=device, dtype=dtype))

    @classmethod
    def from_batchnorm(
        cls, norm: nn.Module, lipschitz: float = 10.0, *, stats: Stats = "running"
    ) -> LipschitzNorm:
        """Return the Lipschitz form of a batch norm of this kind, see :func:`lcnn.from_batchnorm`.

        Raises:
            TypeError: for a norm whose Lipschitz form is of another class.
        """
        made = from_batchnorm(norm, lipschitz, stats=stats)
        if not isinstance(made, cls):
            raise TypeError(
                f"{cls.__name__}.from_batchnorm got {type(norm).__name__}, whose Lipschitz form is "
                f"{type(made).__name__}"
            )
        return made

    @property
    def lipschitz(self) -> Tensor:
        """The present Gamma, a scalar."""
        return self.log_lipschitz.exp()

    def _inverse_slope(self, variance: Tensor) -> Tensor:
        """1 / l, the m of the paper; finite also where all weights are zero."""
        std = (variance + self.eps).sqrt()
        if self.weight is None:
            smallest: Tensor = std.min()
            return smallest
        slope = (self.weight.abs() / std).max()
        inverse: Tensor = 1 / slope.clamp_min(torch.finfo(slope.dtype).tiny * 4)
        return inverse

    def slope(self) -> Tensor:
        """Return the Lipschitz constant in evaluation mode, min(l, Gamma), a scalar."""
        if self.running_var is None:
            raise RuntimeError("slope() needs running statistics; this layer does not track them")
        return torch.minimum(1 / self._inverse_slope(self.running_var), self.lipschitz)

    def _scale(self, x: Tensor, batch_stats: bool) -> Tensor:
        if batch_stats and (self.stats == "batch" or self.running_var is None):
            dims = [d for d in range(x.dim()) if d != 1]
            inverse = self._inverse_slope(x.to(self.log_lipschitz.dtype).var(dims, correction=0))
        else:
            with torch.no_grad():
                inverse = self._inverse_slope(self.running_var)
                if in_backward() and batch_stats and self._before is not None:
                    inverse = self._before  # a checkpointed forward runs again: what it used
                if not torch.compiler.is_compiling():
                    self._before = inverse if batch_stats else None
                else:
                    # A compiled backward pass may compute this again, from the running variance, which has
                    # moved by then; it keeps the result of a sort.
                    inverse = inverse.view(1).sort().values[0]
        product = self.lipschitz * inverse
        return torch.minimum(product, torch.ones_like(product))

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` (batch, channels, ...)."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        batch_stats = self.training or self.running_mean is None or self.running_var is None
        factor = 0.0 if self.momentum is None else self.momentum
        scale = self._scale(input, batch_stats)  # before the running variance moves
        again = batch_stats and in_backward()  # statistics have been counted already
        if not again and self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        # contiguous: the CPU kernel reads beyond an expanded scalar
        ones = scale.new_ones(self.num_features) if self.weight is None else self.weight
        weight = scale * ones
        tracked = not self.training or self.track_running_stats
        mean, var = self.running_mean, self.running_var
        if again and mean is not None:
            mean, var = mean.clone(), var.clone()  # these move instead
        return F.batch_norm(
            input,
            mean if tracked else None,
            var if tracked else None,
            weight,
            self.bias,
            batch_stats,
            factor,
            self.eps,
        )

    def extra_repr(self) -> str:
        """Show Gamma and where the slope comes from."""
        gamma = self.lipschitz.detach()
        shown = "?" if gamma.is_meta else f"{gamma.item():.4g}"
        base = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{base}, lipschitz={shown}, stats={self.stats!r}"


class LipschitzBatchNorm1d(LipschitzNorm, nn.BatchNorm1d):
    """Lipschitz batch norm for (batch, channels) and (batch, channels, length)."""


class LipschitzBatchNorm2d(LipschitzNorm, nn.BatchNorm2d):
    """Lipschitz batch norm for (batch, channels, height, width).

    See :class:`LipschitzNorm` for the formula and the arguments.
    """


class LipschitzBatchNorm3d(LipschitzNorm, nn.BatchNorm3d):
    """Lipschitz batch norm for (batch, channels, depth, height, width)."""


class LipschitzBatchNormAct2d(LipschitzBatchNorm2d):
    """timm's fused ``BatchNormAct2d``: Lipschitz batch norm, then ``drop``, then ``act``."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Normalise, drop, activate."""
        out: Tensor = self.act(self.drop(super().forward(input)))
        return out


class LipschitzSyncBatchNorm(LipschitzNorm, nn.SyncBatchNorm):
    """Lipschitz form of ``nn.SyncBatchNorm``; statistics over all processes, ``stats="running"`` only."""

    process_group: Any = None

    def __init__(self, *args: Any, process_group: Any = None, **options: Any) -> None:
        """Check and keep the arguments; the class says what they are."""
        super().__init__(*args, **options)
        if self.stats != "running":
            raise ValueError("stats must be 'running' for SyncBatchNorm, got 'batch'")
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        """Normalise over all processes, then scale around the shift."""
        scale = self._scale(input, False)
        out: Tensor = nn.SyncBatchNorm.forward(self, input)
        if self.bias is None:
            shift: Tensor = out.new_zeros(())
        else:
            shift = self.bias.view(-1, *[1] * (input.dim() - 2)).to(out.dtype)
        return (out - shift) * scale.to(out.dtype) + shift


KINDS: dict[type, type[LipschitzNorm]] = {
    nn.BatchNorm1d: LipschitzBatchNorm1d,
    nn.BatchNorm2d: LipschitzBatchNorm2d,
    nn.BatchNorm3d: LipschitzBatchNorm3d,
    nn.SyncBatchNorm: LipschitzSyncBatchNorm,
}


def is_fused_act(module: nn.Module) -> bool:
    """Tell whether a module is timm's batch norm with a built-in activation."""
    parts = (getattr(module, "act", None), getattr(module, "drop", None))
    return isinstance(module, nn.BatchNorm2d) and all(isinstance(p, nn.Module) for p in parts)


def from_batchnorm(
    norm: nn.Module, lipschitz: float = 10.0, *, stats: Stats = "running"
) -> LipschitzNorm:
    """Return the Lipschitz form of a batch norm, with its own parameters and running statistics.

    Args:
        norm: ``nn.BatchNorm1d/2d/3d``, ``nn.SyncBatchNorm`` or timm's ``BatchNormAct2d``.
        lipschitz: initial Gamma.
        stats: see :class:`LipschitzNorm`.

    Raises:
        TypeError: for any other module.

    Example:
        >>> from_batchnorm(torch.nn.BatchNorm2d(3)).affine
        True
    """
    fused = is_fused_act(norm) and not isinstance(norm, LipschitzNorm)
    kind = LipschitzBatchNormAct2d if fused else KINDS.get(type(norm))
    if kind is None:
        raise TypeError(
            f"from_batchnorm takes nn.BatchNorm1d/2d/3d, nn.SyncBatchNorm or timm's BatchNormAct2d, "
            f"got {type(norm).__name__}"
        )
    assert isinstance(norm, _BatchNorm)
    reference: Any = norm._parameters["weight"]
    reference = norm.running_mean if reference is None else reference
    kwargs: dict[str, Any] = {"lipschitz": lipschitz, "stats": stats}
    if reference is not None:
        kwargs |= {"device": reference.device, "dtype": reference.dtype}
    if isinstance(norm, nn.SyncBatchNorm):
        kwargs["process_group"] = norm.process_group
    made = kind(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, **kwargs
    )
    for name in ("weight", "bias"):
        made._parameters[name] = norm._parameters[name]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        made._buffers[name] = norm._buffers.get(name)
    if fused:
        made.drop, made.act = norm.drop, norm.act
    return made.train(norm.training)
