"""Chamfer, sliced and 'approxmatch': what people report beside, or instead of, the EMD (2.10)."""

from __future__ import annotations

import torch
from torch import Tensor

from deepemd.core.distance import cost_matrix, row_blocks
from deepemd.core.output import Solution, matching_cost, plan_cost


def nearest(x: Tensor, y: Tensor, chunk_size: int | None = None) -> Tensor:
    """Return the index (B, N) of the nearest point of ``y`` for each point of ``x``, in row blocks."""
    parts = [cost_matrix(x[:, rows], y, 2).argmin(2) for rows in row_blocks(x.shape[1], chunk_size)]
    return torch.cat(parts, 1)


def solve_chamfer(
    x: Tensor, y: Tensor, *, p: int = 1, mean_of_two: bool = False, chunk_size: int | None = None
) -> Solution:
    """Chamfer distance ``mean_i min_j C_ij + mean_j min_i C_ij``.

    Args:
        x, y: (B, N, D) and (B, M, D).
        p: 1 for distances, 2 for squares (the default elsewhere).
        mean_of_two: halve the sum; at equal sizes that is at most the EMD.
        chunk_size: rows at a time.
    """
    index, inverse = nearest(x, y, chunk_size), nearest(y, x, chunk_size)
    value = matching_cost(x, y, index, p) + matching_cost(y, x, inverse, p)
    return Solution(index, inverse, value=value / 2 if mean_of_two else value)


def _at_quantiles(ordered: Tensor, levels: Tensor) -> Tensor:
    """Interpolate sorted values (..., n), taken at levels (k + ½)/n, to other levels."""
    n = ordered.shape[-1]
    place = (levels * n - 0.5).clamp(0, n - 1)
    low = place.floor().long().clamp_max(max(n - 2, 0))
    share = place - low
    high = (low + 1).clamp_max(n - 1)
    return ordered[..., low] * (1 - share) + ordered[..., high] * share


def solve_sliced(
    x: Tensor,
    y: Tensor,
    *,
    p: int = 1,
    n_proj: int = 128,
    seed: int = 0,
    generator: torch.Generator | None = None,
) -> Solution:
    """Sliced distance: the mean over random unit directions of the 1-D cost ``mean |sorted x - sorted y|^p``.

    Args:
        x, y: (B, N, D) and (B, M, D); for N != M the larger one is interpolated to the other's quantiles.
        p: exponent.
        n_proj: directions, shared by the batch.
        seed: of the directions; the same call gives the same value.
        generator: used instead of ``seed``, so that each call draws new directions.
    """
    if n_proj < 1:
        raise ValueError(f"n_proj must be at least 1, got {n_proj}")
    if generator is None:
        generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(
        x.shape[2], n_proj, generator=generator, dtype=torch.float64, device=generator.device
    )
    theta = (theta / theta.norm(dim=0)).to(x)
    with torch.autocast(x.device.type, enabled=False):
        u = (x @ theta).transpose(1, 2).sort(2).values
        v = (y @ theta).transpose(1, 2).sort(2).values
        n, m = u.shape[2], v.shape[2]
        if n != m:
            k = min(n, m)
            levels = (torch.arange(k, device=x.device, dtype=x.dtype) + 0.5) / k
            u, v = (u, _at_quantiles(v, levels)) if n < m else (_at_quantiles(u, levels), v)
        value = ((u - v).abs() if p == 1 else (u - v).square()).mean((1, 2))
    return Solution(iterations=n_proj, value=value)


def approxmatch_plan(x: Tensor, y: Tensor) -> Tensor:
    """Return the soft matching (B, N, M) of the 'approxmatch' routine of PointNet-autoencoder code.

    It sums to max(N, M) at most; there is no guarantee of how far it is from optimal.
    """
    squared = cost_matrix(x, y, 2)
    n, m = squared.shape[1:]
    left = torch.full_like(squared[:, :, 0], max(1, m // n))
    right = torch.full_like(squared[:, 0, :], max(1, n // m))
    match = torch.zeros_like(squared)
    for j in range(7, -3, -1):
        level = -(4.0**j) if j != -2 else 0.0
        weight = torch.exp(level * squared)
        ask = left / ((weight * right.unsqueeze(1)).sum(2) + 1e-9)
        sold = right * (weight * ask.unsqueeze(2)).sum(1)
        ratio = right * (right / (sold + 1e-9)).clamp_max(1)
        right = (right - sold).clamp_min(0)
        moved = weight * ask.unsqueeze(2) * ratio.unsqueeze(1)
        match = match + moved
        left = (left - moved.sum(2)).clamp_min(0)
    return match


def solve_approxmatch(x: Tensor, y: Tensor, *, total: bool = True) -> Solution:
    """Cost of :func:`approxmatch_plan`, weights constant: the ``sum`` that PyTorchEMD-type code returns.

    Args:
        x, y: (B, N, D) and (B, M, D).
        total: return the sum; False divides by N (PointFlow's convention).
    """
    plan = approxmatch_plan(x, y)
    value = plan_cost(x, y, plan, 1)
    return Solution(plan=plan, value=value if total else value / x.shape[1])
