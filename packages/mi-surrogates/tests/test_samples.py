"""KSG, entropies and Gaussian closed forms against definitions and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import digamma
from sklearn.feature_selection import mutual_info_regression

from mi_surrogates.errors import DegenerateData
from mi_surrogates.information.gaussian import (
    cca_mi,
    gaussian_mi,
    gaussian_mi_from_cov,
    gaussian_terms,
)
from mi_surrogates.information.knn import _tree_counts, entropy_knn, ksg, ksg_terms


def pair(n: int, dim: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, n, dim, generator=generator, dtype=torch.float64)
    return x, x.cumsum(1) + 0.5 * noise


def definition(x: np.ndarray, y: np.ndarray, k: int) -> float:
    """KSG-1 point by point."""
    x, y = ((v - v.mean(0)) / v.std(0) for v in (x, y))
    n = len(x)
    total = 0.0
    for i in range(n):
        dx, dy = np.abs(x - x[i]).max(1), np.abs(y - y[i]).max(1)
        joint = np.delete(np.maximum(dx, dy), i)
        radius = np.sort(joint)[k - 1]
        nx, ny = (np.delete(dx, i) < radius).sum(), (np.delete(dy, i) < radius).sum()
        total += digamma(nx + 1) + digamma(ny + 1)
    return float(digamma(k) + digamma(n) - total / n)


@pytest.mark.parametrize("backend", ["tree", "brute"])
@pytest.mark.parametrize(("dim", "k"), [(1, 1), (1, 3), (2, 5), (4, 3)])
def test_ksg_is_its_quadratic_definition(backend: str, dim: int, k: int) -> None:
    x, y = pair(300, dim)
    expected = definition(x.numpy(), y.numpy(), k)
    assert ksg(x, y, k, backend=backend).item() == pytest.approx(expected, abs=1e-12)


def test_tiles_do_not_change_the_brute_force_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = pair(200)
    whole = ksg_terms(x, y, backend="brute")
    monkeypatch.setattr("mi_surrogates.information.knn.TILE", 1000)
    assert torch.equal(ksg_terms(x, y, backend="brute"), whole)


def test_ksg_equals_scikit_learn_in_one_dimension() -> None:
    x, y = pair(1000)
    theirs = mutual_info_regression(x.numpy(), y[:, 0].numpy(), n_neighbors=3, random_state=0)[0]
    assert ksg(x, y).item() == pytest.approx(theirs, abs=1e-4)  # it jitters the data by 1e-10


def test_ksg_is_symmetric_and_does_not_see_order_or_scale() -> None:
    x, y = pair(400, 2)
    value = ksg(x, y).item()
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    assert ksg(y, x).item() == pytest.approx(value, abs=1e-12)
    assert ksg(x[order], y[order]).item() == pytest.approx(value, abs=1e-12)
    assert ksg(3 - 100 * x, y).item() == pytest.approx(value, abs=1e-12)


def test_batched_ksg_is_each_ksg() -> None:
    pairs = [pair(100, 2, seed) for seed in range(3)]
    x, y = (torch.stack([p[i] for p in pairs]) for i in (0, 1))
    for backend in ("tree", "brute"):
        batched = ksg(x, y, backend=backend)
        singles = [ksg(*p, backend=backend).item() for p in pairs]
        assert batched.tolist() == pytest.approx(singles, abs=1e-14)


def test_ksg_recovers_the_information_of_a_gaussian() -> None:
    x, noise = torch.randn(2, 8000, 1, generator=torch.Generator().manual_seed(3)).double()
    y = 0.9 * x + math.sqrt(0.19) * noise
    terms = ksg_terms(x, y)
    stderr = terms.std().item() / math.sqrt(8000)
    assert abs(terms.mean().item() - 0.830366) < 3 * stderr


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, y: ksg(x, y, 0), ValueError, "k must be"),
        (lambda x, y: ksg(x.clone().fill_(torch.nan), y), ValueError, "x has NaN"),
        (lambda x, y: ksg(x, y / 0, backend="tree"), ValueError, "y has NaN or infinite"),
        (lambda x, y: ksg(x, y / 0, backend="brute"), ValueError, "y has NaN or infinite"),
        (lambda x, y: ksg(x, y, 50), ValueError, "below the 50 samples"),
        (lambda x, y: ksg(x[:10], y), ValueError, "x and y must be"),
        (lambda x, y: ksg(x, y, backend="gpu"), ValueError, "backend"),
        (lambda x, y: ksg(x, y.round()), DegenerateData, "y has .* ties"),
        (lambda x, y: entropy_knn(x, 50), ValueError, "k must be"),
        (lambda x, y: entropy_knn(torch.zeros(9, 1)), DegenerateData, "x_entropy"),
    ],
)
def test_bad_samples_are_named(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call(*pair(50))


def test_entropy_of_a_uniform_square() -> None:
    x = 3 * torch.rand(6000, 2, generator=torch.Generator().manual_seed(0))
    # the boundary of a square biases the estimate upwards by about 2 % here
    assert entropy_knn(x).item() == pytest.approx(math.log(9), abs=0.06)


@pytest.mark.parametrize("rho", [0.0, 0.75, 0.9, 0.99, 0.999])
def test_gaussian_closed_form(rho: float) -> None:
    cov = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)
    known = {0.0: 0.0, 0.75: 0.413339, 0.9: 0.830366, 0.99: 1.958518, 0.999: 3.107554}[rho]
    assert gaussian_mi_from_cov(cov, 1).item() == pytest.approx(known, abs=1e-6)


def test_gaussian_is_log_determinants_is_canonical_correlations() -> None:
    x, y = pair(500, 3)
    cov = np.cov(torch.cat([x, y], 1).numpy().T)
    logdet = [np.linalg.slogdet(c)[1] for c in (cov[:3, :3], cov[3:, 3:], cov)]
    expected = (logdet[0] + logdet[1] - logdet[2]) / 2
    for value in (gaussian_mi(x, y), cca_mi(x, y), gaussian_terms(x, y).mean()):
        assert value.item() == pytest.approx(expected, abs=1e-10)


def test_gaussian_information_has_a_gradient() -> None:
    x, y = pair(20, 2)
    assert torch.autograd.gradcheck(gaussian_mi, (x.requires_grad_(), y.requires_grad_()))


def test_degenerate_columns_are_named() -> None:
    x, y = pair(50, 2)
    with pytest.raises(DegenerateData, match="column 1 of"):
        gaussian_mi(torch.stack([x[:, 0], torch.ones(50).double()], 1), y)
    with pytest.raises(DegenerateData, match="singular"):
        gaussian_mi(torch.cat([x, x], 1), y)


@pytest.mark.parametrize("dim", [1, 2])
def test_tree_counts_are_those_of_the_definition_where_distances_are_equal_but_for_rounding(
    dim: int,
) -> None:
    """On a line two binary searches count: their ends must agree with |difference| < radius."""
    rng = np.random.default_rng(0)
    for trial in range(40):
        step = (0.01, 1 / 64)[trial % 2]
        x, y = (np.round(rng.standard_normal((120, d)) / step) * step for d in (1, dim))
        x, y = (v + rng.integers(0, 3, v.shape) * 2.0**-52 for v in (x, y))
        counts = _tree_counts(x, y, 3, 1)
        dx, dy = (np.abs(v[:, None] - v[None]).max(-1) for v in (x, y))
        radius = np.sort(np.maximum(dx, dy), 1)[:, 3]
        apart = radius > 0
        expected = np.stack([(d < radius[:, None]).sum(1) - 1 for d in (dx, dy)], 1)
        assert (counts[apart] == expected[apart]).all()
        assert apart.sum() > 100
