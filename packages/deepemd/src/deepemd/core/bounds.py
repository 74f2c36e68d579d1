"""Certificates: dual lower bounds from any potentials, and potentials from any matching (2.6)."""

from __future__ import annotations

import torch
from torch import Tensor

from deepemd.core.distance import cost_matrix, row_blocks


def c_transform(
    x: Tensor, y: Tensor, g: Tensor, p: int = 1, chunk_size: int | None = None
) -> Tensor:
    """Return ``f_i = min_j (C_ij - g_j)``, the best first potential for a second one.

    Args:
        x, y: (B, N, D) and (B, M, D).
        g: (B, M).
        p: exponent of the cost.
        chunk_size: rows at a time; None computes the whole cost matrix.

    Returns:
        (B, N).

    >>> c_transform(torch.zeros(1, 1, 1), torch.tensor([[[1.0], [3.0]]]), torch.tensor([[0.0, 2.5]]))
    tensor([[0.5000]])
    """
    parts = [
        (cost_matrix(x[:, rows], y, p) - g.unsqueeze(1)).amin(2)
        for rows in row_blocks(x.shape[1], chunk_size)
    ]
    return torch.cat(parts, 1)


def guarded(f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Lower ``f`` by what rounding can have added, and return the bound ``mean f + mean g`` with it.

    The two means may be far larger than their sum: then the last digits of ``f`` and ``g`` are all that
    the sum has, and without this the bound could lie above the distance.

    >>> guarded(torch.tensor([[2.0]]), torch.tensor([[-2.0]]))[0].item() < 0
    True
    """
    size = f.abs().amax(1, keepdim=True) + g.abs().amax(1, keepdim=True)
    f = f - 4 * torch.finfo(f.dtype).eps * size
    return f.mean(1) + g.mean(1), f


def lower_bound(
    x: Tensor,
    y: Tensor,
    g: Tensor,
    p: int = 1,
    chunk_size: int | None = None,
    *,
    sweep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the dual bound ``LB = mean f + mean g <= EMD`` of any potential ``g``, and ``f, g``.

    Feasible by construction: ``f`` is the c-transform of ``g``; ``sweep`` replaces ``g`` by the
    c-transform of ``f`` once more, which can only raise the bound. Uniform weights on both sides.

    >>> x, y = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[1.0], [3.0]]])
    >>> lower_bound(x, y, torch.zeros(1, 2))[0].item() <= 1.5
    True
    """
    f = c_transform(x, y, g, p, chunk_size)
    if sweep:
        g = c_transform(y, x, f, p, chunk_size)
    bound, f = guarded(f, g)
    return bound, f, g


def potentials_from_matching(
    cost: Tensor, index: Tensor, sweeps: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the dual bound and potentials that a matching implies.

    At the optimum ``f_i + g_{φ(i)} = C_{i,φ(i)}``. So ``f_i <- C_{i,φ(i)} - g_{φ(i)}`` and
    ``g_j <- min(g_j, min_i (C_ij - f_i))`` are the shortest-path (Bellman-Ford) sweeps of the residual
    graph: exact for an optimal ``φ`` after at most N of them, usually a dozen; for a near-optimal one the
    best bound on the way is kept.

    Args:
        cost: (B, N, N).
        index: (B, N); it need not be a bijection.
        sweeps: at most this many; it stops when nothing changes.

    Returns:
        The bound (B,) and potentials (B, N) each, feasible: ``f_i + g_j <= C_ij``.

    >>> cost = torch.tensor([[[1.0, 3.0], [0.0, 2.0]]])
    >>> potentials_from_matching(cost, torch.tensor([[0, 1]]))[0]
    tensor([1.5000])
    """
    matched = cost.gather(2, index.unsqueeze(2)).squeeze(2)
    g = cost.amin(1)
    best_f = (cost - g.unsqueeze(1)).amin(2)
    best_g = g
    best = best_f.mean(1) + best_g.mean(1)
    for _ in range(sweeps):
        f = matched - g.gather(1, index)
        new = torch.minimum(g, (cost - f.unsqueeze(2)).amin(1))
        f = (cost - new.unsqueeze(1)).amin(2)
        bound = f.mean(1) + new.mean(1)
        better = bound > best
        best = torch.where(better, bound, best)
        best_f = torch.where(better.unsqueeze(1), f, best_f)
        best_g = torch.where(better.unsqueeze(1), new, best_g)
        if torch.equal(new, g):
            break
        g = new
    return best, best_f, best_g
