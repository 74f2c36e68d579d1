"""What the surrogate is fitted to: reused points, freed of what their iteration has in common."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mi_surrogates import (
    DesignSpace,
    EnsembleSurrogate,
    MIObjective,
    Optimizer,
    QuadraticSurrogate,
    optimize,
)
from mi_surrogates.design.trust import Region
from mi_surrogates.errors import CheckpointMismatch
from mi_surrogates.loop.checks import trend_probability
from mi_surrogates.loop.neighbours import RATIOS, Point, features, levels, neighbours
from mi_surrogates.loop.objectives import CallableObjective
from mi_surrogates.problems import PROBLEMS


def draw(shift: float, noise: float, blocks: int = 5, each: int = 12, seed: int = 0):
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((blocks * each, 2))
    block = np.repeat(np.arange(blocks), each)
    common = shift * rng.standard_normal(blocks)
    smooth = 1 + z @ [0.5, -1.0] - z[:, 0] ** 2 + 0.3 * z[:, 0] * z[:, 1]
    value = smooth + common[block] + noise * rng.standard_normal(len(z))
    return z, value, rng.uniform(0.5, 2.0, len(z)), block, common


def dense(z, value, weight, block):
    """The mixed model by its definition, with the whole covariance matrix V of the values."""
    weight = weight / weight.mean()
    group = (block[:, None] == np.unique(block)).astype(float)
    x = features(z, (len(value) - group.shape[1]) // 2)
    y = value - value.mean()
    best = None
    for ratio in RATIOS:
        v = np.diag(1 / weight) + ratio * group @ group.T
        inverse = np.linalg.inv(v)
        inner = x.T @ inverse @ x
        beta = np.linalg.solve(inner, x.T @ inverse @ y)
        rest = y - x @ beta
        freedom = len(y) - x.shape[1]
        quadratic = rest @ inverse @ rest
        criterion = (
            np.linalg.slogdet(v)[1] + np.linalg.slogdet(inner)[1] + freedom * np.log(quadratic)
        )
        if best is None or criterion < best[0]:
            offsets = ratio * group.T @ inverse @ rest
            best = (criterion, group @ offsets, np.sqrt(quadratic / freedom), (x @ beta).std())
    return best[1:]


@pytest.mark.parametrize("shift", [0.0, 0.05, 0.5])
def test_levels_are_those_of_the_dense_mixed_model(shift: float) -> None:
    z, value, weight, block, _ = draw(shift, 0.1)
    split = levels(z, value, weight, block)
    offsets, noise, signal = dense(z, value, weight, block)
    # the fast form has a ridge of 1e-9, against an intercept known to 5/100 points where τ²/σ² = 100
    np.testing.assert_allclose(split.offsets, offsets, atol=2e-6)
    assert split.noise == pytest.approx(noise, rel=1e-6)
    assert split.signal == pytest.approx(signal, rel=1e-6)


def test_common_levels_are_found_and_absent_ones_are_not_made_up() -> None:
    z, value, weight, block, common = draw(0.5, 0.02)
    found = levels(z, value, weight, block)
    expected = (common - common.mean())[block]
    # five levels of twelve points with noise 0.02 each: 0.02/√12 = 0.006
    np.testing.assert_allclose(found.offsets - found.offsets.mean(), expected, atol=0.03)
    assert found.noise == pytest.approx(0.02, rel=0.3)
    z, value, weight, block, _ = draw(0.0, 0.02)
    assert np.abs(levels(z, value, weight, block).offsets).max() < 0.01


def test_too_few_points_have_no_level_and_no_noise() -> None:
    z, value, weight, block, _ = draw(0.5, 0.1, blocks=2, each=2)
    split = levels(z, value, weight, block)
    assert not split.offsets.any()
    assert np.isnan(split.noise)


def test_reused_points_are_near_recent_and_weighted_by_distance() -> None:
    region = Region(np.zeros(2), np.eye(2))
    points: list[Point] = [
        (np.array([9.0, 0.0]), 1.0, 0.1, 4),  # of this iteration: any distance
        (np.array([1.0, 0.0]), 2.0, 0.1, 3),
        (np.array([3.6, 0.0]), 3.0, 0.1, 3),  # beyond 2.5 √2 = 3.54
        (np.array([0.5, 0.0]), 4.0, 0.1, 1),  # too old
    ]
    near = neighbours(points, region, 4, reuse=2)
    assert near.z.tolist() == [[9.0, 0.0], [1.0, 0.0]]
    assert near.weight[1].item() == pytest.approx(np.exp(-0.25))
    plain = neighbours(points, region, 4, reuse=0)
    assert plain.z.tolist() == [[9.0, 0.0]]
    assert plain.weight.tolist() == [1.0]


def test_a_shift_of_a_whole_iteration_does_not_move_the_next_design() -> None:
    """Noise that all designs of an iteration share must not bend the surrogate."""

    def run(shift: float) -> np.ndarray:
        opt = Optimizer(
            DesignSpace(initial=[0.4, 0.4], lower=0.0, upper=1.0, sigma=0.1),
            CallableObjective(
                lambda t, x, y: (-float(((t - 0.55) ** 2).sum()) + float(y[0]), 1e-3)
            ),
            surrogate="quadratic",
            designs=12,
            events=1,
        )
        for i in range(5):
            for trial in opt.ask():
                opt.tell(trial, np.zeros(1), np.full(1, shift * (-1.0) ** i))
            opt.step()
        return opt.theta

    # an offset is shrunk by 1/(1 + 100 · 12) at the most, hence not exactly zero
    np.testing.assert_allclose(run(0.3), run(0.0), atol=5e-3)
    np.testing.assert_allclose(run(0.3), [0.55, 0.55], atol=5e-3)


def test_region_shrinks_where_the_top_is_inside_and_clear_of_the_noise() -> None:
    def run(noise: float) -> list[tuple[float, bool]]:
        rng = np.random.default_rng(0)
        opt = Optimizer(
            DesignSpace(initial=[0.47], lower=0.0, upper=1.0, sigma=0.1),
            CallableObjective(
                lambda t, x, y: (-float((t[0] - 0.5) ** 2) + noise * rng.standard_normal(), noise)
            ),
            surrogate="quadratic",
            designs=8,
            events=1,
        )
        for _ in range(12):
            for trial in opt.ask():
                opt.tell(trial, np.zeros(1), np.zeros(1))
            opt.step()
        return [(each.sigma[0], each.accepted) for each in opt.history]

    clear = run(1e-6)
    settled = 0
    for (before, _), (after, accepted) in itertools.pairwise(clear):
        if accepted:
            assert after == pytest.approx(max(before / 2**0.5, min(before, 0.01)), rel=1e-9)
            settled += after < before
        else:
            assert after == pytest.approx(before / 2, rel=1e-9)
    assert settled >= 2
    with pytest.warns(UserWarning, match="the same for all designs"):
        noisy = run(1.0)
    assert (
        noisy[-1][0] > 0.06
    )  # nothing to see; one of twelve fits of pure noise looks like a signal


def test_trend_across_iterations_is_told_from_their_levels() -> None:
    rng = np.random.default_rng(0)
    z, block = rng.standard_normal((18, 4)), np.repeat([0, 1, 2], 6)
    slope = 0.5 * z[:, 0] + 5.0 * block + 0.1 * rng.standard_normal(18)
    assert trend_probability(z, slope, block) < 1e-6
    assert trend_probability(z, 5.0 * block + 0.1 * rng.standard_normal(18), block) > 0.01
    assert trend_probability(z[:5], slope[:5]) == 0.0  # too few to say that there is none


def test_small_populations_see_a_slope_that_single_iterations_do_not() -> None:
    problem = PROBLEMS["water_filling"]
    result = optimize(
        problem.simulator,
        problem.make_space(),
        MIObjective("gaussian"),
        surrogate="quadratic",
        designs=8,
        iterations=12,
        seed=5,
        progress=False,
    )
    assert result.status == "iterations"
    assert problem.best - problem.information(result.theta) < 0.02


def hill(theta: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    x, noise = np.random.default_rng(seed).standard_normal((2, n))
    return x, x + (0.2 + (theta[0] - 0.7) ** 2) * noise


def line() -> DesignSpace:
    return DesignSpace(initial=[0.4], lower=0.0, upper=1.0, sigma=0.1)


QUIET = {"objective": MIObjective("gaussian"), "iterations": 4, "events": 100, "progress": False}


def test_designs_auto_follows_the_parameters() -> None:
    assert Optimizer(line(), designs="auto").designs == 8
    many = DesignSpace(initial=np.full(9, 0.5), lower=0.0, upper=1.0)
    assert Optimizer(many, designs="auto").designs == 13
    result = optimize(hill, line(), designs="auto", surrogate="quadratic", **QUIET)
    assert result.events == 4 * 8 * 100
    with pytest.raises(ValueError, match="number or 'auto'"):
        Optimizer(line(), designs="many")
    for odd in (8.0, None, [8]):
        with pytest.raises(TypeError, match="designs must be a whole number or 'auto', got"):
            Optimizer(line(), designs=odd)


def test_an_instance_is_fitted_as_the_named_surrogate_of_its_arguments(tmp_path) -> None:
    named = optimize(hill, line(), surrogate="quadratic", **QUIET)
    given = QuadraticSurrogate(1)
    same = optimize(hill, line(), surrogate=given, **QUIET)
    assert same.theta.tolist() == named.theta.tolist()
    assert not given.coefficients.any()  # copies are fitted
    small = EnsembleSurrogate(1, members=2, steps=20)
    first = optimize(hill, line(), surrogate=small, checkpoint=tmp_path, **QUIET)
    assert first.surrogate.members == 2
    assert first.surrogate.warm_start
    more = {**QUIET, "iterations": 6}
    resumed = optimize(hill, line(), surrogate=small, checkpoint=tmp_path, **more)
    straight = optimize(hill, line(), surrogate=small, **more)
    assert resumed.theta.tolist() == straight.theta.tolist()
    with pytest.raises(CheckpointMismatch, match="surrogate"):
        optimize(
            hill, line(), surrogate=EnsembleSurrogate(1, members=3), checkpoint=tmp_path, **more
        )


def test_unsuitable_surrogates_are_named() -> None:
    with pytest.raises(ValueError, match="of 2 parameters, the design space has 1"):
        Optimizer(line(), surrogate=EnsembleSurrogate(2))
    with pytest.raises(TypeError, match="needs a method fit, Linear has none"):
        Optimizer(line(), surrogate=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="designs >= 3"):
        Optimizer(line(), surrogate=QuadraticSurrogate(1), designs=2)
