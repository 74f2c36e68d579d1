"""Games have the solutions and fields that they claim, and the runner plays the methods exactly."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from lookahead_minmax import spectral
from lookahead_minmax.games import (
    Bilinear,
    Covariance,
    DiracGAN,
    Game,
    Linear,
    MatrixGame,
    Polymatrix,
    Quadratic,
    StochasticBilinear,
    run,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def shifted_identity(size: int = 4) -> Bilinear:
    return Bilinear(torch.eye(size, dtype=torch.float64), random(size), random(size, seed=1))


GAMES: dict[str, Any] = {
    "bilinear": shifted_identity(),
    "rectangle": Bilinear(random(3, 3), random(3, seed=1), random(3, seed=2)),
    "quadratic": Quadratic(torch.eye(3).double(), random(3, 2), 2 * torch.eye(2).double()),
    "polymatrix": Polymatrix((2, 3, 1), curvature=0.2),
    "stochastic": StochasticBilinear(5),
    "rock-paper-scissors": MatrixGame(
        torch.tensor([[0, 1.0, -1], [-1, 0, 1], [1, -1, 0]]).double()
    ),
    "pennies": MatrixGame(torch.tensor([[3.0, -1], [-2, 1]]).double()),
    "simplex": MatrixGame(torch.tensor([[3.0, -1], [-2, 1]]).double(), "simplex"),
    "dirac": DiracGAN(),
    "covariance": Covariance(torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()),
}


@pytest.mark.parametrize("name", [name for name in GAMES if name != "simplex"])
def test_the_field_vanishes_at_the_solution(name: str) -> None:
    game = GAMES[name]
    assert isinstance(game, Game)
    z = game.solution()[None]
    assert z.shape == (1, sum(game.players))
    torch.testing.assert_close(game.field(z), torch.zeros_like(z), rtol=0, atol=1e-9)
    assert game.distance(z).item() == pytest.approx(0, abs=1e-9)
    assert game.distance(z + 0.1 * random(*z.shape)).item() > 0


def test_players_at_the_simplex_solution_are_indifferent() -> None:
    game = GAMES["simplex"]
    z = game.solution()
    assert z.tolist() == pytest.approx([3 / 7, 4 / 7, 2 / 7, 5 / 7])
    v = game.field(z[None])[0]
    assert v[0].item() == pytest.approx(v[1].item())
    assert v[2].item() == pytest.approx(v[3].item())
    assert game.distance(z[None]).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["bilinear", "quadratic", "dirac", "covariance", "pennies"])
def test_the_field_is_the_gradient_of_the_payoff(name: str) -> None:
    game = GAMES[name]
    z = game.solution() + 0.3 * random(sum(game.players))
    x, y = (part.clone().requires_grad_() for part in z.split(game.players))
    if name == "bilinear":
        value = x @ y + random(4) @ x + random(4, seed=1) @ y
    elif name == "quadratic":
        value = x @ x / 2 + x @ random(3, 2) @ y - y @ y
    elif name == "dirac":
        value = -torch.log1p(torch.exp(-x * y)).sum()
    elif name == "covariance":
        v, w = x.view(2, 2), y.view(2, 2)
        value = (w @ game.covariance).trace() - (w @ v @ v.T).trace()
    else:
        value = x.softmax(0) @ game.payoffs @ y.softmax(0)
    g_x, g_y = torch.autograd.grad(value, (x, y))
    torch.testing.assert_close(
        game.field(z[None])[0], torch.cat([g_x, -g_y]), rtol=1e-12, atol=1e-13
    )


def test_jacobians_by_hand() -> None:
    half = torch.tensor([[0.0, 0.5], [-0.5, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(DiracGAN().jacobian(), half)
    linear = Linear(random(3, 3), random(3, seed=1), (1, 2))
    assert torch.equal(linear.jacobian(), random(3, 3))
    game = Polymatrix((2, 3), curvature=0.2)
    symmetric = (game.jacobian() + game.jacobian().T) / 2
    torch.testing.assert_close(symmetric, 0.2 * torch.eye(5, dtype=torch.float64))


def test_minibatch_field_is_the_sum_of_its_components() -> None:
    game, z = StochasticBilinear(6), random(2, 12)
    batch = torch.tensor([[0, 3, 3], [5, 1, 2]])
    expected = torch.zeros_like(z)
    for row in range(2):
        for index in batch[row].tolist():
            x, y = z[row, :6], z[row, 6:]
            expected[row, :6] += game.a[index]
            expected[row, index] += y[index]
            expected[row, 6:] -= game.b[index]
            expected[row, 6 + index] -= x[index]
    torch.testing.assert_close(game.field(z, batch), expected)
    every = torch.arange(6).expand(2, 6)
    torch.testing.assert_close(game.field(z, every), game.field(z))


@pytest.mark.parametrize("method", ["gda", "alt", "eg", "ogda"])
@pytest.mark.parametrize("lookahead", [None, (5, 0.5), [(3, 0.5), (9, 0.25)]])
def test_runner_plays_the_predicted_matrices(method: Any, lookahead: Any) -> None:
    game = Linear(GAMES["quadratic"].matrix, torch.zeros(5, dtype=torch.float64), (3, 2))
    levels = [] if lookahead is None else [lookahead] if isinstance(lookahead, tuple) else lookahead
    start, period = random(2, 5), levels[-1][0] if levels else 1
    if method == "ogda" and levels:
        # the state is (z, u_{t-1}): play the recursion by hand
        z, previous, slow = start, None, [start] * len(levels)
        for t in range(1, 2 * period + 1):
            g = game.field(z)
            z = z - 0.2 * g + 0.1 * (g if previous is None else previous)
            previous = g
            for level, (k, alpha) in enumerate(levels):
                if t % k == 0:
                    z = slow[level] + alpha * (z - slow[level])
                    slow = [z] * (level + 1) + slow[level + 1 :]
        expected = z
    elif method == "ogda":
        first = start - 0.1 * game.field(start)
        g = game.field(first)
        expected = first - 0.2 * g + 0.1 * game.field(start)
    else:
        step = spectral.operator(game.matrix, method, 0.1, split=3)
        if levels:
            step = spectral.lookahead_operator(step, [k for k, _ in levels], [a for _, a in levels])
        expected = start @ (step @ step).T
    result = run(game, method, lookahead=lookahead, steps=2 * period, lr=0.1, start=start)
    torch.testing.assert_close(result.z, expected, rtol=1e-12, atol=1e-13)
    assert result.distance.shape == (2 * period + 1, 2)


@pytest.mark.parametrize("method", ["adam", "extraadam"])
def test_runner_plays_torch_adam(method: Any) -> None:
    from lookahead_minmax import ExtraGradient, LookaheadMinmax

    game, start = GAMES["quadratic"], random(1, 5)
    part = start[0].clone().requires_grad_()
    optimizer = torch.optim.Adam([part], lr=0.05)
    la, eg = LookaheadMinmax(optimizer, k=3), ExtraGradient(optimizer)

    def fill() -> None:
        part.grad = game.field(part.detach()[None])[0]

    for _ in range(7):
        if method == "adam":
            fill()
            optimizer.step()
        else:
            eg.round(fill)
        la.step()
    result = run(game, method, lookahead=(3, 0.5), steps=7, lr=0.05, start=start)
    torch.testing.assert_close(result.z[0], part.detach(), rtol=1e-10, atol=1e-11)


def test_unrolled_steps_look_at_the_moved_opponent() -> None:
    game, z = GAMES["quadratic"], random(1, 5)
    x, y = z[0, :3], z[0, 3:]
    x_w, y_w = x, y
    for _ in range(4):
        x_w = x_w - 0.1 * game.field(torch.cat([x_w, y])[None])[0, :3]
        y_w = y_w - 0.1 * game.field(torch.cat([x, y_w])[None])[0, 3:]
    x_new = x - 0.1 * game.field(torch.cat([x, y_w])[None])[0, :3]
    y_new = y - 0.1 * game.field(torch.cat([x_w, y])[None])[0, 3:]
    result = run(game, "unrolled", steps=1, lr=0.1, start=z, unroll=4)
    torch.testing.assert_close(result.z[0], torch.cat([x_new, y_new]))
    assert result.oracle_calls.tolist() == [0, 10]


def test_contraction_of_a_sync_on_the_papers_bilinear_game() -> None:
    """Section 5.1: the distance shrinks by the predicted modulus from sync to sync."""
    game = Bilinear(torch.eye(100, dtype=torch.float64), random(100), random(100, seed=1))
    for k, alpha, modulus in ((6, 0.5, 0.744755), (6, 0.4, 0.719935), (6, 0.8, 1.019799)):
        result = run(game, lookahead=(k, alpha), steps=10 * k, lr=0.3, starts=5)
        # |x| and |y| mix over a period, their joint norm does not
        z = [run(game, lookahead=(k, alpha), steps=s * k, lr=0.3, starts=5).z for s in (9, 10)]
        norms = [(point - game.solution()).norm(dim=1) for point in z]
        ratios = norms[1] / norms[0]
        torch.testing.assert_close(ratios, torch.full_like(ratios, modulus), rtol=0, atol=1e-6)
        assert bool((result.distance[-1] < result.distance[0]).all()) is (modulus < 1)


def test_lookahead_converges_where_gradient_descent_diverges() -> None:
    game = shifted_identity(100)
    plain = run(game, steps=800, lr=0.3)
    ours = run(game, lookahead=(6, 0.5), steps=800, lr=0.3)
    assert plain.distance[-1].item() > 1e10
    assert ours.distance[-1].item() < 1e-12


def test_lookahead_approaches_the_solution_under_single_component_noise() -> None:
    """Section 5.2 in kind: n = 100, one component a step."""
    game = StochasticBilinear(100, seed=0)
    start = game.solution() * 0 + random(3, 200) * 0.1
    options: Any = {"steps": 5000, "start": start, "batch_size": 1}
    before = game.distance(start).mean()
    plain = run(game, lr=0.05, **options).distance[-1].mean()
    ours = run(game, lr=0.05, lookahead=(2450, 0.3), **options).distance[-1].mean()
    extra = run(game, "eg", lr=0.05, **options).distance[-1].mean()
    assert ours < before < plain
    assert extra > ours


def test_variance_reduction_converges_where_stochastic_extragradient_diverges() -> None:
    game = StochasticBilinear(20, seed=0)
    options: Any = {"steps": 3000, "lr": 0.3, "batch_size": 10, "starts": 3}
    before = run(game, **{**options, "steps": 0}).distance[0].mean()
    extra = run(game, "eg", **options).distance[-1].mean()
    reduced = run(game, "svre", **options).distance[-1].mean()
    assert reduced < 1e-10 * before
    assert extra > before


def test_oracle_calls_count_passes() -> None:
    game = StochasticBilinear(10)
    assert run(game, "eg", steps=2, batch_size=5).oracle_calls.tolist() == [0, 1, 2]
    assert run(game, "gda", steps=2).oracle_calls.tolist() == [0, 1, 2]
    assert run(game, "svre", steps=3, batch_size=5).oracle_calls.tolist() == [0, 3, 5, 8]


def test_a_seed_gives_the_same_run() -> None:
    runs = [run(StochasticBilinear(10), steps=20, batch_size=2, seed=s).z for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_covariance_gan_is_learned_with_lookahead() -> None:
    game = GAMES["covariance"]
    start = (game.solution() + 0.3 * random(8))[None]
    plain = run(game, steps=3000, lr=0.1, start=start)
    ours = run(game, steps=3000, lr=0.1, start=start, lookahead=(10, 0.5))
    assert ours.distance[-1].item() < 1e-6
    assert not plain.distance[-1].item() < 0.1


def test_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    eye, game = torch.eye(2).double(), shifted_identity()
    cases: list[tuple[Any, str]] = [
        (lambda: Linear(eye, random(3), (2, 1)), "do not fit"),
        (lambda: Linear(eye, random(2), (2, 1)), "do not fit"),
        (lambda: Bilinear(random(2)), "matrix must be a matrix"),
        (lambda: Bilinear(random(2, 3)), "do not fit"),
        (lambda: Quadratic(eye, random(2, 3), eye), r"q \(3, 3\)"),
        (lambda: StochasticBilinear(0), "n must be at least 1"),
        (lambda: MatrixGame(eye, "logit"), "parametrisation must be"),
        (lambda: MatrixGame(torch.tensor([[0.0, 0.0], [1.0, 1.0]])).solution(), "not mixed"),
        (lambda: Covariance(torch.tensor([[1.0, 2.0], [0.0, 1.0]])), "symmetric"),
        (lambda: run(game, "newton"), "method must be one of"),
        (lambda: run(game, "svre"), "give batch_size"),
        (lambda: run(game, lr=0.0), "lr > 0"),
        (lambda: run(game, steps=-1), "steps >= 0"),
        (lambda: run(game, lookahead=(0, 0.5)), "k must be at least 1"),
        (lambda: run(game, lookahead=(2, 1.5)), "alpha must be in"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"lookahead-minmax\[games\]"):
        GAMES["pennies"].solution()


def test_only_one_player_is_unrolled() -> None:
    game, z = GAMES["quadratic"], random(1, 5)
    x, y = z[0, :3], z[0, 3:]
    y_w = y
    for _ in range(4):
        y_w = y_w - 0.1 * game.field(torch.cat([x, y_w])[None])[0, 3:]
    x_new = x - 0.1 * game.field(torch.cat([x, y_w])[None])[0, :3]
    y_new = y - 0.1 * game.field(z)[0, 3:]
    result = run(game, "unrolled", steps=1, lr=0.1, start=z, unroll=4, unroll_only=1)
    torch.testing.assert_close(result.z[0], torch.cat([x_new, y_new]))
    assert result.oracle_calls.tolist() == [0, 6]


def test_unrolled_y_contracts_on_the_papers_game_as_its_matrix() -> None:
    """x sees y after s steps: x' = (1 - s eta^2) x - eta y, y' = y + eta x; modulus sqrt(det)."""
    game = Bilinear(torch.eye(1, dtype=torch.float64))
    matrix = torch.tensor([[1 - 6 * 0.09, -0.3], [0.3, 1]], dtype=torch.float64)
    start = random(3, 2)
    result = run(game, "unrolled", steps=20, lr=0.3, start=start, unroll=6, unroll_only=1)
    expected = start @ torch.linalg.matrix_power(matrix, 20).T
    torch.testing.assert_close(result.z, expected, rtol=1e-11, atol=1e-14)


def test_alternating_players_draw_a_minibatch_each() -> None:
    game, start = StochasticBilinear(6), random(1, 12)
    result = run(game, "alt", steps=1, lr=0.1, start=start, batch_size=2, seed=3)
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.randint(6, (1, 2), generator=generator) for _ in range(2))
    z = start.clone()
    z[:, 6:] -= 0.1 * game.field(z, first)[:, 6:]
    z[:, :6] -= 0.1 * game.field(z, second)[:, :6]
    torch.testing.assert_close(result.z, z)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"unroll_only": 2}, r"must be in 0\.\.1"),
    ],
)
def test_runner_refuses_counts_out_of_range(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(StochasticBilinear(4), **options)


@pytest.mark.parametrize(
    "start", [torch.ones(12).double(), torch.ones(1, 11).double(), torch.ones(1, 12)]
)
def test_runner_refuses_starts_that_do_not_fit(start: Tensor) -> None:
    with pytest.raises(ValueError, match=r"start must be \(starts, 12\) of torch.float64"):
        run(StochasticBilinear(6), start=start)
