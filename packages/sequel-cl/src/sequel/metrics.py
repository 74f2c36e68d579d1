"""Metrics of the accuracy matrix R: R[i, j] is the accuracy on task j after training on task i.

All functions take NumPy, PyTorch or JAX arrays of shape (T, T) and return floats; entries above the diagonal
are used by :func:`fwt` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequel.rng import stream

__all__ = [
    "acc",
    "average_incremental_accuracy",
    "bwt",
    "confidence",
    "forgetting",
    "forgetting_sequel",
    "fwt",
    "intransigence",
    "learning_accuracy",
    "min_acc",
    "worst_case_acc",
]


def _matrix(R: Any) -> NDArray[np.float64]:
    out = np.asarray(R.detach().cpu() if hasattr(R, "detach") else R, dtype=np.float64)
    if out.ndim != 2 or out.shape[0] != out.shape[1] or not len(out):
        raise ValueError(f"R must be a square matrix of at least one task, got shape {out.shape}")
    return out


def acc(R: Any) -> float:
    """Return ACC, the mean accuracy over all tasks after the last: mean_j R[T-1, j].

    >>> round(acc([[0.9, 0.1], [0.6, 0.8]]), 12)
    0.7
    """
    return float(_matrix(R)[-1].mean())


def bwt(R: Any) -> float:
    """Return backward transfer, mean_{j<T-1} (R[T-1, j] - R[j, j]); 0 for one task.

    >>> round(bwt([[0.9, 0.1], [0.6, 0.8]]), 12)
    -0.3
    """
    R = _matrix(R)
    return float((R[-1] - np.diag(R))[:-1].mean()) if len(R) > 1 else 0.0


def fwt(R: Any, before: Any) -> float:
    """Return forward transfer, mean_{j>=1} (R[j-1, j] - before[j]), ``before`` the untrained row.

    >>> fwt([[0.9, 0.1], [0.6, 0.8]], [0.1, 0.1])
    0.0
    """
    R = _matrix(R)
    start = np.asarray(before, dtype=np.float64)
    if start.shape != (len(R),):
        raise ValueError(f"before must hold {len(R)} accuracies, got shape {start.shape}")
    return float((np.diag(R, 1) - start[1:]).mean()) if len(R) > 1 else 0.0


def forgetting(R: Any) -> float:
    """Return forgetting (Chaudhry 2018), mean_{j<T-1} (max_{j<=l<T-1} R[l, j] - R[T-1, j]).

    >>> round(forgetting([[0.9, 0.1], [0.6, 0.8]]), 12)
    0.3
    """
    R = _matrix(R)
    n = len(R)
    if n < 2:
        return 0.0
    return float(np.mean([R[j : n - 1, j].max() - R[-1, j] for j in range(n - 1)]))


def forgetting_sequel(R: Any) -> float:
    """Return what the paper's library logs: current minus best so far (<= 0), over all tasks seen.

    >>> round(forgetting_sequel([[0.9, 0.1], [0.6, 0.8]]), 12)
    -0.15
    """
    R = _matrix(R)
    return float(np.mean([R[-1, j] - R[j:, j].max() for j in range(len(R))]))


def learning_accuracy(R: Any) -> float:
    """Return the mean accuracy right after learning, mean_j R[j, j].

    >>> round(learning_accuracy([[0.9, 0.1], [0.6, 0.8]]), 12)
    0.85
    """
    return float(np.diag(_matrix(R)).mean())


def average_incremental_accuracy(R: Any) -> float:
    """Return mean_i mean_{j<=i} R[i, j].

    >>> round(average_incremental_accuracy([[0.9, 0.1], [0.6, 0.8]]), 12)
    0.8
    """
    R = _matrix(R)
    return float(np.mean([R[i, : i + 1].mean() for i in range(len(R))]))


def intransigence(R: Any, best: Any) -> float:
    """Return mean_j (best[j] - R[j, j]), ``best`` the accuracy of a jointly trained model.

    >>> round(intransigence([[0.9, 0.1], [0.6, 0.8]], [1.0, 1.0]), 12)
    0.15
    """
    return float((np.asarray(best, dtype=np.float64) - np.diag(_matrix(R))).mean())


def min_acc(rows: Any, tasks: Sequence[int]) -> float:
    """Return min-ACC (De Lange et al. 2023): the mean over old tasks of their lowest accuracy since learnt.

    ``rows`` (n, T) are evaluations in time, ``tasks`` (n,) the task in training at each. The last task is
    not old; 1.0 where there is no old task.

    >>> min_acc([[0.9, 0.1], [0.4, 0.5], [0.6, 0.8]], [0, 1, 1])
    0.4
    """
    rows = np.asarray(rows, dtype=np.float64)
    when = np.asarray(tasks)
    lows = [rows[when > j, j].min() for j in range(int(when.max()))]
    return float(np.mean(lows)) if lows else 1.0


def worst_case_acc(rows: Any, tasks: Sequence[int]) -> float:
    """Return WC-ACC: A/k + (1 - 1/k) min-ACC, A the current task's accuracy, k the tasks seen.

    >>> round(worst_case_acc([[0.9, 0.1], [0.4, 0.5], [0.6, 0.8]], [0, 1, 1]), 12)
    0.6
    """
    k = int(np.max(tasks)) + 1
    now = float(np.asarray(rows, dtype=np.float64)[-1, k - 1])
    return now / k + (1 - 1 / k) * min_acc(rows, tasks)


def confidence(values: Any, *, level: float = 0.95, seed: int = 0) -> dict[str, float]:
    """Return mean, standard deviation (n - 1) and a bootstrap interval of the mean over seeds.

    >>> confidence([1.0, 1.0, 1.0])["high"]
    1.0
    """
    x = np.asarray(values, dtype=np.float64)
    if not len(x):
        raise ValueError("values must hold at least one number")
    draws = stream(seed, "bootstrap").integers(len(x), size=(2000, len(x)))
    low, high = np.quantile(x[draws].mean(1), [(1 - level) / 2, (1 + level) / 2])
    std = float(x.std(ddof=1)) if len(x) > 1 else 0.0
    return {"mean": float(x.mean()), "std": std, "low": float(low), "high": float(high)}
