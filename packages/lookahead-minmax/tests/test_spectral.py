"""Spectral radii against the values of the theory, and against what the implemented methods do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lookahead_minmax import ExtraGradient, LookaheadMinmax, Optimistic, spectral


def one(step: float, method: Any) -> Tensor:
    jacobian = spectral.bilinear_jacobian(torch.full((1, 1), step, dtype=torch.float64))
    return spectral.operator(jacobian, method, 1.0)


@pytest.mark.parametrize(
    ("step", "method", "k", "alpha", "modulus"),
    [
        (0.3, "gda", 1, 1.0, 1.0440307),
        (0.3, "gda", 5, 0.5, 0.839587),
        (0.3, "gda", 6, 0.5, 0.744755),
        (0.3, "gda", 6, 0.4, 0.719935),
        (0.3, "gda", 6, 0.8, 1.019799),
        (0.3, "gda", 10, 0.5, 0.303758),
        (0.3, "alt", 1, 1.0, 1.0),
        (0.3, "alt", 5, 0.5, 0.729749),
        (0.3, "alt", 6, 0.5, 0.618936),
        (0.3, "alt", 10, 0.5, 0.065068),
        (0.3, "eg", 1, 1.0, 0.958175),
        (0.3, "eg", 5, 0.5, 0.635934),
        (0.3, "eg", 6, 0.5, 0.520304),
        (0.3, "ogda", 1, 1.0, 0.948683),
        (0.3, "pp", 1, 1.0, 0.957826),
        (0.3, "gda", (3, 9), (0.5, 0.5), 0.730216),
        (0.1, "gda", 1, 1.0, 1.0049876),
        (0.1, "gda", 5, 0.5, 0.981327),
        (0.1, "gda", 10, 0.5, 0.900861),
        (0.1, "eg", 1, 1.0, 0.995038),
        (0.1, "ogda", 1, 1.0, 0.994936),
    ],
)
def test_modulus_of_a_period(step: float, method: Any, k: Any, alpha: Any, modulus: float) -> None:
    operator = spectral.lookahead_operator(one(step, method), k, alpha)
    assert spectral.spectral_radius(operator) == pytest.approx(modulus, abs=1e-6)


def test_alternating_operator_is_the_published_matrix() -> None:
    a = torch.tensor([[0.7, 0.1], [-0.3, 0.4]], dtype=torch.float64)
    eye, lr = torch.eye(2, dtype=torch.float64), 0.3
    expected = torch.cat(
        [torch.cat([eye - lr**2 * a @ a.T, -lr * a], 1), torch.cat([lr * a.T, eye], 1)]
    )
    result = spectral.operator(spectral.bilinear_jacobian(a), "alt", lr)
    torch.testing.assert_close(result, expected, rtol=1e-14, atol=1e-15)


@given(st.integers(0, 10_000), st.integers(1, 20), st.floats(0.01, 1.0), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_a_contracting_base_method_contracts_under_lookahead(
    seed: int, k: int, alpha: float, size: int
) -> None:
    matrix = torch.randn(
        size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    matrix = 0.999 * matrix / spectral.spectral_radius(matrix)
    assert spectral.spectral_radius(spectral.lookahead_operator(matrix, k, alpha)) < 1


@pytest.mark.parametrize("k", [2, 3, 5, 10])
def test_small_steps_contract_exactly_below_the_threshold_of_alpha(k: int) -> None:
    threshold = 1 - 1 / k
    for alpha, contracts in ((threshold - 0.01, True), (threshold + 0.01, False)):
        radius = spectral.spectral_radius(spectral.lookahead_operator(one(1e-3, "gda"), k, alpha))
        assert (radius < 1) is contracts


def test_k_one_never_converges_on_a_bilinear_game() -> None:
    for alpha in (0.01, 0.5, 1.0):
        assert spectral.spectral_radius(spectral.lookahead_operator(one(0.1, "gda"), 1, alpha)) > 1


@pytest.mark.parametrize(
    ("step", "alpha", "k", "rate"),
    [(0.1, 0.5, 31, 0.924580), (0.3, 0.5, 10, 0.887673), (0.3, 0.3, 11, 0.871863)],
)
def test_suggested_k_is_the_best_one(step: float, alpha: float, k: int, rate: float) -> None:
    suggestion = spectral.suggest_k(step, 1.0, 1.0, alpha)
    assert suggestion.k == k
    assert suggestion.rate == pytest.approx(rate, abs=1e-6)
    assert abs(suggestion.k - math.pi / math.atan(step)) < 3


def test_suggested_k_minimises_the_worst_case_of_a_range() -> None:
    suggestion = spectral.suggest_k(0.1, 0.5, 2.0, num_samples=16)
    sigmas = torch.logspace(math.log10(0.5), math.log10(2.0), 16, dtype=torch.float64).tolist()

    def worst(k: int) -> float:
        values = (abs(0.5 + 0.5 * (1 + 0.1j * sigma) ** k) ** (1 / k) for sigma in sigmas)
        return max(values)

    assert suggestion.k == min(range(1, 200), key=worst)
    assert suggestion.rate == pytest.approx(worst(suggestion.k), rel=1e-12)


class LinearGame:
    """A general-sum game of three players with a linear field v(z) = J z."""

    sizes = (2, 1, 2)

    def __init__(self, jacobian: Tensor, start: Tensor) -> None:
        self.jacobian = jacobian
        self.parts = [part.clone().requires_grad_() for part in start.split(self.sizes)]

    def z(self) -> Tensor:
        return torch.cat([part.detach() for part in self.parts])

    def fill(self) -> None:
        for part, gradient in zip(
            self.parts, (self.jacobian @ self.z()).split(self.sizes), strict=True
        ):
            part.grad = gradient.clone()


@pytest.fixture
def jacobian() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    random = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    return 0.4 * torch.eye(5, dtype=torch.float64) + (random - random.T)


@pytest.mark.parametrize(
    ("method", "k", "alpha"),
    [
        ("gda", 1, 1.0),
        ("gda", 4, 0.5),
        ("gda", (2, 6), (0.5, 0.7)),
        ("eg", 1, 1.0),
        ("eg", 4, 0.5),
        ("eg", (2, 6), (0.5, 0.7)),
        ("ogda", 1, 1.0),
        ("ogda", 4, 0.5),
        ("ogda", (2, 6), (0.5, 0.7)),
    ],
)
def test_implemented_methods_are_their_operators(
    jacobian: Tensor, method: Any, k: Any, alpha: Any
) -> None:
    """A period of the real optimizers, applied to every basis vector, is the predicted matrix."""
    lr, period = 0.1, k if isinstance(k, int) else k[-1]
    round_operator = spectral.operator(jacobian, method, lr)
    kept = 5 if method == "ogda" else 0  # the previous update is state, which is not stepped back
    predicted = spectral.lookahead_operator(round_operator, k, alpha, kept=kept)
    columns = []
    for basis in torch.eye(5, dtype=torch.float64):
        game = LinearGame(jacobian, basis)
        base = [torch.optim.SGD([part], lr=lr) for part in game.parts]
        players: list[Any] = (
            [Optimistic(o, first="zero") for o in base] if method == "ogda" else base
        )
        la = LookaheadMinmax(players, k=k, alpha=alpha)
        eg = ExtraGradient(base)
        for _ in range(period):
            if method == "eg":
                eg.round(game.fill)
            else:
                game.fill()
                for player in players:
                    player.step()
            la.step()
        columns.append(game.z())
    measured = torch.stack(columns, 1)
    # first="zero" starts from u_0 = 0, that is z_{-1} with J z_{-1} = 0
    torch.testing.assert_close(measured, predicted[:5, :5], rtol=1e-12, atol=1e-13)


def test_ogda_converges_at_its_predicted_rate(jacobian: Tensor) -> None:
    radius = spectral.spectral_radius(spectral.operator(jacobian, "ogda", 0.1))
    game = LinearGame(jacobian, torch.ones(5, dtype=torch.float64))
    players = [Optimistic(torch.optim.SGD([part], lr=0.1)) for part in game.parts]
    norms = []
    for _ in range(2000):
        game.fill()
        for player in players:
            player.step()
        norms.append(game.z().norm().item())
    measured = (norms[-1] / norms[-1001]) ** (1 / 1000)
    assert measured == pytest.approx(radius, rel=1e-3)


def test_stability_map_is_the_rate_per_round() -> None:
    rates = spectral.stability_map(torch.tensor([0.1, 0.3]), torch.tensor([5, 6]))
    assert rates.shape == (2, 2)
    assert rates[0, 1] == pytest.approx(0.965635, abs=1e-6)
    assert rates[1, 1] == pytest.approx(0.952070, abs=1e-6)


def test_rotation_frequency_finds_the_leading_eigenvalues(jacobian: Tensor) -> None:
    found = spectral.rotation_frequency(
        lambda z: jacobian @ z, torch.zeros(5, dtype=torch.float64), num_eigenvalues=5
    )
    expected = torch.linalg.eigvals(jacobian)

    def key(value: complex) -> tuple[float, float]:
        return round(value.real, 8), round(value.imag, 8)

    assert sorted(map(key, found.tolist())) == sorted(map(key, expected.tolist()))


def test_rotation_frequency_of_a_larger_game_in_fewer_steps() -> None:
    sigma = torch.linspace(0.1, 1.0, 100, dtype=torch.float64)
    sigma[-1] = 5.0

    def field(z: Tensor) -> Tensor:
        return torch.cat([sigma * z[100:], -sigma * z[:100]])

    point = torch.zeros(200, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    found = spectral.rotation_frequency(field, point, num_eigenvalues=2, generator=generator)
    assert sorted(value.imag for value in found.tolist()) == pytest.approx([-5.0, 5.0], rel=1e-8)


def test_bad_input_is_refused() -> None:
    square = torch.eye(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="must be square"):
        spectral.operator(torch.zeros(2, 3), "gda", 0.1)
    with pytest.raises(ValueError, match="method must be one of"):
        spectral.operator(square, "newton", 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"split must be inside \(0, 2\), got 2"):
        spectral.operator(square, "alt", 0.1, split=2)
    with pytest.raises(ValueError, match="k has 2 levels, alpha has 1"):
        spectral.lookahead_operator(square, [2, 4], [0.5])
    with pytest.raises(ValueError, match="multiple of the one below"):
        spectral.lookahead_operator(square, [2, 5], 0.5)
    with pytest.raises(ValueError, match="sigma_min <= sigma_max"):
        spectral.suggest_k(0.1, 2.0, 1.0)
    with pytest.raises(ValueError, match="alpha in"):
        spectral.suggest_k(0.1, 1.0, 1.0, alpha=0.0)
    with pytest.raises(ValueError, match="must be a vector"):
        spectral.rotation_frequency(lambda z: z, torch.zeros(2, 2))


@pytest.mark.parametrize(("k", "alpha"), [(5, 0.5), (9, 0.3)])
def test_suggested_rate_of_the_optimistic_method_is_the_measured_one(k: int, alpha: float) -> None:
    """The previous update is kept at a synchronisation, so the eigenvalue map alone is not the rate."""
    turn = torch.tensor([[0.0, 0.3], [-0.3, 0.0]], dtype=torch.float64)
    part = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    optimizer = Optimistic(torch.optim.SGD([part], lr=1.0))
    la = LookaheadMinmax(optimizer, k=k, alpha=alpha)
    state = []
    for _ in range(8 * k):
        part.grad = turn @ part.detach()
        before = part.detach().clone()
        optimizer.step()
        if la.step():
            state.append(torch.cat([part.detach(), before]))
    # the last synchronised points (z, u) span the space: fit the period's matrix to them
    x, y = torch.stack(state[:4], 1), torch.stack(state[1:5], 1)
    measured = torch.linalg.eigvals(y @ torch.linalg.inv(x)).abs().max().item()
    rate = spectral.stability_map(torch.tensor([0.3]), torch.tensor([k]), alpha, "ogda").item()
    assert measured ** (1 / k) == pytest.approx(rate, rel=1e-6)


def test_suggested_k_of_the_optimistic_method_minimises_its_matrix() -> None:
    jacobian = spectral.bilinear_jacobian(torch.eye(1, dtype=torch.float64))
    matrix = spectral.operator(jacobian, "ogda", 0.3)
    rates = {}
    for k in range(1, 40):
        power = torch.linalg.matrix_power(matrix, k)
        power[:2] = 0.5 * torch.eye(4, dtype=torch.float64)[:2] + 0.5 * power[:2]
        rates[k] = torch.linalg.eigvals(power).abs().max().item() ** (1 / k)
    found = spectral.suggest_k(0.3, 1.0, 1.0, method="ogda", k_max=39)
    assert found.k == min(rates, key=lambda k: rates[k])
    assert found.rate == pytest.approx(rates[found.k], rel=1e-12)


def test_rotation_frequency_of_players_is_that_of_their_joint_field() -> None:
    generator = torch.Generator().manual_seed(0)
    p, b, q = (torch.randn(3, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    p, q = p @ p.T, q @ q.T
    x, y, unused = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    players = {
        "x": torch.optim.SGD([x], lr=0.1),
        "y": torch.optim.SGD([y, unused], lr=0.1, maximize=True),
    }

    def value() -> Tensor:
        return x @ p @ x / 2 + x @ b @ y - y @ q @ y / 2

    jacobian = torch.cat([torch.cat([p, b], 1), torch.cat([-b.T, q], 1)])
    expected = sorted(torch.linalg.eigvals(jacobian).abs().tolist())
    by_name = spectral.rotation_frequency(
        lambda: {"y": value(), "x": value()}, players, num_eigenvalues=6, generator=generator
    )
    assert sorted(by_name.abs().tolist()) == pytest.approx(expected, rel=1e-8)
    in_order = spectral.rotation_frequency(lambda: [value(), value()], players, num_eigenvalues=2)
    assert max(in_order.abs().tolist()) == pytest.approx(expected[-1], rel=1e-8)
    with pytest.raises(ValueError, match="1 losses for 2 players"):
        spectral.rotation_frequency(lambda: [value()], players)
    with pytest.raises(KeyError, match="'z'"):
        spectral.rotation_frequency(lambda: {"x": value(), "z": value()}, players)


def test_rotation_frequency_of_linear_losses_is_zero() -> None:
    x = torch.ones(2, requires_grad=True)
    found = spectral.rotation_frequency(lambda: [x.sum()], torch.optim.SGD([x], lr=0.1))
    assert found.tolist() == [0]


def test_kept_coordinates_must_be_fewer_than_all() -> None:
    with pytest.raises(ValueError, match=r"kept must be in \[0, 2\)"):
        spectral.lookahead_operator(torch.eye(2), 2, 0.5, kept=2)
