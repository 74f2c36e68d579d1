"""Every quantity that an estimate of the EMD is judged by (spec 3.2)."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from deepemd.core.distance import gather_points


def relative_error(estimate: Tensor, exact: Tensor) -> Tensor:
    """Return ``|Ê - E| / E`` per pair; where E is 0, 0 for an exact estimate and inf otherwise."""
    error = (estimate - exact).abs()
    return torch.where(error == 0, torch.zeros_like(error), error / exact)


def distance_metrics(estimate: Tensor, exact: Tensor) -> dict[str, float]:
    """Summarise estimates (B,) against exact distances (B,).

    Returns:
        mean, median and 95th percentile of the relative error, the signed bias ``mean (Ê - E)/E``,
        Pearson r, r², Spearman rho and Kendall tau.

    >>> exact = torch.tensor([1.0, 2.0, 4.0])
    >>> found = distance_metrics(0.9 * exact, exact)
    >>> round(found["rel_err"], 3), round(found["bias"], 3), round(found["pearson"], 3)
    (0.1, -0.1, 1.0)
    """
    estimate, exact = estimate.detach().double().cpu(), exact.detach().double().cpu()
    error = relative_error(estimate, exact).numpy()
    a, b = estimate.numpy(), exact.numpy()
    r = float(np.corrcoef(a, b)[0, 1])
    return {
        "rel_err": float(error.mean()),
        "rel_err_median": float(np.median(error)),
        "rel_err_p95": float(np.quantile(error, 0.95)),
        "bias": float(((a - b) / b).mean()),
        "pearson": r,
        "r2": r * r,
        "spearman": float(stats.spearmanr(a, b).statistic),
        "kendall": float(stats.kendalltau(a, b).statistic),
    }


def accuracy(index: Tensor, exact: Tensor) -> Tensor:
    """Return the fraction of rows (per pair) that are matched as in the optimal matching."""
    return (index == exact).double().mean(1)


def tolerant_accuracy(index: Tensor, exact: Tensor, y: Tensor, tolerance: float = 1e-6) -> Tensor:
    """As :func:`accuracy`, a partner within ``tolerance`` of the right one counting as right.

    With duplicated points the optimal matching is arbitrary and plain accuracy is meaningless.
    """
    gap: Tensor = (gather_points(y, index) - gather_points(y, exact)).norm(dim=-1)
    return (gap <= tolerance).double().mean(1)


def bijectivity(index: Tensor, size: int | None = None) -> Tensor:
    """Return ``|image(φ)| / N`` per pair: 1 for a bijection.

    >>> bijectivity(torch.tensor([[0, 0, 1, 2]])).item()
    0.75
    """
    size = index.shape[1] if size is None else size
    hit = torch.zeros(len(index), size, dtype=torch.bool, device=index.device)
    hit.scatter_(1, index, torch.ones_like(index, dtype=torch.bool))
    share: Tensor = hit.sum(1).double() / index.shape[1]
    return share


def gradient_cosine(gradient: Tensor, exact: Tensor, *, rows: bool = False) -> Tensor:
    """Return the cosine of two gradients (B, N, D) per pair, over all their entries.

    Args:
        gradient, exact: with respect to the same cloud.
        rows: normalise each point's gradient first, so that all points count alike.
    """
    gradient, exact = gradient.double(), exact.double()
    if rows:
        gradient = torch.nn.functional.normalize(gradient, dim=-1)
        exact = torch.nn.functional.normalize(exact, dim=-1)
    return torch.nn.functional.cosine_similarity(gradient.flatten(1), exact.flatten(1), dim=1)


def excess(upper: Tensor, exact: Tensor) -> Tensor:
    """Return ``UB/E - 1`` per pair: how far a rounded permutation is above the optimum."""
    return upper.double() / exact.double() - 1
