from __future__ import annotations

import itertools

import numpy as np
import ot
import pytest
import torch
from conftest import lap, pair
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.stats import wasserstein_distance
from torch import Tensor

import deepemd
from deepemd import solvers

EXACT = {"method": "exact"}


def brute_force(x: Tensor, y: Tensor) -> float:
    """The definition: the least mean distance over all permutations."""
    n = len(x)
    return min(
        float((x - y[list(order)]).norm(dim=1).mean()) for order in itertools.permutations(range(n))
    )


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_exact_equals_brute_force_over_permutations(n: int) -> None:
    x, y = pair(1, n)
    assert float(deepemd.emd(x[0], y[0])) == pytest.approx(brute_force(x[0], y[0]), rel=1e-12)


def test_two_points_on_a_line_by_hand() -> None:
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [3.0]])
    assert float(deepemd.emd(x, y, method="exact", backend="scipy")) == 1.5


@pytest.mark.parametrize("backend", ["scipy", "lapx", "pot"])
@pytest.mark.parametrize("p", [1, 2])
def test_every_backend_equals_scipy(backend: str, p: int) -> None:
    x, y = pair(4, 40)
    out = solvers.exact(x, y, backend=backend, p=p)
    np.testing.assert_allclose(out.distance.numpy(), lap(x, y, p), rtol=1e-12)
    assert bool(out.bijective.all())


def test_exact_equals_pot_emd2() -> None:
    x, y = pair(3, 30)
    for k in range(3):
        expected = ot.emd2([], [], ot.dist(x[k].numpy(), y[k].numpy(), metric="euclidean"))
        assert float(deepemd.emd(x[k], y[k])) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("p", [1, 2])
def test_translation_moves_every_point_by_its_length(p: int) -> None:
    x, _ = pair(2, 20)
    t = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    expected = float(t.norm()) ** p
    assert deepemd.emd(x, x + t, p=p).tolist() == pytest.approx([expected] * 2, rel=1e-12)
    assert deepemd.emd(x, x + t, p=2, root=True).tolist() == pytest.approx([float(t.norm())] * 2)


def test_scaling_permutation_symmetry_and_triangle_inequality() -> None:
    x, y = pair(2, 25)
    z, _ = pair(2, 25, seed=9)
    d = deepemd.emd(x, y)
    torch.testing.assert_close(deepemd.emd(-3 * x + 1, -3 * y + 1), 3 * d, rtol=1e-12, atol=0)
    order = torch.randperm(25)
    torch.testing.assert_close(deepemd.emd(x[:, order], y), d, rtol=1e-12, atol=0)
    torch.testing.assert_close(deepemd.emd(x, y[:, order]), d, rtol=1e-12, atol=0)
    torch.testing.assert_close(deepemd.emd(y, x), d, rtol=1e-12, atol=0)
    assert bool((d <= deepemd.emd(x, z) + deepemd.emd(z, y) + 1e-12).all())


def test_index_and_inverse_are_each_other_s_inverse() -> None:
    x, y = pair(3, 15)
    out = deepemd.match(x, y)
    assert out.index is not None
    assert out.inverse is not None
    every = torch.arange(15).expand(3, 15)
    assert out.inverse.gather(1, out.index).equal(every)


def test_points_on_a_line_are_sorted_and_equal_scipy_s_wasserstein_distance() -> None:
    x, y = pair(3, 50, dim=1)
    out = deepemd.match(x, y)
    assert out.method == "exact"
    for k in range(3):
        expected = wasserstein_distance(x[k, :, 0].numpy(), y[k, :, 0].numpy())
        assert float(out.distance[k]) == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(out.distance.numpy(), lap(x, y), rtol=1e-12)
    ordered = deepemd.match(x, y, with_potentials=True)
    assert ordered.potentials is not None
    total = ordered.potentials[0].mean(1) + ordered.potentials[1].mean(1)
    torch.testing.assert_close(total, out.distance, rtol=1e-12, atol=0)


def test_a_cloud_and_itself_have_distance_exactly_zero() -> None:
    x, _ = pair(2, 20)
    for method in ("exact", "auction", "deepemd"):
        assert deepemd.emd(x, x, method=method).tolist() == [0.0, 0.0]
        assert deepemd.emd(x, x.clone(), method=method).tolist() == [0.0, 0.0]


def transport_by_linear_program(x: Tensor, y: Tensor) -> float:
    """Least mean cost of a plan with uniform marginals, all n*m entries of it as variables."""
    n, m = len(x), len(y)
    cost = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist").numpy()
    rows, columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
    weights = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    return float(linprog(cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=weights).fun)


@pytest.mark.parametrize(("n", "m"), [(5, 8), (8, 5), (1, 6)])
@pytest.mark.parametrize("backend", ["pot", "scipy"])
def test_different_sizes_are_exact_transport(n: int, m: int, backend: str) -> None:
    x, y = pair(2, n, m=m)
    out = deepemd.match(x, y, return_plan=True, method="exact", backend=backend)
    assert out.plan is not None
    for k in range(2):
        expected = transport_by_linear_program(x[k], y[k])
        assert float(out.distance[k]) == pytest.approx(expected, rel=1e-8)
    torch.testing.assert_close(out.plan.sum(2), torch.full((2, n), 1 / n, dtype=x.dtype))
    torch.testing.assert_close(out.plan.sum(1), torch.full((2, m), 1 / m, dtype=x.dtype))
    assert out.potentials is not None
    f, g = out.potentials
    dual = f.mean(1) + g.mean(1)
    torch.testing.assert_close(dual, out.distance, rtol=1e-8, atol=1e-10)
    assert out.index is None
    assert not bool(out.bijective.any())


def test_weighted_transport_equals_pot(rng: np.random.Generator) -> None:
    x, y = pair(1, 9, m=7)
    a, b = rng.dirichlet(np.ones(9)), rng.dirichlet(np.ones(7))
    cost = ot.dist(x[0].numpy(), y[0].numpy(), metric="euclidean")
    expected = float(ot.emd2(a, b, cost))
    ta, tb = torch.from_numpy(a), torch.from_numpy(b)
    for backend in ("pot", "scipy"):
        found = deepemd.emd(x[0], y[0], a=ta, b=tb, backend=backend)
        assert float(found) == pytest.approx(expected, rel=1e-9)


def test_zero_weights_are_absent_points() -> None:
    x, y = pair(1, 6)
    a = torch.tensor([[0.25, 0.25, 0.25, 0.25, 0.0, 0.0]], dtype=torch.float64)
    expected = deepemd.emd(x[:, :4], y[:, :4])
    found = deepemd.emd(x, y, a=a, b=a)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("n", "m"), [(4, 9), (9, 4)])
@pytest.mark.parametrize("method", ["exact", "auction"])
def test_partial_matching_equals_the_rectangular_assignment(n: int, m: int, method: str) -> None:
    x, y = pair(3, n, m=m)
    options = {"eps": 1e-9} if method == "auction" else {}
    out = deepemd.match(x, y, method=method, unequal="partial", **options)
    np.testing.assert_allclose(out.distance.numpy(), lap(x, y), rtol=1e-7)
    assert out.index is not None
    assert out.inverse is not None
    assert int((out.index >= 0).sum()) == int((out.inverse >= 0).sum()) == 3 * 4
    assert bool(out.bijective.all())
    assert out.lower is not None
    assert bool((out.lower <= out.distance + 1e-9).all())
    torch.testing.assert_close(out.lower, out.distance, rtol=1e-6, atol=0)


def test_a_cost_matrix_of_any_sign_can_be_given() -> None:
    cost = torch.randn(2, 6, 6)
    out = solvers.exact(cost)
    for k in range(2):
        best = min(
            float(cost[k][range(6), list(order)].mean())
            for order in itertools.permutations(range(6))
        )
        assert float(out.distance[k]) == pytest.approx(best, rel=1e-6)
    assert solvers.exact(cost[0]).distance.shape == ()
    assert int((solvers.exact(cost[:, :4]).inverse == -1).sum()) == 4
    with pytest.raises(ValueError, match="finite"):
        solvers.exact(cost * torch.inf)
    with pytest.raises(ValueError, match="not empty"):
        solvers.exact(torch.zeros(3))
    with pytest.raises(TypeError, match="takes no options"):
        solvers.exact(cost, p=2)


@pytest.mark.parametrize("quality", ["exact", "noisy"])
def test_reduced_costs_leave_the_optimum_where_it_is(quality: str) -> None:
    from deepemd.solvers._exact import solve_exact

    x, y = pair(3, 40)
    plain = solve_exact(x, y, with_potentials=True)
    assert plain.f is not None
    assert plain.g is not None
    f, g = plain.f, plain.g
    if quality == "noisy":
        f, g = f + 0.1 * torch.randn_like(f), g + 0.1 * torch.randn_like(g)
    warm = solve_exact(x, y, potentials=(f, g))
    assert plain.index is not None
    assert warm.index is not None
    assert warm.index.equal(plain.index)


def test_warm_start_from_the_network_is_exact(tiny: deepemd.DeepEMD) -> None:
    x, y = pair(2, 48)
    warm = deepemd.emd(x, y, method="exact", warm_start=tiny)
    np.testing.assert_allclose(warm.numpy(), lap(x, y), rtol=1e-12)
    assert deepemd.emd(x, y, method="exact", warm_start="tiny").equal(warm)


def test_worker_processes_give_the_same_matchings_in_order() -> None:
    x, y = pair(6, 30)
    here = deepemd.match(x, y, method="exact")
    there = deepemd.match(x, y, method="exact", workers=1)
    assert there.index is not None
    assert there.index.equal(here.index)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 16), dim=st.integers(1, 5))
def test_bounds_enclose_the_exact_distance(seed: int, n: int, dim: int) -> None:
    x, y = pair(2, n, dim, seed=seed, dtype=torch.float32)
    exact = torch.from_numpy(lap(x, y))
    for method, options in (("auction", {}), ("sinkhorn", {"n_iter": 60}), ("exact", {})):
        out = deepemd.match(x, y, method=method, **options)
        assert out.lower is not None
        assert out.upper is not None
        assert bool((out.lower.double() <= exact + 1e-5 * exact.clamp_min(1)).all()), method
        assert bool((out.upper.double() >= exact - 1e-5 * exact.clamp_min(1)).all()), method
    half = deepemd.emd(x, y, method="chamfer", mean_of_two=True)
    assert bool((half.double() <= exact + 1e-5).all())


def test_transport_without_pot_is_refused_where_scipy_would_take_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from deepemd.solvers import _exact

    monkeypatch.setattr(_exact, "installed", lambda module: False)
    x, y = pair(1, 5, m=6)
    small = deepemd.emd(x, y, method="exact")
    assert float(small) == pytest.approx(transport_by_linear_program(x[0], y[0]))
    x, y = pair(1, 250, m=200)
    with pytest.raises(ImportError, match=r"deepemd\[pot\]"):
        deepemd.emd(x, y, method="exact")
    with pytest.raises(ImportError, match=r"deepemd\[exact\]"):
        deepemd.emd(x, x + 1, method="exact", backend="lapx")
