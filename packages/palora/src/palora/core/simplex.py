"""The probability simplex: lattices of preferences and their sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

__all__ = ["evaluation_grid", "grid_size", "simplex_grid", "smallest_resolution"]

MAX_POINTS = 1_000_000


def grid_size(tasks: int, resolution: int) -> int:
    """Return C(H+T−1, T−1), the number of points of the Das–Dennis lattice.

    Example:
        >>> grid_size(3, 10)
        66
    """
    return math.comb(resolution + tasks - 1, tasks - 1)


def smallest_resolution(tasks: int, num: int) -> int:
    """Return the smallest H ≥ 1 whose lattice has at least ``num`` points."""
    resolution = 1
    while grid_size(tasks, resolution) < num:
        resolution += 1
    return resolution


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write ``total`` as ``parts`` counts, the last count ascending slowest."""
    if parts == 1:
        yield (total,)
        return
    for last in range(total + 1):
        for head in _compositions(total - last, parts - 1):
            yield (*head, last)


def simplex_grid(tasks: int, resolution: int) -> Tensor:
    """Return the Das–Dennis lattice: every λ whose entries are multiples of 1/H.

    Args:
        tasks: T ≥ 2.
        resolution: H ≥ 1.

    Returns:
        ``(C(H+T−1, T−1), T)`` float32, the last component ascending slowest.

    Raises:
        ValueError: T < 2, H < 1, or more than a million points.

    Example:
        >>> simplex_grid(3, 2)[:3]
        tensor([[1.0000, 0.0000, 0.0000],
                [0.5000, 0.5000, 0.0000],
                [0.0000, 1.0000, 0.0000]])
    """
    if tasks < 2:
        raise ValueError(f"tasks must be at least 2, got {tasks}")
    if resolution < 1:
        raise ValueError(f"resolution must be at least 1, got {resolution}")
    if (size := grid_size(tasks, resolution)) > MAX_POINTS:
        raise ValueError(
            f"a lattice of resolution {resolution} for {tasks} tasks has {size} points, more than "
            f"{MAX_POINTS}; lower the resolution or draw preferences from a Dirichlet"
        )
    points = torch.tensor(list(_compositions(resolution, tasks)), dtype=torch.float64)
    return (points / resolution).float()


def evaluation_grid(tasks: int, resolution: int = 10, *, sample: int = 20, seed: int = 0) -> Tensor:
    """Return the preferences at which a trained model is evaluated in the paper.

    Two or three tasks: the lattice of ``resolution``, 11 or 66 points. More, where such a lattice
    is too large: the T vertices, the centre, and a uniform sample of the simplex.

    Args:
        tasks: T ≥ 2.
        resolution: H, for two or three tasks.
        sample: further points for more than three tasks.
        seed: of that sample.

    Raises:
        ValueError: T < 2 or H < 1.

    Example:
        >>> [len(evaluation_grid(tasks)) for tasks in (2, 3, 7)]
        [11, 66, 28]
    """
    if tasks <= 3:
        return simplex_grid(tasks, resolution)
    centre = torch.full((1, tasks), 1 / tasks)
    drawn = np.random.default_rng(seed).dirichlet([1.0] * tasks, sample)
    return torch.cat([torch.eye(tasks), centre, torch.from_numpy(drawn).float()])
