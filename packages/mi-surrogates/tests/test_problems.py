"""The problems' exact information and optima, and whether the loop finds them."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import entr
from scipy.stats import binom, lognorm, truncnorm

from mi_surrogates import MIObjective, optimize
from mi_surrogates.errors import MissingExtra
from mi_surrogates.information import mutual_information
from mi_surrogates.problems import (
    PROBLEMS,
    DeathProcess,
    DigitSensors,
    Problem,
    SensorRing,
    gaussian_information,
    linear_information,
    noisy_channel_information,
    saturating_information,
    uniform_information,
)


@pytest.mark.parametrize(
    ("theta", "nats"),
    [
        ((0.2, 1.0), 1.667113),
        ((0.2, 1.3), 1.394933),
        ((0.2, 2.2), 0.450284),
        ((0.7, 1.0), 0.640148),
        ((0.7, 1.6), 0.282504),
        ((1.2, 1.3), 0.203550),
        ((2.2, 1.0), 0.121591),
        ((2.2, 2.2), 0.006126),
    ],
)
def test_noisy_channel_has_the_known_information(theta: tuple[float, float], nats: float) -> None:
    assert noisy_channel_information(np.array(theta)) == pytest.approx(nats, abs=1e-6)
    assert noisy_channel_information(np.array([1.0, np.e])) == 0


@pytest.mark.parametrize(
    ("found", "nats"),
    [
        (gaussian_information(0.75), 0.413339),
        (gaussian_information(0.9), 0.830366),
        (gaussian_information(0.99), 1.958518),
        (gaussian_information(0.999), 3.107554),
        (uniform_information(0.1), 1.709438),
        (uniform_information(0.75), 1 / 3),
        (PROBLEMS["water_filling"].information(np.array([1.0, 0.75, 0.25, 0.0])), 1.374436),
        (PROBLEMS["regression"].information(np.array([-1.0, 0.0, 1.0])), 7.615767),
    ],
)
def test_closed_forms_have_the_published_values(found: float, nats: float) -> None:
    assert found == pytest.approx(nats, abs=1e-6)


def test_saturating_sensor_has_the_known_optimum() -> None:
    found = minimize_scalar(
        lambda g: -saturating_information(np.array([g])),
        bounds=(0.3, 2),
        method="bounded",
        options={"xatol": 1e-6},
    )
    # the top is flat: 4e-4 in the gain are 1e-7 nats
    assert found.x == pytest.approx(0.85034, abs=1e-3)
    assert -found.fun == pytest.approx(1.746244, abs=2e-6)
    for gain, nats in ((0.5, 1.571606), (1.5, 1.614008)):
        assert saturating_information(np.array([gain])) == pytest.approx(nats, abs=1e-5)


@pytest.mark.parametrize("prior", ["normal", "lognormal"])
def test_death_process_equals_gauss_legendre_over_the_priors_quantiles(prior: str) -> None:
    process = DeathProcess(prior)
    law = truncnorm(-1, np.inf, 1, 1) if prior == "normal" else lognorm(1)
    nodes, weights = np.polynomial.legendre.leggauss(2000)
    rates = law.ppf((nodes + 1) / 2)
    for time in (0.4, 1.2, 3.0):
        pmf = binom.pmf(np.arange(51)[:, None], 50, -np.expm1(-rates * time))
        expected = entr(pmf @ weights / 2).sum() - (weights / 2) @ entr(pmf).sum(0)
        assert process.information(np.array([time])) == pytest.approx(expected, abs=2e-5)
    draws = law.ppf((nodes + 1) / 2)
    entropy = -(weights / 2) @ law.logpdf(draws)
    assert process.x_entropy() == pytest.approx(entropy, abs=1e-3)
    x, y = process(np.array([1.0]), 4000, 0)
    assert x.mean() == pytest.approx(law.mean(), abs=4 * law.std() / 4000**0.5)
    assert y.mean() == pytest.approx(50 * (1 - np.exp(-x)).mean(), abs=0.3)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_known_design_is_the_best(problem: Problem) -> None:
    best, space = np.array(problem.theta), problem.make_space()
    assert problem.information(best) == pytest.approx(problem.best, abs=2e-5)
    assert space.violation(best) < 1e-9
    rng = np.random.default_rng(0)
    for scale in (0.01, 0.1, 1.0):
        for _ in range(30):
            other = space.project(best + scale * space.sigma * rng.standard_normal(best.size))
            assert problem.information(other) <= problem.best + 2e-5


def test_linear_channel_is_the_difference_of_entropies() -> None:
    rng = np.random.default_rng(0)
    a, noise = rng.standard_normal((3, 4)), np.diag([0.5, 1.0, 2.0])
    signal = a @ a.T + noise
    expected = 0.5 * (np.linalg.slogdet(signal)[1] - np.linalg.slogdet(noise)[1])
    assert linear_information(a, np.eye(4), noise) == pytest.approx(expected, abs=1e-12)


def test_ring_information_is_the_entropy_of_the_patterns() -> None:
    ring = SensorRing()
    theta = np.array([1.0, 0.1, 0.9, 0.8, 0.3, 1.2])
    _, y = ring(theta, 400_000, 0)
    share = np.bincount((y @ [1, 2, 4]).astype(int)) / len(y)
    assert ring.information(theta) == pytest.approx(float(entr(share).sum()), abs=0.005)
    blurred = SensorRing(epsilon=0.3)(theta, 100, 0)
    assert blurred[1].shape == (100, 3)


@pytest.mark.parametrize(
    "name", ["correlated", "uniform_noise", "noisy_channel", "saturating_sensor"]
)
def test_simulators_have_the_information_that_they_claim(name: str) -> None:
    problem = PROBLEMS[name]
    theta = problem.make_space().initial
    est = mutual_information(*problem.simulator(theta, 6000, 0))
    # KSG's bias at sharp edges is below 0.02 here
    assert est.value == pytest.approx(problem.information(theta), abs=3 * est.stderr + 0.02)


def test_priors_are_named() -> None:
    with pytest.raises(ValueError, match="lognormal"):
        DeathProcess("gamma")


def solve(problem: Problem, seed: int) -> float:
    """Return the regret relative to the best information."""
    result = optimize(
        problem.simulator,
        problem.make_space(),
        MIObjective(problem.method, **problem.options),
        surrogate="quadratic",
        iterations=20,
        seed=seed,
        progress=False,
    )
    assert result.constraint_violation <= 1e-3
    return 1 - problem.information(result.theta) / problem.best


EASY = [
    "correlated",
    "water_filling",
    "uniform_noise",
    "noisy_channel",
    "saturating_sensor",
    "regression",
]


@pytest.mark.parametrize("name", EASY)
def test_optimum_is_found_within_five_percent(name: str) -> None:
    assert max(solve(PROBLEMS[name], seed) for seed in (0, 1)) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["water_filling", "regression"])
def test_optimum_is_found_in_nine_of_ten_seeds(name: str) -> None:
    regrets = [solve(PROBLEMS[name], seed) for seed in range(10, 20)]
    assert sum(regret < 0.05 for regret in regrets) >= 9


def test_digit_sensors_read_what_is_under_them(monkeypatch: pytest.MonkeyPatch) -> None:
    sensors = DigitSensors(1, width=0.05, noise=0.0)
    rng = np.random.default_rng(0)
    read = sensors.read(np.array([3.0, 4.0]), sensors.images[:5], rng)
    assert np.allclose(read[:, 0], sensors.images[:5, 3, 4])
    space = DigitSensors(6).space(0)
    assert space.dim == 12
    assert 0.2 < DigitSensors(6).accuracy(space.initial) < 0.95
    with pytest.raises(ValueError, match="count"):
        DigitSensors(0)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtra, match="digits"):
        DigitSensors(1)
