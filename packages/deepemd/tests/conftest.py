from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)

with warnings.catch_warnings():  # of third-party sources, once, when Python compiles them
    warnings.simplefilter("ignore")
    import geomloss  # noqa: F401
    import ot  # noqa: F401
    import trimesh  # noqa: F401


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def pair(
    batch: int = 3, n: int = 12, dim: int = 3, m: int | None = None, seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Two random clouds of different shape."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, dim, generator=generator, dtype=torch.float64)
    y = 0.6 * torch.randn(batch, m or n, dim, generator=generator, dtype=torch.float64) + 0.5
    return x.to(dtype), y.to(dtype)


def lap(x: Tensor, y: Tensor, p: int = 1) -> np.ndarray:
    """The oracle: SciPy's assignment on SciPy's distances, in float64, pair by pair."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    values = []
    for a, b in zip(x.detach().double().numpy(), y.detach().double().numpy(), strict=True):
        cost = cdist(a, b) ** p
        rows, columns = linear_sum_assignment(cost)
        values.append(cost[rows, columns].mean())
    return np.array(values)


@pytest.fixture(scope="session")
def tiny() -> torch.nn.Module:
    import deepemd

    return deepemd.DeepEMD.from_pretrained("tiny")
