"""Mutual information of jointly Gaussian variables, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from mi_surrogates.errors import DegenerateData


def _blocks(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the centred, scaled samples and their joint covariance (..., d, d)."""
    joint = torch.cat([x, y], -1)
    joint = joint - joint.mean(-2, keepdim=True)
    scale = joint.square().mean(-2, keepdim=True).sqrt()
    if bool((scale == 0).any()):
        column = int((scale == 0).reshape(-1, scale.shape[-1]).any(0).nonzero()[0])
        raise DegenerateData(f"column {column} of (x, y) is constant; drop it")
    joint = joint / scale
    return joint[..., : x.shape[-1]], joint[..., x.shape[-1] :], joint.mT @ joint / x.shape[-2]


def _cholesky(cov: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(cov)
    smallest = factor.detach().diagonal(dim1=-2, dim2=-1).amin()
    if bool((info != 0).any()) or float(smallest) ** 2 < 16 * torch.finfo(cov.dtype).eps:
        raise DegenerateData(
            "the covariance of (x, y) is singular: a column is a copy or a linear function of others"
        )
    return factor  # type: ignore[no-any-return]


def _log_det(factor: Tensor) -> Tensor:
    return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def gaussian_mi_from_cov(cov: Tensor, dim_x: int) -> Tensor:
    """Return ½ log(det Σ_x det Σ_y / det Σ_xy) of a joint covariance, by Cholesky.

    Args:
        cov: (..., d, d) covariance of (x, y).
        dim_x: how many of the d columns are x's.

    Raises:
        DegenerateData: the covariance is singular.

    Example:
        >>> cov = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
        >>> round(gaussian_mi_from_cov(cov, 1).item(), 6)
        0.830366
    """
    x, y = cov[..., :dim_x, :dim_x], cov[..., dim_x:, dim_x:]
    parts = (_log_det(_cholesky(block)) for block in (x, y, cov))
    log_x, log_y, log_xy = parts
    return (log_x + log_y - log_xy) / 2


def gaussian_mi(x: Tensor, y: Tensor) -> Tensor:
    """Return the mutual information of Gaussians with the sample covariance of x and y.

    Args:
        x: (..., N, dx) samples.
        y: (..., N, dy) samples.

    Returns:
        (...) nats, differentiable.

    Raises:
        DegenerateData: a column is constant or a linear function of others.

    Example:
        >>> x = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0)).double()
        >>> gaussian_mi(x, x + 1e-3 * x.flip(0)).item() > 6
        True
    """
    _, _, cov = _blocks(x, y)
    return gaussian_mi_from_cov(cov, x.shape[-1])


def gaussian_terms(x: Tensor, y: Tensor) -> Tensor:
    """Return log p(x, y) / (p(x) p(y)) of every sample (..., N) under the fitted Gaussian.

    Their mean is `gaussian_mi`, their standard deviation over √N its standard error to first order.

    Example:
        >>> x = torch.randn(50, 2, dtype=torch.float64)
        >>> y = x + torch.randn(50, 2, dtype=torch.float64)
        >>> torch.allclose(gaussian_terms(x, y).mean(), gaussian_mi(x, y))
        True
    """
    x, y, cov = _blocks(x, y)
    dim = x.shape[-1]
    squares = []
    for part, block in (
        (x, cov[..., :dim, :dim]),
        (y, cov[..., dim:, dim:]),
        (torch.cat([x, y], -1), cov),
    ):
        solved = torch.linalg.solve_triangular(_cholesky(block), part.mT, upper=False)
        squares.append(solved.square().sum(-2))
    constant = gaussian_mi_from_cov(cov, dim)
    terms: Tensor = constant[..., None] + (squares[0] + squares[1] - squares[2]) / 2
    return terms


def cca_mi(x: Tensor, y: Tensor) -> Tensor:
    """Return −½ Σ log(1 − ρ_i²) over the canonical correlations; equal to `gaussian_mi`.

    Example:
        >>> x = torch.randn(50, 2, dtype=torch.float64)
        >>> y = x + torch.randn(50, 2, dtype=torch.float64)
        >>> torch.allclose(cca_mi(x, y), gaussian_mi(x, y))
        True
    """
    x, y, _ = _blocks(x, y)
    bases = [torch.linalg.qr(part)[0] for part in (x, y)]
    rho = torch.linalg.svdvals(bases[0].mT @ bases[1])
    return -torch.log1p(-rho.square()).sum(-1) / 2
