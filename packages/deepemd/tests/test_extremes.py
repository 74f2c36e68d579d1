"""Clouds at the edge of float32, options that do not fit, and certificates where none is to be had."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import deepemd
from deepemd import solvers
from deepemd.core.decode import decode_logits, refine
from deepemd.core.output import Solution

SOLVERS = ("exact", "auction", "sinkhorn", "chamfer", "sliced", "deepemd")


def costs(x: Tensor, y: Tensor, p: int) -> np.ndarray:
    difference = x.double().numpy()[:, None] - y.double().numpy()[None]
    return np.asarray((difference**2).sum(-1) ** (p / 2))


def exact_cost(x: Tensor, y: Tensor, p: int = 1) -> float:
    cost = costs(x, y, p)
    return float(cost[linear_sum_assignment(cost)].mean())


def clusters(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points of eight tight clusters far apart, the same number in each: tiny distances, large costs."""
    g = torch.Generator().manual_seed(seed)
    centre = torch.randn(8, 3, generator=g)[torch.arange(n) % 8] * 100
    x, y = (centre + 0.01 * torch.randn(n, 3, generator=g) for _ in range(2))
    return x[None], y[None]


def jittered(n: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, n, 3, generator=g)
    return x, x[:, torch.randperm(n, generator=g)] + 1e-4 * torch.randn(1, n, 3, generator=g)


@pytest.mark.parametrize("make", [clusters, jittered])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("method", ["auction", "sinkhorn", "round", "refine by auction"])
def test_bounds_hold_where_costs_dwarf_the_distance(make, p: int, method: str) -> None:
    for seed in range(3):
        x, y = make(64, seed)
        best = exact_cost(x[0], y[0], p)
        if method in ("auction", "sinkhorn"):
            out = deepemd.match(x, y, method=method, p=p)
            lower, upper, met = out.lower, out.upper, out.converged
        else:
            wrong = linear_sum_assignment(costs(x[0], y[0], p))[1]
            wrong[:4] = np.roll(wrong[:4], 1)
            index = torch.as_tensor(wrong)[None]
            found = Solution(index, index.argsort(1))
            if method == "round":
                logits = torch.nn.functional.one_hot(index, 64) * 30.0
                found = decode_logits(logits, x, y, "round", p=p)
            else:
                found = refine(x, y, found, p=p, exact=False)
            lower, upper, met = found.lower, found.upper, found.converged
        assert float(lower) <= best * (1 + 1e-5)
        assert float(lower) <= float(upper)
        assert float(upper) >= best * (1 - 1e-5)
        if method in ("auction", "refine by auction") and bool(met):
            assert float(upper) <= best * 1.011


def test_an_auction_whose_gap_stays_over_rtol_is_not_converged() -> None:
    x, y = clusters(64, 0)
    out = deepemd.match(x, y, method="auction", p=2, rtol=1e-2)
    assert float(out.rel_gap) > 1e-2
    assert not bool(out.converged)
    with pytest.raises(deepemd.NotConvergedError, match="auction did not converge"):
        deepemd.match(x, y, method="auction", p=2, rtol=1e-2, strict=True)


def test_refine_by_auction_keeps_the_best_of_the_rounds_it_has() -> None:
    x, y = torch.randn(2, 64, 3), torch.randn(2, 64, 3)
    start = torch.arange(64).repeat(2, 1)
    before = (x - y).norm(dim=-1).mean(1)
    for rounds in (1, 50, 20_000):
        out = refine(x, y, Solution(start, start), exact=False, max_iter=rounds)
        assert out.iterations <= rounds
        assert bool((out.upper <= before * (1 + 1e-6)).all())
        met = out.upper - out.lower <= 1e-2 * out.upper
        assert torch.equal(out.converged, met)
    assert bool(out.converged.all())
    for k in range(2):
        assert float(out.upper[k]) <= exact_cost(x[k], y[k]) * 1.011


@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1e-12, 1e12, 1e25, 1e37])
@pytest.mark.parametrize("method", SOLVERS)
def test_extreme_units_neither_vanish_nor_overflow(method: str, scale: float) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 20, 3, generator=g), torch.randn(2, 20, 3, generator=g)
    kw = {"rtol": 1e-6} if method == "auction" else {}
    plain = deepemd.match(x, y, method=method, **kw)
    big = (x * scale).requires_grad_()
    out = deepemd.match(big, y * scale, method=method, **kw)
    torch.testing.assert_close(
        out.distance.double() / scale, plain.distance.double(), rtol=1e-4, atol=0
    )
    if plain.lower is not None:
        torch.testing.assert_close(
            out.lower.double() / scale, plain.lower.double(), rtol=1e-4, atol=0
        )
    out.distance.sum().backward()
    small = x.clone().requires_grad_()
    deepemd.emd(small, y, method=method, **kw).sum().backward()
    torch.testing.assert_close(big.grad, small.grad, rtol=1e-3, atol=1e-4)


def test_extreme_units_of_squares_roots_potentials_and_prices() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(1, 12, 3, generator=g), torch.randn(1, 12, 3, generator=g)
    best = exact_cost(x[0], y[0], 2)
    small = deepemd.emd(x * 1e-25, y * 1e-25, p=2, root=True)
    assert float(small) == pytest.approx(best**0.5 * 1e-25, rel=1e-5)
    assert float(deepemd.emd(x * 1e15, y * 1e15, p=2)) == pytest.approx(best * 1e30, rel=1e-5)
    assert float(deepemd.emd(x * 1e25, x * 1e25, p=2)) == 0.0
    out = deepemd.match(x * 1e25, y * 1e25, method="auction")
    again = deepemd.match(x * 1e25, y * 1e25, method="auction", prices=-out.potentials[1])
    room = costs(x[0] * 1e25, y[0] * 1e25, 1) - sum(
        part[0].double().numpy()[at]
        for part, at in zip(out.potentials, (np.s_[:, None], None), strict=True)
    )
    assert room.min() >= -1e-6 * 1e25
    assert again.iterations <= out.iterations
    mixed = deepemd.emd(torch.cat([x, x * 1e-25]), torch.cat([y, y * 1e-25]))
    assert float(mixed[1]) == pytest.approx(float(mixed[0]) * 1e-25, rel=1e-5)


def test_the_network_itself_reads_extreme_units() -> None:
    model = deepemd.DeepEMD.from_pretrained("tiny")
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(1, 16, 3, generator=g), torch.randn(1, 16, 3, generator=g)
    with torch.no_grad():
        plain = model(x, y)
        for scale in (2.0**-90, 2.0**90):
            torch.testing.assert_close(model(x * scale, y * scale), plain, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("method", [*SOLVERS, "approxmatch"])
@pytest.mark.parametrize("decode", ["argmax", "refine"])
def test_an_unknown_option_names_the_method_and_its_options(method: str, decode: str) -> None:
    x = torch.rand(1, 5, 3)
    with pytest.raises(
        TypeError, match=f"method='{method}' has no option 'bogus'; its options are"
    ):
        deepemd.emd(x, x, method=method, decode=decode, bogus=1)
    with pytest.raises(
        TypeError, match=r"'exact' has no option 'eps'; it is one of method='auction'"
    ):
        deepemd.emd(x, x, eps=1e-3)
    with pytest.raises(TypeError, match="no option 'methd'"):
        deepemd.EMDLoss(methd=method)


def test_every_loss_option_survives_pickling() -> None:
    loss = pickle.loads(pickle.dumps(deepemd.EMDLoss(method="sinkhorn", reg=0.1, n_iter=50, p=2)))
    assert loss.options == {"method": "sinkhorn", "reg": 0.1, "n_iter": 50, "p": 2}


def test_refine_of_unequal_clouds_says_whether_it_is_certified() -> None:
    ot = pytest.importorskip("ot")
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 20, 3, generator=g), torch.randn(2, 15, 3, generator=g)
    out = deepemd.match(x, y, method="deepemd")
    assert not bool(out.converged.any())
    for k in range(2):
        best = ot.emd2(np.full(20, 1 / 20), np.full(15, 1 / 15), costs(x[k], y[k], 1))
        assert float(out.lower[k]) <= best <= float(out.upper[k])
    with pytest.raises(deepemd.NotConvergedError):
        deepemd.match(x, y, method="deepemd", strict=True)
    assert bool(deepemd.match(x, y, method="deepemd", rtol=0.99).converged.all())


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("p", [1, 2])
def test_refine_of_a_partial_matching_is_optimal(swap: bool, p: int) -> None:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 20, 3, generator=g), torch.randn(2, 15, 3, generator=g)
    x, y = (y, x) if swap else (x, y)
    out = deepemd.match(x, y, method="deepemd", unequal="partial", p=p)
    best = torch.tensor([exact_cost(a, b, p) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(out.distance, best, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.lower, best, rtol=1e-5, atol=0)
    assert bool(out.converged.all())
    assert bool(out.bijective.all())


def test_a_partial_auction_among_duplicates_ends() -> None:
    x, y = torch.zeros(1, 8, 2), torch.zeros(1, 10, 2)
    y[:, 6:] = 1.0  # 8 bidders for 6 equal objects: prices must rise by 1.41 in steps of ε
    out = deepemd.match(x, y, method="auction", unequal="partial")
    best = exact_cost(x[0], y[0])
    assert bool(out.converged)
    assert float(out.distance) <= best * 1.011
    assert float(out.lower) <= best * (1 + 1e-6)


def test_prices_follow_masks_and_are_checked() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 12, 3, generator=g), torch.randn(2, 12, 3, generator=g)
    mask = torch.arange(12) < torch.tensor([[9], [12]])
    out = deepemd.match(x, y, method="auction", mask_x=mask, mask_y=mask, eps=1e-6)
    again = deepemd.match(
        x, y, method="auction", mask_x=mask, mask_y=mask, eps=1e-6, prices=-out.potentials[1]
    )
    for k, n in enumerate((9, 12)):
        best = exact_cost(x[k, :n], y[k, :n])
        assert float(again.distance[k]) == pytest.approx(best, rel=1e-4)
    single = deepemd.match(x[1], y[1], method="auction", eps=1e-6, prices=-out.potentials[1][1])
    assert float(single.distance) == pytest.approx(exact_cost(x[1], y[1]), rel=1e-4)
    with pytest.raises(ValueError, match=r"prices must be \(2, 12\), got \(2, 11\)"):
        deepemd.match(x, y, method="auction", prices=torch.zeros(2, 11))
    with pytest.raises(TypeError, match="prices must be a floating-point tensor"):
        deepemd.match(x, y, method="auction", prices=[0.0])


@pytest.mark.parametrize("method", ["exact", "sinkhorn"])
def test_weights_count_on_real_points_only(method: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(1, 8, 3, generator=g), torch.randn(1, 8, 3, generator=g)
    mask = torch.arange(8)[None] < 6
    with pytest.raises(ValueError, match="sum to 1"):
        deepemd.match(x, y, method=method, mask_x=mask, a=torch.full((1, 8), 1 / 8))
    padded = torch.full((1, 8), 1 / 6)
    padded[:, 6:] = float("nan")
    out = deepemd.match(x, y, method=method, mask_x=mask, a=padded)
    plain = deepemd.match(x[:, :6], y, method=method)
    torch.testing.assert_close(out.distance, plain.distance)


def test_the_exact_solver_takes_unequal_clouds_and_workers() -> None:
    ot = pytest.importorskip("ot")
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(1, 10, 3, generator=g), torch.randn(1, 7, 3, generator=g)
    best = ot.emd2(np.full(10, 0.1), np.full(7, 1 / 7), costs(x[0], y[0], 1))
    assert float(solvers.exact(x, y).distance) == pytest.approx(best, rel=1e-5)
    assert float(deepemd.emd(x, y, method="exact", workers=None)) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("deepemd", {"decode": "soft", "temperature": 0.0}),
        ("deepemd", {"decode": "soft", "temperature": -1.0}),
        ("deepemd", {"decode": "sinkhorn", "sinkhorn_iters": 0}),
        ("sinkhorn", {"reg": float("nan")}),
        ("auction", {"eps": float("nan")}),
        ("auction", {"scaling": float("nan")}),
        ("exact", {"decode": "argmin"}),
    ],
)
def test_options_that_would_give_a_wrong_distance_are_refused(method: str, options) -> None:
    x = torch.rand(1, 5, 3)
    with pytest.raises(ValueError, match="must be"):
        deepemd.emd(x, x + 1, method=method, **options)


def test_p_may_be_a_float() -> None:
    x = torch.zeros(1, 5, 3)
    assert float(deepemd.emd(x, x + 2, p=2.0)) == 12.0
