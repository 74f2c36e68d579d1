"""Joint normalisation of a pair of clouds before the network: the matching does not change."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MODES = ("pair", "rms", "none")


def unit_of(*clouds: Tensor) -> Tensor:
    """Return the power of two (B, 1, 1) to divide extreme clouds by, and 1 for all others.

    The square of 1e-25 is 0 in float32, and that of 1e25 infinite: distances would be, too. Dividing by a
    power of two is exact, and clouds whose largest coordinate lies within 2^-16 and 2^16 stay as they are.

    >>> unit_of(torch.tensor([[[0.5, -3.0]]])).item(), unit_of(torch.full((1, 2, 3), 1e-25)).item()
    (1.0, 1.0339757656912846e-25)
    """
    top = torch.stack([cloud.detach().abs().amax((1, 2)) for cloud in clouds]).amax(0)
    limit = -math.log2(torch.finfo(top.dtype).tiny)
    exponent = top.log2().round().clamp(-limit, limit)
    extreme = top.isfinite() & (top > 0) & (exponent.abs() > 16)
    return torch.where(extreme, exponent, 0).exp2().view(-1, 1, 1)


def normalize_pair(
    x: Tensor,
    y: Tensor,
    mask_x: Tensor | None = None,
    mask_y: Tensor | None = None,
    mode: str = "pair",
) -> tuple[Tensor, Tensor, Tensor]:
    """Centre a pair on the mean of its union and divide it by one scale (spec 2.8).

    Args:
        x, y: (B, N, D) and (B, M, D).
        mask_x, mask_y: (B, N) and (B, M), True for real points; the others come back as 0.
        mode: ``"pair"`` divides by the largest norm, ``"rms"`` by √3 times the root mean square (outliers
            then do not shrink the rest), ``"none"`` only zeroes the padding.

    Returns:
        The two clouds and the scale (B, 1, 1), 1 where all points coincide.

    >>> x, y, scale = normalize_pair(torch.tensor([[[2.0]]]), torch.tensor([[[6.0]]]))
    >>> x.item(), y.item(), scale.item()
    (-1.0, 1.0, 2.0)
    """
    if mode not in MODES:
        raise ValueError(f"normalize must be one of {', '.join(MODES)}, got {mode!r}")
    points = torch.cat([x, y], 1)
    count: Tensor | int = points.shape[1]
    if mask_x is not None or mask_y is not None:
        ones_x = mask_x if mask_x is not None else torch.ones_like(x[..., 0], dtype=torch.bool)
        ones_y = mask_y if mask_y is not None else torch.ones_like(y[..., 0], dtype=torch.bool)
        keep = torch.cat([ones_x, ones_y], 1).unsqueeze(-1)
        points = torch.where(keep, points, torch.zeros_like(points))
        count = keep.sum(1, keepdim=True)
    else:
        keep = None
    if mode == "none":
        scale = torch.ones_like(points[:, :1, :1])
    else:
        unit = unit_of(points)
        points = points / unit
        points = points - points.sum(1, keepdim=True) / count
        if keep is not None:
            points = torch.where(keep, points, torch.zeros_like(points))
        squared = points.square().sum(-1, keepdim=True)
        if mode == "pair":
            scale = squared.amax(1, keepdim=True).sqrt()
        else:
            scale = (3 * squared.sum(1, keepdim=True) / count).sqrt()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        points = points / scale
        scale = scale * unit
    return points[:, : x.shape[1]], points[:, x.shape[1] :], scale
