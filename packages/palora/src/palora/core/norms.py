"""Layers whose output depends on the whole batch, made aware of rays.

When M rays run in one pass, batch normalisation must treat them as M batches, and update its
running statistics as M successive passes would:

.. math:: r ← (1−m)^M r + \\sum_i m (1−m)^{M−i} μ_i
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from palora.core.layers import Switched, adapted_class
from palora.core.preference import PreferenceState

__all__ = ["make_ray_aware"]

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_MASKED = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def _rays(state: PreferenceState, training: bool) -> Any:
    try:
        active = state.current(training)
    except RuntimeError:
        return None
    return active if active.rays > 1 else None


class RayNorm(Switched):
    """A normalisation over the batch that keeps the rays of one pass apart."""

    training: bool
    _palora: PreferenceState

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each ray by its own statistics, in the order of the rays."""
        x = input
        active = _rays(self._palora, self.training)
        own: Any = super().forward  # type: ignore[misc]
        module: Any = self
        by_batch = self.training or module.running_mean is None
        if isinstance(self, nn.modules.instancenorm._InstanceNorm):
            by_batch = self.training and module.track_running_stats
        if active is None or active.joint or not by_batch or x.shape[0] % active.rays:
            out: Tensor = own(x)
            return out
        if type(self)._palora_original not in _PLAIN:
            return torch.cat([own(block) for block in x.chunk(active.rays)])
        return _batch_norm_rays(module, x, active.rays)


def _batch_norm_rays(norm: Any, x: Tensor, rays: int) -> Tensor:
    """Batch normalisation of M blocks as M·C channels, with the M moving averages in closed form."""
    norm._check_input_dim(x)
    wide = x.view(rays, -1, *x.shape[1:]).transpose(0, 1).flatten(1, 2)
    track = norm.training and norm.track_running_stats and norm.running_mean is not None
    mean = var = None
    if track:
        mean = torch.zeros(wide.shape[1], dtype=norm.running_mean.dtype, device=x.device)
        var = torch.zeros_like(mean)
    weight = None if norm.weight is None else norm.weight.repeat(rays)
    bias = None if norm.bias is None else norm.bias.repeat(rays)
    y = F.batch_norm(wide, mean, var, weight, bias, True, 1.0, norm.eps)
    if track:
        _advance(norm, mean.view(rays, -1), var.view(rays, -1), rays)  # type: ignore[union-attr]
    out: Tensor = y.unflatten(1, (rays, -1)).transpose(0, 1).reshape(x.shape)
    return out


def _advance(norm: Any, means: Tensor, variances: Tensor, rays: int) -> None:
    """M successive updates of the running statistics."""
    with torch.no_grad():
        if norm.momentum is None:
            seen = 0 if norm.num_batches_tracked is None else norm.num_batches_tracked
            keep = seen / (seen + rays)
            share = torch.full((rays, 1), 1.0, dtype=means.dtype, device=means.device)
            share = share / (seen + rays)
        else:
            m = norm.momentum
            keep = (1 - m) ** rays
            powers = torch.arange(rays - 1, -1, -1, dtype=means.dtype, device=means.device)
            share = (m * (1 - m) ** powers).unsqueeze(1)
        norm.running_mean.mul_(keep).add_((share * means).sum(0))
        norm.running_var.mul_(keep).add_((share * variances).sum(0))
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(rays)


class RayDropout(Switched):
    """Dropout that may draw one mask for all rays."""

    training: bool
    _palora: PreferenceState

    def forward(self, input: Tensor) -> Tensor:
        """Drop entries; with ``shared_mask`` the same ones in every ray."""
        x = input
        active = _rays(self._palora, self.training)
        own: Any = super().forward  # type: ignore[misc]
        if active is None or not active.shared_mask or not self.training:
            out: Tensor = own(x)
            return out
        rays = active.rays
        mask: Tensor = own(torch.ones_like(x[: x.shape[0] // rays]))
        return (x.view(rays, *mask.shape) * mask).view(x.shape)


def make_ray_aware(model: nn.Module, state: PreferenceState) -> None:
    """Switch batch-dependent normalisations and dropouts of ``model``; done already: no change."""
    for module in list(model.modules()):
        if isinstance(module, Switched):
            continue
        original = type(module)
        if isinstance(module, _NormBase):
            mixin: type = RayNorm
        elif isinstance(module, _DropoutNd) and original in _MASKED:
            mixin = RayDropout
        else:
            continue
        module.__class__ = adapted_class(mixin, original)
        module._palora = state  # type: ignore[assignment]
