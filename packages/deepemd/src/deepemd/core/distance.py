"""Distances between points: stable, chunkable, and with a gradient that is 0 where points coincide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def working(x: Tensor) -> Tensor:
    """Return coordinates in float32 or better; half precision is raised, float64 kept."""
    return x if x.dtype == torch.float64 else x.float()


def cost_matrix(x: Tensor, y: Tensor, p: int = 1) -> Tensor:
    """Return ``C_ij = ||x_i - y_j||^p``, by differences rather than a matrix product.

    Args:
        x: (..., N, D).
        y: (..., M, D).
        p: 1 for Euclidean distances, 2 for their squares.

    Returns:
        (..., N, M), in the dtype of ``x``. The memory is O(N M), whatever D. It is meant for solvers:
        take gradients through :func:`pair_distance` instead.

    >>> cost_matrix(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
    tensor([[5.]])
    """
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.detach(), y.detach()
        if x.shape[-1] <= 4:
            squared = torch.zeros((), device=x.device, dtype=x.dtype)
            for d in range(x.shape[-1]):
                squared = squared + (x[..., :, None, d] - y[..., None, :, d]).square()
            return squared if p == 2 else squared.sqrt()
        distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.square() if p == 2 else distance


def row_blocks(n: int, size: int | None) -> Iterator[slice]:
    """Cut ``range(n)`` into slices of at most ``size`` rows; None is one slice."""
    step = n if size is None else size
    for start in range(0, n, max(step, 1)):
        yield slice(start, min(start + step, n))


class _PairDistance(torch.autograd.Function):
    """||a - b|| along the last dimension, with derivative 0 (not NaN) where a equals b."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().sum(-1).sqrt()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        difference = a - b
        squared = difference.square().sum(-1, keepdim=True)
        apart = squared > 0
        inverse = torch.where(apart, torch.where(apart, squared, 1.0).rsqrt(), 0.0)
        pull = grad.unsqueeze(-1) * difference * inverse
        return pull, -pull


def pair_distance(a: Tensor, b: Tensor, p: int = 1) -> Tensor:
    """Return ``||a - b||^p`` row by row, differentiable in both.

    The derivative for ``p=1`` is the unit vector ``(a - b)/||a - b||``, and 0 where the points coincide
    (a subgradient; ``sqrt`` alone would give NaN there). Half precision is computed in float32.

    Args:
        a, b: (..., D), broadcastable.
        p: 1 or 2.

    >>> a = torch.zeros(2, 3, requires_grad=True)
    >>> pair_distance(a, torch.tensor([[0.0, 0, 0], [0, 3, 4]])).sum().backward()
    >>> a.grad
    tensor([[ 0.0000,  0.0000,  0.0000],
            [ 0.0000, -0.6000, -0.8000]])
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = torch.broadcast_tensors(working(a), working(b))
        if p == 2:
            return (a - b).square().sum(-1)
        distance: Tensor = _PairDistance.apply(a, b)  # type: ignore[no-untyped-call]
    return distance


def gather_points(points: Tensor, index: Tensor) -> Tensor:
    """Return ``points[b, index[b, i]]``: (B, M, D) and (B, N) give (B, N, D); -1 gives point 0."""
    safe = index.clamp_min(0).unsqueeze(-1).expand(-1, -1, points.shape[-1])
    return points.gather(1, safe)
