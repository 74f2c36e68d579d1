"""The method in plain float64 NumPy on one flattened vector: what the package is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Vector = NDArray[np.float64]
StateDict = Mapping[str, torch.Tensor]


def flatten(state: StateDict) -> Vector:
    """Concatenate in the flat order: sorted names, row-major."""
    return np.concatenate([state[name].double().numpy().ravel() for name in sorted(state)])


def unflatten(vector: Vector, like: StateDict) -> dict[str, Vector]:
    parts, start = {}, 0
    for name in sorted(like):
        count = like[name].numel()
        parts[name] = vector[start : start + count].reshape(like[name].shape)
        start += count
    return parts


def task_vectors(base: StateDict, models: Sequence[StateDict]) -> Vector:
    """Return the deltas, (T, N), each rounded to float32 as the package's arithmetic does."""
    origin = flatten(base)
    rows = [(flatten(model) - origin) for model in models]
    wide = any(value.dtype == torch.float64 for value in base.values())
    array = np.stack(rows)
    return array if wide else array.astype(np.float32).astype(np.float64)


def trim(taus: Vector, keep: int) -> Vector:
    """Keep the `keep` largest magnitudes of each row, earlier entries first among equals."""
    out = np.zeros_like(taus)
    for row, tau in enumerate(taus):
        order = np.lexsort((np.arange(tau.size), -np.abs(tau)))
        out[row, order[:keep]] = tau[order[:keep]]
    return out


def ties(taus: Vector, keep: int, merge: str = "mean") -> Vector:
    trimmed = trim(taus, keep)
    sign = np.sign(trimmed.astype(np.float32).sum(axis=0, dtype=np.float32)).astype(np.float64)
    majority = np.sign(sign.sum())
    sign[sign == 0] = majority
    kept = np.where(np.where(sign > 0, trimmed > 0, trimmed < 0), trimmed, 0.0)
    if merge == "mean":
        return kept.sum(axis=0) / np.maximum(1, (kept != 0).sum(axis=0))
    if merge == "sum":
        return kept.sum(axis=0)
    return sign * np.abs(kept).max(axis=0)


def tall_masks(taus: Vector, merged: Vector, threshold: float) -> NDArray[np.bool_]:
    return np.abs(taus) > threshold * np.abs(merged - taus)


def alpha(taus: Vector, merged: Vector, norm: int = 1) -> float:
    total = np.linalg.norm(taus.sum(axis=0), norm)
    return float(total / np.linalg.norm(merged, norm) / len(taus))


def lines(base: StateDict, merged: Vector, factors: Mapping[str, float]) -> dict[str, Vector]:
    origin, update = unflatten(flatten(base), base), unflatten(merged, base)
    return {name: origin[name] + factors[name] * update[name] for name in base}
