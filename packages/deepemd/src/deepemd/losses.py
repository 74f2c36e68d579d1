"""Training objectives of the network: the matching (the paper's), and the ablations of 2.4 and 2.5."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DIRECTIONS = ("both", "rows")


def invert(index: Tensor, size: int) -> Tensor:
    """Return the inverse of a (partial) matching: (B, N) into {-1..M-1} gives (B, M) into {-1..N-1}.

    Where several rows name one column, the last row is kept.

    >>> invert(torch.tensor([[2, 0, -1]]), 3)
    tensor([[ 1, -1,  0]])
    """
    batch, n = index.shape
    out = index.new_full((batch, size + 1), -1)
    rows = torch.arange(n, device=index.device).expand(batch, n)
    out.scatter_(1, torch.where(index < 0, size, index), rows)
    return out[:, :size]


def _rows(logits: Tensor, index: Tensor, same: Tensor | None) -> Tensor:
    if same is None:
        return F.cross_entropy(logits.flatten(0, 1), index.flatten(), ignore_index=-1)
    logp = logits.log_softmax(-1)
    allowed = same.gather(1, index.clamp_min(0).unsqueeze(-1).expand(-1, -1, same.shape[-1]))
    loss = -torch.logsumexp(logp.masked_fill(~allowed, -torch.inf), -1)
    real = index >= 0
    return torch.where(real, loss, torch.zeros_like(loss)).sum() / real.sum().clamp_min(1)


def _coincident(points: Tensor, tolerance: float) -> Tensor:
    points = points.detach().float()
    gap = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    return gap <= tolerance


def matching_loss(
    logits: Tensor,
    index: Tensor,
    *,
    directions: str = "both",
    x: Tensor | None = None,
    y: Tensor | None = None,
    tie_tolerance: float | None = None,
) -> Tensor:
    """Cross-entropy of the attention matrix with the optimal matching (2.4).

    ``L = -(1/N) Σ_i log softmax_j(S)_{i, φ*(i)}``; with ``directions="both"`` the mean of that and the
    same over columns with the inverse permutation.

    Args:
        logits: (B, N, M) scores ``S``.
        index: (B, N) int64, the optimal matching; -1 where a row is padding or unmatched.
        directions: ``"both"`` or ``"rows"``.
        x, y: the clouds, needed with ``tie_tolerance`` (``x`` for the columns only).
        tie_tolerance: accept any label whose point lies within this distance of the labelled one
            (duplicated points make the optimum arbitrary).

    Returns:
        A scalar, the mean over all matched points.

    >>> uniform = matching_loss(torch.zeros(1, 8, 8), torch.arange(8)[None])
    >>> round(uniform.exp().item(), 4)
    8.0
    """
    if directions not in DIRECTIONS:
        raise ValueError(f"directions must be one of {', '.join(DIRECTIONS)}, got {directions!r}")
    if tie_tolerance is not None and y is None:
        raise ValueError("tie_tolerance needs the cloud y (and x for both directions)")
    same = None if tie_tolerance is None or y is None else _coincident(y, tie_tolerance)
    loss = _rows(logits, index, same)
    if directions == "rows":
        return loss
    same = None if tie_tolerance is None or x is None else _coincident(x, tie_tolerance)
    columns = _rows(logits.transpose(1, 2), invert(index, logits.shape[2]), same)
    return (loss + columns) / 2


def plan_loss(logits: Tensor, plan: Tensor) -> Tensor:
    """Cross-entropy with an exact transport plan, for clouds of different sizes (2.7).

    ``L = -Σ_ij P*_ij log softmax_j(S)_ij``, averaged over the batch; each ``P*`` sums to 1.

    >>> plan_loss(torch.zeros(1, 2, 4), torch.full((1, 2, 4), 0.125)).exp().item()
    4.0
    """
    logp = logits.log_softmax(-1)
    return -torch.where(plan > 0, plan * logp, torch.zeros_like(logp)).sum((1, 2)).mean()


def distance_loss(predicted: Tensor, distance: Tensor) -> Tensor:
    """L1 error of a regressed distance (B,): the alternative that the paper argues against."""
    return F.l1_loss(predicted, distance.to(predicted.dtype))


def dual_loss(g: Tensor, cost: Tensor) -> Tensor:
    """Minus the dual objective after a c-transform, averaged over the batch: needs no labels (2.5).

    ``-(1/N) (Σ_i min_j (C_ij - g_j) + Σ_j g_j)``; by weak duality it is at least minus the EMD.

    Args:
        g: (B, N) potentials of the second cloud.
        cost: (B, N, N) distances.
    """
    f = (cost - g.unsqueeze(1)).amin(2)
    return -(f.mean(1) + g.mean(1)).mean()
