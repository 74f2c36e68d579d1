"""Metrics against closed forms and SciPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from lookahead_minmax.metrics import (
    Coverage,
    feature_distance,
    frechet_distance,
    inception_score,
    mode_coverage,
)


def covariance(size: int, seed: int) -> torch.Tensor:
    root = torch.randn(
        size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return root @ root.T


def test_frechet_distance_is_scipys_formula() -> None:
    for seed in range(5):
        c1, c2 = covariance(6, seed), covariance(6, seed + 100)
        m1, m2 = torch.randn(
            2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        root = sqrtm((c1 @ c2).numpy())
        expected = ((m1 - m2) ** 2).sum() + c1.trace() + c2.trace() - 2 * np.trace(root).real
        assert frechet_distance(m1, c1, m2, c2) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_of_diagonal_gaussians_by_hand() -> None:
    d1, d2 = torch.tensor([1.0, 4.0]), torch.tensor([9.0, 1.0])
    result = frechet_distance(torch.zeros(2), d1.diag(), torch.tensor([3.0, 0.0]), d2.diag())
    assert result == pytest.approx(9 + (1 - 3) ** 2 + (2 - 1) ** 2)


def test_identical_and_singular_covariances() -> None:
    c = covariance(5, 0)
    assert frechet_distance(torch.zeros(5), c, torch.zeros(5), c) == pytest.approx(0, abs=1e-8)
    thin = torch.outer(torch.ones(5), torch.ones(5)).double()
    assert math.isfinite(frechet_distance(torch.zeros(5), thin, torch.zeros(5), c))


def test_feature_distance_uses_sample_moments() -> None:
    x, y = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = frechet_distance(
        x.mean(0),
        torch.as_tensor(np.cov(x.T.numpy())),
        y.mean(0),
        torch.as_tensor(np.cov(y.T.numpy())),
    )
    assert feature_distance(x, y) == pytest.approx(expected, rel=1e-12)


def test_inception_score_extremes() -> None:
    sharp = torch.eye(4).repeat(5, 1)
    assert inception_score(sharp, splits=1)[0] == pytest.approx(4)
    assert inception_score(torch.full((20, 4), 0.25), splits=2) == pytest.approx((1, 0), abs=1e-12)
    assert inception_score(torch.eye(4)[[0] * 20], splits=1)[0] == pytest.approx(1)


def test_mode_coverage_counts_reached_centres() -> None:
    centres = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    samples = torch.tensor([[0.05, 0.0], [0.0, 0.1], [1.0, 0.05], [5.0, 5.0]])
    result = mode_coverage(samples, centres, 0.1)
    assert (result.modes, result.quality) == (2, 0.75)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3)),
            "fit",
        ),
        (
            lambda: frechet_distance(
                torch.zeros(1), torch.full((1, 1), torch.nan), torch.zeros(1), torch.eye(1)
            ),
            "finite",
        ),
        (lambda: feature_distance(torch.zeros(1, 2), torch.zeros(5, 2)), r"n >= 2"),
        (lambda: inception_score(torch.full((5, 2), 0.5), splits=10), "n >= 10"),
        (lambda: inception_score(torch.ones(20, 2)), "sum to 1"),
        (lambda: mode_coverage(torch.zeros(2, 3), torch.zeros(2, 2), 1.0), "share d"),
        (
            lambda: mode_coverage(torch.zeros(2, 2), torch.zeros(2, 2), 0.0),
            "radius must be positive",
        ),
    ],
)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_features_of_one_dimension() -> None:
    first, second = torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([[1.0], [2.0], [3.0], [6.0]])
    gap = first.mean() - second.mean()
    expected = gap**2 + (first.std() - second.std()) ** 2
    assert feature_distance(first, second) == pytest.approx(expected.item(), rel=1e-6)


def test_a_sample_counts_for_every_centre_within_the_radius() -> None:
    samples, centres = torch.tensor([[0.1], [9.0]]), torch.tensor([[0.0], [1.0], [5.0]])
    assert mode_coverage(samples, centres, 1.0) == Coverage(2, 0.5)
    with pytest.raises(ValueError, match="there is no sample"):
        mode_coverage(samples[:0], centres, 1.0)
