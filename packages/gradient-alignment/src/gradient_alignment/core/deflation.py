"""Traces with a low-rank part taken exactly: Hutch++ (Meyer et al. 2021) and XTrace (Epperly et al. 2024).

The subspace is held constant when the estimate is differentiated: for any subspace that does not depend on the
remaining directions the estimate is unbiased, so the derivative with the subspace held fixed is an unbiased
estimate of the trace's derivative.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Products = Callable[[Tensor], Tensor]


def _columns(v: Tensor) -> Tensor:
    """Turn (K, B, ...) into (B, D, K)."""
    return v.flatten(2).permute(1, 2, 0)


def _directions(columns: Tensor, like: Tensor) -> Tensor:
    """Turn (B, D, K) into (K, B, ...)."""
    return columns.permute(2, 0, 1).reshape(-1, *like.shape[1:])


def variance_of_mean(draws: Tensor, dim: int) -> Tensor:
    """Return the estimated variance of the draws' mean; NaN for a single draw."""
    draws = draws.detach()
    if draws.shape[dim] == 1:
        return torch.full_like(draws.select(dim, 0), torch.nan)
    return draws.var(dim) / draws.shape[dim]


def hutch_plus_plus(product: Products, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return estimate and its variance, (B,) each, from m = K Hessian-vector products.

    A third of the products finds a subspace Q, a third takes tr(QᵀHQ), a third estimates the trace of the rest.

    Args:
        product: maps directions (K, B, ...) to H v.
        noise: (K, B, ...) independent directions, at least 3.
    """
    third = len(noise) // 3
    if third == 0:
        raise ValueError(f"hutch++ needs num_samples of at least 3, got {len(noise)}")
    rank = min(third, noise[0, 0].numel())
    with torch.no_grad():
        sketch = _columns(product(noise[:rank]).detach())
        basis = torch.linalg.qr(sketch).Q
    inside = _columns(product(_directions(basis, noise)))
    exact = (basis * inside).sum((1, 2))
    rest = _columns(noise[third : len(noise) - third])
    rest = rest - basis @ (basis.mT @ rest)
    draws = (rest * _columns(product(_directions(rest, noise)))).sum(1)
    return exact + draws.mean(1), variance_of_mean(draws, 1)


def xtrace(product: Products, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return estimate and its variance, (B,) each, from 2 K Hessian-vector products.

    Every direction in turn is left out of the subspace and serves for the rest; the K estimates are averaged.

    Args:
        product: maps directions (K, B, ...) to H v.
        noise: (K, B, ...) independent directions, 2 to D of them.
    """
    count, size = len(noise), noise[0, 0].numel()
    if not 2 <= count <= size:
        raise ValueError(
            f"xtrace needs num_samples between 2 and the {size} dimensions of a sample, got {count}"
        )
    image = product(noise)
    omega, y = _columns(noise), _columns(image)
    with torch.no_grad():
        # by singular values: of dependent columns (equal directions, H of low rank) the QR decomposition alone
        # makes arbitrary directions, which depend on the one that is left out
        orthonormal, triangle = torch.linalg.qr(y.detach())
        rotation, lengths, mix = torch.linalg.svd(triangle)
        basis = orthonormal @ rotation
        accuracy = torch.finfo(y.dtype).eps ** 0.5
        kept = lengths > accuracy * lengths[:, :1]
        basis = basis * kept.unsqueeze(1)
        # in coordinates of the basis, column i is orthogonal to all columns of y but the i-th
        left_out = torch.where(kept, 1 / lengths, 0).unsqueeze(2) * mix
        # where the others span column i as well, nothing is left out
        eye = torch.eye(count, dtype=y.dtype, device=y.device)
        span = mix.mT @ (kept.unsqueeze(2) * mix)
        needed = (span - eye).norm(dim=1, keepdim=True) < accuracy**0.5
        length = left_out.norm(dim=1, keepdim=True)
        left_out = torch.where(needed, left_out / length, 0)
    z = _columns(product(_directions(basis, noise)))  # H Q
    inside = basis.mT @ z
    low_rank = inside.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    low_rank = low_rank - torch.einsum("bki,bkl,bli->bi", left_out, inside, left_out)
    with torch.no_grad():
        weights = basis.mT @ omega
        weights = weights - left_out * (left_out * weights).sum(1, keepdim=True)
    # the residual r = omega - Q_i w; r' H r from H omega and H Q, which are known
    cross = torch.einsum("bki,bdk,bdi->bi", weights, basis, y)
    back = torch.einsum("bdi,bdk,bki->bi", omega, z, weights)
    both = torch.einsum("bki,bkl,bli->bi", weights, inside, weights)
    draws = low_rank + (omega * y).sum(1) - cross - back + both
    return draws.mean(1), variance_of_mean(draws, 1)
