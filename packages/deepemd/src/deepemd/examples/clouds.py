"""Real clouds without a download: scikit-learn's digits in the plane, its photographs in colour space."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deepemd.solvers._exact import require


def digit_clouds(
    n_points: int = 64, count: int | None = None, *, seed: int = 0, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """Sample scikit-learn's 8x8 digits as point clouds in the square [-1, 1]².

    Pixel coordinates are drawn in proportion to intensity, with a uniform shift inside the pixel.

    Args:
        n_points: N.
        count: how many digits, from a seeded permutation of the 1,797 (all by default).
        seed: of the permutation and the points.
        offset: digits of the permutation to skip, so that train and test do not share one.

    Returns:
        Clouds (count, N, 2) float32 and labels (count,).

    >>> digit_clouds(16, 3)[0].shape
    torch.Size([3, 16, 2])
    """
    require("sklearn", "examples")
    from sklearn.datasets import load_digits

    data = load_digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data.images))[offset:][:count]
    draws = np.random.default_rng((seed, offset, n_points))
    clouds = np.empty((len(order), n_points, 2), dtype=np.float32)
    for k, image in enumerate(data.images[order]):
        weight = image.ravel() / image.sum()
        pixel = draws.choice(64, n_points, p=weight)
        place = np.stack([pixel % 8, 7 - pixel // 8], 1) + draws.random((n_points, 2))
        clouds[k] = place / 4 - 1
    return torch.from_numpy(clouds), torch.from_numpy(data.target[order].astype(np.int64))


def photo_colours(name: str = "china.jpg", n_points: int = 1024, *, seed: int = 0) -> Tensor:
    """Return colours (N, 3) in [0, 1] of random pixels of scikit-learn's ``china.jpg`` or ``flower.jpg``."""
    require("sklearn", "examples")
    require("PIL", "examples")
    from sklearn.datasets import load_sample_image

    image = load_sample_image(name)
    rng = np.random.default_rng(seed)
    pixels = image.reshape(-1, 3)[rng.integers(image.shape[0] * image.shape[1], size=n_points)]
    return torch.from_numpy(pixels.astype(np.float32) / 255)
