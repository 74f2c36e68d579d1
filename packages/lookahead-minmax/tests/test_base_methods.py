"""ExtraGradient and Optimistic against their formulas, around plain torch optimizers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import BilinearGame
from torch import Tensor

from lookahead_minmax import ExtraGradient, LookaheadMinmax, Optimistic


class QuadraticGame:
    """min_x max_y  x'Px/2 + x'By - y'Qy/2, whose field is linear, z -> J z."""

    def __init__(self, make: Any = torch.optim.SGD, **options: Any) -> None:
        options.setdefault("lr", 0.1)
        self.p = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=torch.float64)
        self.b = torch.tensor([[1.0, -0.5], [0.2, 0.8]], dtype=torch.float64)
        self.q = torch.tensor([[0.5, 0.0], [0.0, 1.5]], dtype=torch.float64)
        self.x = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
        self.y = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
        self.opt_x, self.opt_y = make([self.x], **options), make([self.y], **options)
        self.players = {"x": self.opt_x, "y": self.opt_y}

    def fill(self) -> None:
        with torch.no_grad():
            self.x.grad = self.p @ self.x + self.b @ self.y
            self.y.grad = self.q @ self.y - self.b.T @ self.x

    def jacobian(self) -> Tensor:
        top = torch.cat([self.p, self.b], 1)
        return torch.cat([top, torch.cat([-self.b.T, self.q], 1)])

    def z(self) -> Tensor:
        return torch.cat([self.x.detach(), self.y.detach()])


def test_extragradient_of_sgd_is_the_matrix_formula() -> None:
    game = QuadraticGame()
    eg = ExtraGradient(game.players)
    j = game.jacobian()
    step = torch.eye(4, dtype=torch.float64) - 0.1 * j + 0.01 * j @ j
    for _ in range(3):
        expected = step @ game.z()
        eg.round(game.fill)
        torch.testing.assert_close(game.z(), expected, rtol=1e-13, atol=1e-14)


def test_opponent_mode_is_the_gradient_at_ones_own_weights() -> None:
    game = QuadraticGame()
    eg = ExtraGradient(game.players, extrapolate="opponent")
    x, y = game.x.detach().clone(), game.y.detach().clone()
    x_half = x - 0.1 * (game.p @ x + game.b @ y)
    y_half = y - 0.1 * (game.q @ y - game.b.T @ x)
    eg.round(game.fill)
    torch.testing.assert_close(game.x.detach(), x - 0.1 * (game.p @ x + game.b @ y_half))
    torch.testing.assert_close(game.y.detach(), y - 0.1 * (game.q @ y - game.b.T @ x_half))


def test_modes_agree_on_a_bilinear_game_and_differ_on_a_quadratic_one() -> None:
    for game_type, agree in ((BilinearGame, True), (QuadraticGame, False)):
        ends = []
        for mode in ("all", "opponent"):
            game: Any = game_type(lr=0.2)
            eg = ExtraGradient(game.players, extrapolate=mode)
            for _ in range(3):
                eg.round(game.fill)
            ends.append(torch.cat([game.x.detach().reshape(-1), game.y.detach().reshape(-1)]))
        assert torch.allclose(*ends, rtol=1e-13) is agree


def extra_adam(rounds: int, state: str, lr: float = 0.1) -> Tensor:
    """Textbook ExtraAdam on the quadratic game; `state` as in ExtraGradient."""
    game = QuadraticGame()
    j, z = game.jacobian(), game.z()
    zeros = torch.zeros_like(z)
    moments = {"main": [zeros, zeros, 0], "second": [zeros, zeros, 0]}

    def update(which: str, gradient: Tensor, keep: bool) -> Tensor:
        m, v, t = moments[which]
        m, v, t = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2, t + 1
        if keep:
            moments[which] = [m, v, t]
        return lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)

    for _ in range(rounds):
        which = "second" if state == "separate" else "main"
        half = z - update(which, j @ z, keep=state != "frozen")
        z = z - update("main", j @ half, keep=True)
    return z


@pytest.mark.parametrize("state", ["shared", "separate", "frozen"])
def test_extra_adam_is_the_textbook_one(state: Any) -> None:
    game = QuadraticGame(torch.optim.Adam)
    eg = ExtraGradient(game.players, state=state)
    for _ in range(5):
        eg.round(game.fill)
    torch.testing.assert_close(game.z(), extra_adam(5, state), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("ratio", [1, 3])
def test_authors_round_with_a_ratio_of_discriminator_steps(ratio: int) -> None:
    """D_e takes r steps against G, G_e one against D; D then r against G_e, G one against D_e."""
    game = QuadraticGame()
    x, y = game.x.detach().clone(), game.y.detach().clone()

    def grad_x(x: Tensor, y: Tensor) -> Tensor:
        return game.p @ x + game.b @ y

    def grad_y(x: Tensor, y: Tensor) -> Tensor:
        return game.q @ y - game.b.T @ x

    y_ahead = y.clone()
    for _ in range(ratio):
        y_ahead = y_ahead - 0.1 * grad_y(x, y_ahead)
    x_ahead = x - 0.1 * grad_x(x, y)
    y_new = y.clone()
    for _ in range(ratio):
        y_new = y_new - 0.1 * grad_y(x_ahead, y_new)
    x_new = x - 0.1 * grad_x(x, y_ahead)

    eg = ExtraGradient(game.players, extrapolate="opponent")
    game.fill()
    gradient_x = game.x.grad
    for _ in range(ratio):
        game.fill()
        eg.extrapolate("y")
    game.x.grad = gradient_x
    eg.extrapolate("x")
    for _ in range(ratio):
        with eg.own_weights("y"):
            game.fill()
        eg.step("y")
    with eg.own_weights("x"):
        game.fill()
    eg.step("x")
    torch.testing.assert_close(game.x.detach(), x_new)
    torch.testing.assert_close(game.y.detach(), y_new)


def test_parameters_without_a_gradient_are_put_back_too() -> None:
    game = BilinearGame()
    eg = ExtraGradient(game.players)
    game.fill()
    eg.extrapolate()
    game.x.grad = None
    game.y.grad = -game.x.detach()
    half = game.x.item()
    eg.step()
    assert game.point() == (1.0, 0.5 * half)


def test_round_passes_the_closures_value_on_and_calls_it_as_documented() -> None:
    for mode, calls in (("all", 2), ("opponent", 3)):
        game = BilinearGame()
        seen: list[int] = []

        def closure(game: BilinearGame = game, seen: list[int] = seen) -> int:
            game.fill()
            seen.append(1)
            return len(seen)

        assert ExtraGradient(game.players, extrapolate=mode).round(closure) == calls  # type: ignore[arg-type]


def test_lookahead_around_extragradient_counts_rounds_not_half_steps() -> None:
    attached, explicit = BilinearGame(lr=0.3), BilinearGame(lr=0.3)
    la = LookaheadMinmax(attached.players, k=2)
    la.attach("y")
    other = LookaheadMinmax(explicit.players, k=2)
    eg, eg_explicit = ExtraGradient(attached.players), ExtraGradient(explicit.players)
    for _ in range(4):
        eg.round(attached.fill)
        eg_explicit.round(explicit.fill)
        other.step()
    factor = (1 + 0.3j - 0.09) ** 2
    assert la.rounds == 4
    assert attached.point() == explicit.point()
    assert complex(*attached.point()) == pytest.approx((0.5 + 0.5 * factor) ** 2, rel=1e-13)


def test_out_of_order_calls_are_refused() -> None:
    game = BilinearGame()
    la = LookaheadMinmax(game.players, k=1)
    eg = ExtraGradient(game.players, extrapolate="opponent")
    game.fill()
    with pytest.raises(RuntimeError, match=r"step\(\) of player 'x' without extrapolate"):
        eg.step()
    with pytest.raises(RuntimeError, match="without extrapolate"), eg.own_weights("x"):
        pass
    eg.extrapolate()
    with pytest.raises(RuntimeError, match="finish the round first"):
        la.step()
    with pytest.raises(RuntimeError, match="in the middle of a round"):
        eg.state_dict()
    eg.step("x")
    with pytest.raises(RuntimeError, match=r"extrapolate\(\) after step\(\) of player 'x'"):
        eg.extrapolate("x")
    eg.step("y")
    assert la.step() == 1
    with pytest.raises(KeyError, match="no player 'z'"):
        eg.step("z")
    with (
        pytest.raises(RuntimeError, match="belongs to"),
        ExtraGradient(game.players).own_weights("x"),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [({"extrapolate": "some"}, "extrapolate must be"), ({"state": "other"}, "state must be")],
)
def test_unknown_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExtraGradient(BilinearGame().players, **options)


@pytest.mark.parametrize("state", ["shared", "separate", "frozen"])
def test_extragradient_resumes_bit_for_bit(state: Any) -> None:
    game = QuadraticGame(torch.optim.Adam)
    eg = ExtraGradient(game.players, state=state)
    for _ in range(3):
        eg.round(game.fill)
    other = QuadraticGame(torch.optim.Adam)
    twin = ExtraGradient(other.players, state=state)
    with torch.no_grad():
        other.x.copy_(game.x)
        other.y.copy_(game.y)
    other.opt_x.load_state_dict(copy.deepcopy(game.opt_x.state_dict()))
    other.opt_y.load_state_dict(copy.deepcopy(game.opt_y.state_dict()))
    twin.load_state_dict(copy.deepcopy(eg.state_dict()))
    for _ in range(3):
        eg.round(game.fill)
        twin.round(other.fill)
    assert torch.equal(game.z(), other.z())
    with pytest.raises(ValueError, match="does not fit"):
        ExtraGradient(BilinearGame().players, extrapolate="opponent").load_state_dict(
            eg.state_dict()
        )


def test_extragradient_deepcopies_with_its_players() -> None:
    game = QuadraticGame(torch.optim.Adam)
    eg = ExtraGradient(game.players, state="separate")
    eg.round(game.fill)
    other, twin = copy.deepcopy((game, eg))
    start = game.z()
    twin.round(other.fill)
    assert torch.equal(game.z(), start)
    eg.round(game.fill)
    assert torch.equal(game.z(), other.z())


def test_zero_grad_clears_all_players() -> None:
    game = BilinearGame()
    game.fill()
    ExtraGradient(game.players).zero_grad()
    assert game.x.grad is None
    assert game.y.grad is None


# -- optimistic ------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["repeat", "zero"])
def test_optimistic_sgd_is_ogda(first: Any) -> None:
    game = QuadraticGame()
    players = [Optimistic(game.opt_x, first=first), Optimistic(game.opt_y, first=first)]
    j, z = game.jacobian(), game.z()
    previous = j @ z if first == "repeat" else torch.zeros_like(z)
    for _ in range(6):
        gradient = j @ z
        z = z - 2 * 0.1 * gradient + 0.1 * previous
        previous = gradient
        game.fill()
        for player in players:
            player.step()
    torch.testing.assert_close(game.z(), z, rtol=1e-12, atol=1e-13)


def test_optimistic_adam_uses_adams_own_updates() -> None:
    weight = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    optimizer = Optimistic(torch.optim.Adam([weight], lr=0.1))
    z = weight.detach().clone()
    shadow = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([shadow], lr=0.1)
    previous: Tensor | None = None
    for _ in range(5):
        gradient = torch.cos(z)
        before = shadow.detach().clone()
        shadow.grad = gradient.clone()
        adam.step()
        update = before - shadow.detach()
        z = z - 2 * update + (update if previous is None else previous)
        previous = update
        weight.grad = torch.cos(weight.detach())
        optimizer.step()
    torch.testing.assert_close(weight.detach(), z, rtol=1e-12, atol=1e-13)


def test_previous_update_is_a_value_and_survives_zeroed_gradients() -> None:
    """An alias of `.grad` with in-place zeroing would turn the method into plain descent."""
    ends = []
    for set_to_none in (True, False):
        game = BilinearGame(lr=0.3)
        players = [Optimistic(game.opt_x), Optimistic(game.opt_y)]
        for _ in range(200):
            for player in players:
                player.zero_grad(set_to_none)
            y, x = game.y.detach(), game.x.detach()
            (game.x * y).backward()
            (-game.y * x).backward()
            for player in players:
                player.step()
        ends.append(abs(complex(*game.point())))
    assert ends[0] == ends[1] < 0.01


def test_optimistic_joins_lookahead_minmax() -> None:
    game = BilinearGame(lr=0.3)
    players = [Optimistic(game.opt_x), Optimistic(game.opt_y)]
    la = LookaheadMinmax(players, k=5)
    for _ in range(200):
        game.fill()
        for player in players:
            player.step()
        la.step()
    assert abs(complex(*game.point())) < 1e-3


def test_optimistic_refuses_bad_input() -> None:
    game = BilinearGame()
    with pytest.raises(ValueError, match="first must be 'repeat' or 'zero', got 'last'"):
        Optimistic(game.opt_x, first="last")  # type: ignore[arg-type]
    optimizer = Optimistic(game.opt_x)
    game.simultaneous()
    optimizer.step()
    saved = optimizer.state_dict()
    weight = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"shapes differ at positions \[0\]"):
        Optimistic(torch.optim.SGD([weight], lr=0.1)).load_state_dict(saved)
    assert "first='repeat', SGD" in repr(optimizer)
