"""Exact labels: the optimal matching of each pair, by SciPy, in worker processes where asked."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor


def exact_matching(x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[np.int64], float]:
    """Return the optimal matching of one pair of equal size and its mean distance.

    Costs are computed in float64 whatever the dtype of the clouds.
    """
    cost = cdist(x, y)
    rows, columns = linear_sum_assignment(cost)
    return columns.astype(np.int64), float(cost[rows, columns].mean())


def _matching(pair: tuple[NDArray[Any], NDArray[Any]]) -> tuple[NDArray[np.int64], float]:
    return exact_matching(*pair)


def label(x: Tensor, y: Tensor, workers: int | None = None) -> tuple[Tensor, Tensor]:
    """Label a batch of pairs of equal size exactly.

    Args:
        x, y: (B, N, D).
        workers: processes to share the batch; None or 0 labels here. The order of the result does not
            depend on it.

    Returns:
        ``index`` (B, N) int64, with ``x[b, i]`` matched to ``y[b, index[b, i]]``, and ``distance`` (B,)
        float64.

    Raises:
        ValueError: the shapes differ.

    >>> label(torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[3.0], [1.0]]]))
    (tensor([[1, 0]]), tensor([1.5000], dtype=torch.float64))
    """
    if x.shape != y.shape or x.ndim != 3:
        raise ValueError(f"x and y must both be (B, N, D), got {tuple(x.shape)}, {tuple(y.shape)}")
    pairs = list(zip(x.detach().cpu().numpy(), y.detach().cpu().numpy(), strict=True))
    if workers:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            found = list(pool.map(_matching, pairs, chunksize=max(1, len(pairs) // (4 * workers))))
    else:
        found = [_matching(pair) for pair in pairs]
    index = np.stack([i for i, _ in found]) if found else np.empty((0, x.shape[1]), np.int64)
    distance = np.array([d for _, d in found], dtype=np.float64)
    return torch.from_numpy(index).to(x.device), torch.from_numpy(distance).to(x.device)
