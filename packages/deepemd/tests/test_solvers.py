from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from conftest import lap, pair
from torch import Tensor

import deepemd
from deepemd import solvers
from deepemd.core.bounds import c_transform, lower_bound, potentials_from_matching
from deepemd.core.distance import cost_matrix, pair_distance
from deepemd.core.output import plan_cost
from deepemd.solvers._auction import Costs, auction, solve_auction
from deepemd.solvers._exact import solve_exact
from deepemd.solvers._simple import approxmatch_plan
from deepemd.solvers._sinkhorn import round_plan, solve_sinkhorn

# --- distances -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 3, 4, 5, 20])
@pytest.mark.parametrize("p", [1, 2])
def test_cost_matrix_equals_scipy_s_cdist(dim: int, p: int) -> None:
    from scipy.spatial.distance import cdist

    x, y = pair(2, 6, dim, m=9)
    for k in range(2):
        expected = cdist(x[k].numpy(), y[k].numpy()) ** p
        np.testing.assert_allclose(cost_matrix(x, y, p)[k].numpy(), expected, rtol=1e-12)


def test_close_points_far_from_the_origin_keep_their_distance() -> None:
    x = torch.full((1, 1, 3), 1000.0)
    y = x + torch.tensor([0.0, 0.0, 0.03125])
    assert cost_matrix(x, y).item() == 0.03125
    assert float(deepemd.emd(x, y)) == 0.03125


def test_pair_distance_passes_gradcheck_twice_and_is_flat_where_points_coincide() -> None:
    x, y = pair(1, 6)
    x, y = x.requires_grad_(), y.requires_grad_()
    assert torch.autograd.gradcheck(pair_distance, (x, y))
    assert torch.autograd.gradgradcheck(pair_distance, (x, y))
    same = torch.ones(2, 3, requires_grad=True)
    pair_distance(same, same.detach().clone()).sum().backward()
    assert same.grad is not None
    assert same.grad.equal(torch.zeros(2, 3))
    assert torch.func.vmap(pair_distance)(x[0], y[0]).equal(pair_distance(x[0], y[0]))


@pytest.mark.parametrize("p", [1, 2])
def test_plan_cost_passes_gradcheck_in_clouds_and_plan(p: int) -> None:
    x, y = pair(2, 4, m=5)
    plan = torch.rand(2, 4, 5, dtype=torch.float64)
    inputs = tuple(each.requires_grad_() for each in (x, y, plan))
    assert torch.autograd.gradcheck(lambda a, b, c: plan_cost(a, b, c, p), inputs)


# --- bounds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, None])
def test_c_transform_in_blocks_equals_the_definition(size: int | None) -> None:
    x, y = pair(2, 9, m=7)
    g = torch.randn(2, 7, dtype=torch.float64)
    expected = torch.stack(
        [
            torch.stack([min((x[b, i] - y[b, j]).norm() - g[b, j] for j in range(7)) for i in range(9)])
            for b in range(2)
        ]
    )  # fmt: skip
    torch.testing.assert_close(c_transform(x, y, g, chunk_size=size), expected, rtol=0, atol=1e-12)


def test_any_potential_gives_a_lower_bound_and_another_sweep_never_lowers_it() -> None:
    x, y = pair(4, 15)
    exact = torch.from_numpy(lap(x, y))
    for scale in (0.0, 0.3, 3.0):
        g = scale * torch.randn(4, 15, dtype=torch.float64)
        plain, f, same = lower_bound(x, y, g, sweep=False)
        raised, f2, g2 = lower_bound(x, y, g)
        assert same is g
        assert bool((plain <= exact + 1e-12).all())
        assert bool((raised <= exact + 1e-12).all())
        assert bool((raised >= plain - 1e-12).all())
        for a, b in ((f, g), (f2, g2)):
            assert bool((a.unsqueeze(2) + b.unsqueeze(1) <= cost_matrix(x, y) + 1e-12).all())


def test_potentials_of_an_optimal_matching_close_the_gap() -> None:
    x, y = pair(3, 30)
    index = solve_exact(x, y).index
    assert index is not None
    bound, f, g = potentials_from_matching(cost_matrix(x, y), index, sweeps=31)
    np.testing.assert_allclose(bound.numpy(), lap(x, y), rtol=1e-12)
    assert bool((f.unsqueeze(2) + g.unsqueeze(1) <= cost_matrix(x, y) + 1e-12).all())


# --- auction ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("p", [1, 2])
def test_auction_ends_within_eps_of_the_optimum_and_says_so(eps: float, p: int) -> None:
    x, y = pair(5, 40)
    out = solvers.auction(x, y, eps, p=p)
    exact = torch.from_numpy(lap(x, y, p))
    largest = cost_matrix(x, y, p).amax((1, 2))
    assert bool((out.distance <= exact + eps * largest + 1e-12).all())
    assert bool(out.converged.all())
    assert bool(out.bijective.all())
    assert out.lower is not None
    assert bool((out.lower <= exact + 1e-12).all())
    assert bool((out.upper - out.lower <= eps * largest + 1e-12).all())
    torch.testing.assert_close(out.upper, out.distance, rtol=1e-12, atol=0)


def test_auction_recomputing_costs_equals_the_one_that_stores_them() -> None:
    x, y = pair(3, 25)
    for a, b in ((x, y), (x[:1], y[:1]), (x[:, :9], y)):
        stored, recomputed = (solve_auction(a, b, eps=1e-3, dense=d) for d in (True, False))
        assert stored.index is not None
        assert stored.index.equal(recomputed.index)
        torch.testing.assert_close(stored.lower, recomputed.lower)
    swapped = [solve_auction(y, x[:, :9], eps=1e-6, dense=d).upper for d in (True, False)]
    torch.testing.assert_close(swapped[0], swapped[1])


def test_auction_by_relative_gap_certifies_each_pair() -> None:
    x, y = pair(6, 40, dtype=torch.float32)
    for rtol in (0.1, 0.01, 0.001):
        out = deepemd.match(x, y, method="auction", rtol=rtol)
        assert out.rel_gap is not None
        assert bool((out.rel_gap <= rtol).all())
        exact = torch.from_numpy(lap(x, y))
        assert bool((out.distance.double() <= exact * (1 + rtol) + 1e-6).all())


def test_auction_from_optimal_prices_needs_far_fewer_rounds() -> None:
    x, y = pair(4, 100)
    best = solve_exact(x, y, with_potentials=True)
    assert best.g is not None
    cold = solve_auction(x, y, eps=1e-4)
    warm = solve_auction(x, y, eps=1e-4, prices=-best.g, eps_start=1e-4)
    np.testing.assert_allclose(warm.upper.numpy(), lap(x, y), rtol=1e-3)
    assert 3 * warm.iterations <= cold.iterations


def test_auction_that_runs_out_of_rounds_is_completed_and_flagged() -> None:
    x, y = pair(3, 30)
    out = deepemd.match(x, y, method="auction", eps=1e-6, max_iter=2)
    assert not bool(out.converged.any())
    assert bool(out.bijective.all())
    assert bool((out.distance >= torch.from_numpy(lap(x, y)) - 1e-12).all())
    assert out.rel_gap is not None
    with pytest.raises(deepemd.NotConvergedError, match="raise max_iter"):
        deepemd.match(x, y, method="auction", eps=1e-6, max_iter=2, strict=True)


def test_auction_ends_on_duplicated_points() -> None:
    x = torch.zeros(1, 30, 3)
    x[:, 15:] = 1.0
    y = torch.zeros(1, 30, 3)
    y[:, 10:] = 2.0
    out = solvers.auction(x, y, 1e-3)
    assert bool(out.converged.all())
    np.testing.assert_allclose(out.distance.numpy(), lap(x, y), rtol=1e-3)
    flat = solvers.auction(torch.zeros(1, 5, 2), torch.zeros(1, 5, 2))
    assert flat.distance.item() == 0.0
    assert bool(flat.bijective.all())


def test_auction_of_a_pair_does_not_depend_on_its_batch() -> None:
    x, y = pair(5, 20)
    together = solvers.auction(x, y, 1e-3)
    for k in range(5):
        alone = solvers.auction(x[k : k + 1], y[k : k + 1], 1e-3)
        assert alone.index.equal(together.index[k : k + 1])


def test_auction_on_given_costs_of_any_sign() -> None:
    cost = torch.randn(3, 12, 12, dtype=torch.float64)
    found = auction(Costs.of(cost), eps=1e-7)
    expected = solvers.exact(cost).distance
    torch.testing.assert_close(found.upper, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="eps, rtol or both"):
        auction(Costs.of(cost), eps=None)


# --- Sinkhorn --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(12, 12), (8, 13)])
def test_sinkhorn_plan_equals_pot_s(sizes: tuple[int, int]) -> None:
    x, y = pair(2, sizes[0], m=sizes[1])
    found = solve_sinkhorn(x, y, reg=0.1, relative=False, tol=1e-10, n_iter=20000)
    for k in range(2):
        cost = ot.dist(x[k].numpy(), y[k].numpy(), metric="euclidean")
        expected = ot.sinkhorn(
            [], [], cost, 0.1, method="sinkhorn_log", stopThr=1e-12, numItermax=50000
        )
        np.testing.assert_allclose(found.plan[k].numpy(), expected, atol=1e-8)


def test_sinkhorn_tends_to_the_exact_distance_as_reg_tends_to_zero() -> None:
    x, y = pair(3, 20)
    exact = torch.from_numpy(lap(x, y))
    errors = []
    for reg in (0.3, 0.1, 0.03, 0.01):
        out = solvers.sinkhorn(x, y, reg=reg, n_iter=5000, tol=1e-6)
        errors.append(float((out.distance - exact).abs().max()))
        assert bool((out.lower <= exact + 1e-9).all())
        assert bool((out.upper >= exact - 1e-9).all())
        assert bool(out.converged.all()) or reg == 0.01  # there it takes more sweeps than these
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * float(exact.min())


def test_sinkhorn_entropic_value_equals_pot_s() -> None:
    x, y = pair(1, 10)
    found = solve_sinkhorn(x, y, reg=0.2, relative=False, tol=1e-11, n_iter=20000, value="entropic")
    cost = ot.dist(x[0].numpy(), y[0].numpy(), metric="euclidean")
    plan = ot.sinkhorn([], [], cost, 0.2, method="sinkhorn_log", stopThr=1e-13, numItermax=50000)
    kl = (plan * np.log(plan * 100)).sum()
    assert float(found.value) == pytest.approx(float((plan * cost).sum() + 0.2 * kl), rel=1e-9)


def test_sinkhorn_with_weights_respects_them(rng: np.random.Generator) -> None:
    x, y = pair(2, 9, m=6)
    a = torch.from_numpy(rng.dirichlet(np.ones(9), 2))
    b = torch.from_numpy(rng.dirichlet(np.ones(6), 2))
    b[0, 2] = 0.0
    b = b / b.sum(1, keepdim=True)
    out = solvers.sinkhorn(x, y, a=a, b=b, return_plan=True, tol=1e-8, n_iter=20000, reg=0.05)
    torch.testing.assert_close(out.plan.sum(2), a, rtol=0, atol=1e-7)
    torch.testing.assert_close(out.plan.sum(1), b, rtol=0, atol=1e-7)
    exact = deepemd.emd(x, y, a=a, b=b)
    assert bool((out.lower <= exact + 1e-9).all())
    assert bool((out.upper >= exact - 1e-9).all())


def test_rounded_plans_have_exact_marginals() -> None:
    plan = torch.rand(2, 5, 7, dtype=torch.float64)
    a, b = (
        torch.full((2, 5), 0.2, dtype=torch.float64),
        torch.full((2, 7), 1 / 7, dtype=torch.float64),
    )
    rounded = round_plan(plan / plan.sum((1, 2), keepdim=True), a, b)
    torch.testing.assert_close(rounded.sum(2), a, rtol=0, atol=1e-15)
    torch.testing.assert_close(rounded.sum(1), b, rtol=0, atol=1e-15)


def test_debiased_sinkhorn_of_a_cloud_with_itself_is_zero_and_positive_elsewhere() -> None:
    x, y = pair(2, 15)
    own = deepemd.emd(x, x, method="sinkhorn", debias=True, reg=0.2)
    torch.testing.assert_close(own, torch.zeros_like(own), rtol=0, atol=1e-12)
    assert bool((deepemd.emd(x, y, method="sinkhorn", debias=True, reg=0.2) > 0.1).all())


def test_sinkhorn_that_runs_out_of_sweeps_is_flagged() -> None:
    x, y = pair(2, 15)
    out = solvers.sinkhorn(x, y, reg=1e-3, n_iter=20)
    assert not bool(out.converged.any())
    fixed = solvers.sinkhorn(x, y, reg=0.5, n_iter=500, anneal=False)
    assert bool(fixed.converged.all())


@pytest.mark.parametrize(
    "options", [{"reg": 0.0}, {"scaling": 1.0}, {"value": "x"}, {"reg": -1.0}]
)  # fmt: skip
def test_sinkhorn_refuses_settings_that_cannot_work(options: dict) -> None:
    x, y = pair(1, 4)
    with pytest.raises(ValueError, match="must"):
        deepemd.emd(x, y, method="sinkhorn", **options)


# --- the simple ones -------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_chamfer_equals_the_double_loop(p: int, chunk: int | None) -> None:
    x, y = pair(2, 6, m=9)
    found = deepemd.emd(x, y, method="chamfer", p=p, chunk_size=chunk)
    for k in range(2):
        d = (x[k][:, None] - y[k][None]).norm(dim=2) ** p
        expected = float(d.min(1).values.mean() + d.min(0).values.mean())
        assert float(found[k]) == pytest.approx(expected, rel=1e-12)
    half = solvers.chamfer(x, y, p, mean_of_two=True)
    torch.testing.assert_close(2 * half, found, rtol=1e-12, atol=0)


@pytest.mark.parametrize("p", [1, 2])
def test_sliced_equals_the_mean_of_one_dimensional_distances(p: int) -> None:
    x, y = pair(1, 30)
    found = deepemd.emd(x, y, method="sliced", n_proj=16, seed=3, p=p)
    theta = torch.randn(3, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    theta = theta / theta.norm(dim=0)
    values = [
        ot.wasserstein_1d((x[0] @ t).numpy(), (y[0] @ t).numpy(), p=p) for t in theta.T
    ]  # fmt: skip
    assert float(found) == pytest.approx(float(np.mean(values)), rel=1e-9)
    fresh = torch.Generator().manual_seed(0)
    a, b = (solvers.sliced(x, y, 8, fresh) for _ in range(2))
    assert not torch.equal(a, b)


def test_sliced_interpolates_the_larger_cloud_to_the_quantiles_of_the_smaller() -> None:
    dense = torch.linspace(0, 1, 1001, dtype=torch.float64).view(1, -1, 1)
    coarse = (torch.arange(10, dtype=torch.float64).view(1, -1, 1) + 0.5) / 10
    for x, y in ((dense, coarse), (coarse, dense)):
        value = float(deepemd.emd(x, y + 2.0, method="sliced", n_proj=4))
        assert value == pytest.approx(2.0, abs=1e-3) or value == pytest.approx(2.0, rel=1e-3)
    one = deepemd.emd(dense, coarse[:, :1], method="sliced")
    assert bool(one.isfinite().all())


def naive_approxmatch(x: Tensor, y: Tensor) -> Tensor:
    """The routine as it is written down: scalars and loops."""
    n, m = len(x), len(y)
    left, right = [float(max(1, m // n))] * n, [float(max(1, n // m))] * m
    match = torch.zeros(n, m, dtype=torch.float64)
    for j in range(7, -3, -1):
        level = 0.0 if j == -2 else -(4.0**j)
        w = [
            [float(np.exp(level * float((x[k] - y[s]).square().sum()))) for s in range(m)]
            for k in range(n)
        ]
        a = [left[k] / (sum(w[k][s] * right[s] for s in range(m)) + 1e-9) for k in range(n)]
        r = []
        for s in range(m):
            total = right[s] * sum(w[k][s] * a[k] for k in range(n))
            r.append(right[s] * min(right[s] / (total + 1e-9), 1.0))
            right[s] = max(0.0, right[s] - total)
        for k in range(n):
            moved = [w[k][s] * a[k] * r[s] for s in range(m)]
            for s in range(m):
                match[k, s] += moved[s]
            left[k] = max(0.0, left[k] - sum(moved))
    return match


@pytest.mark.parametrize("sizes", [(6, 6), (4, 8), (9, 4)])
def test_approxmatch_equals_the_loops_that_define_it(sizes: tuple[int, int]) -> None:
    x, y = pair(1, sizes[0], m=sizes[1])
    plan = approxmatch_plan(x, y)[0]
    torch.testing.assert_close(plan, naive_approxmatch(x[0], y[0]), rtol=1e-9, atol=1e-12)
    d = (x[0][:, None] - y[0][None]).norm(dim=2)
    total = deepemd.emd(x, y, method="approxmatch")
    assert float(total) == pytest.approx(float((plan * d).sum()), rel=1e-9)
    mean = deepemd.emd(x, y, method="approxmatch", total=False)
    torch.testing.assert_close(mean * sizes[0], total)
