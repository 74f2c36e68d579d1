"""LookaheadMinmax: the exact numbers of Algorithm 1, its options, and its manners as an optimizer's guest."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import BilinearGame
from torch import nn

from lookahead_minmax import Lookahead, LookaheadMinmax, UniformK


def test_simultaneous_two_rounds_of_f_xy_give_the_exact_point() -> None:
    for dtype in (torch.float32, torch.float64):
        game = BilinearGame(dtype=dtype)
        la = LookaheadMinmax(game.players, k=2, alpha=0.5)
        reached = []
        for _ in range(2):
            game.simultaneous()
            reached.append(la.step())
        assert reached == [0, 1]
        assert game.point() == (0.875, 0.5)


@pytest.mark.parametrize(
    ("ratio", "k", "rounds", "expected"), [(1, 1, 1, (0.875, 0.25)), (2, 2, 2, (0.375, 0.75))]
)
def test_joint_synchronisation_counts_rounds_of_the_game(
    ratio: int, k: int, rounds: int, expected: tuple[float, float]
) -> None:
    game = BilinearGame()
    la = LookaheadMinmax(game.players, k=k)
    for _ in range(rounds):
        game.alternating(ratio)
        la.step()
    assert game.point() == expected


@pytest.mark.parametrize(
    ("ratio", "k", "rounds", "expected"), [(1, 1, 1, (0.9375, 0.25)), (2, 2, 2, (0.65625, 0.875))]
)
def test_two_separate_lookaheads_are_another_algorithm(
    ratio: int, k: int, rounds: int, expected: tuple[float, float]
) -> None:
    game = BilinearGame()
    game.opt_x, game.opt_y = Lookahead(game.opt_x, k=k), Lookahead(game.opt_y, k=k)
    for _ in range(rounds):
        game.alternating(ratio)
    assert game.point() == expected


@pytest.mark.parametrize("k", [1, 2, 3, 7])
@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0])
def test_a_period_multiplies_z_by_the_complex_factor(k: int, alpha: float) -> None:
    """On f = xy, z = x + iy obeys z <- (1 - a + a (1 + i eta)^k) z."""
    game = BilinearGame(lr=0.3, start=(0.7, -0.4))
    la = LookaheadMinmax(game.players, k=k, alpha=alpha)
    z = complex(0.7, -0.4)
    for _ in range(4):
        for _ in range(k):
            game.simultaneous()
            la.step()
        z *= 1 - alpha + alpha * (1 + 0.3j) ** k
        assert complex(*game.point()) == pytest.approx(z, rel=1e-13)


def test_nested_levels_are_lookahead_of_lookahead() -> None:
    game = BilinearGame(lr=0.3)
    la = LookaheadMinmax(game.players, k=[3, 9], alpha=[0.5, 0.25])
    levels = []
    for _ in range(18):
        game.simultaneous()
        levels.append(la.step())
    inner = 0.5 + 0.5 * (1 + 0.3j) ** 3
    expected = (0.75 + 0.25 * inner**3) ** 2
    assert complex(*game.point()) == pytest.approx(expected, rel=1e-13)
    assert levels == [0, 0, 1, 0, 0, 1, 0, 0, 2] * 2


def test_first_sync_mode_makes_the_first_synchronisation_the_identity() -> None:
    game, plain = BilinearGame(), BilinearGame()
    la = LookaheadMinmax(game.players, k=2, slow_init="first_sync")
    for _ in range(2):
        game.simultaneous()
        la.step()
        plain.simultaneous()
    assert game.point() == plain.point()
    for _ in range(2):
        game.simultaneous()
        la.step()
    z = complex(*plain.point()) * (0.5 + 0.5 * (1 + 0.5j) ** 2)
    assert complex(*game.point()) == pytest.approx(z, rel=1e-13)


OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (torch.optim.Adam, {"lr": 0.1}),
    (torch.optim.Adam, {"lr": 0.1, "foreach": True}),
    (torch.optim.Adam, {"lr": 0.1, "fused": True}),
    (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    (torch.optim.RMSprop, {"lr": 0.01}),
    (torch.optim.RAdam, {"lr": 0.1}),
]


@pytest.mark.parametrize(("make", "options"), OPTIMIZERS)
@pytest.mark.parametrize("slow_init", ["start", "first_sync"])
def test_alpha_one_is_the_base_method_bit_for_bit(
    make: Any, options: dict[str, Any], slow_init: Any
) -> None:
    game, plain = (
        BilinearGame(make, start=(1.0, 0.3), dtype=torch.float32, **options) for _ in "ab"
    )
    la = LookaheadMinmax(game.players, k=3, alpha=1.0, slow_init=slow_init)
    for _ in range(50):
        game.simultaneous()
        la.step()
        plain.simultaneous()
    assert game.point() == plain.point()


def test_foreach_and_loop_agree_bit_for_bit() -> None:
    results = []
    for foreach in (True, False):
        torch.manual_seed(0)
        weights = [torch.randn(5, 3, requires_grad=True) for _ in range(4)]
        la = LookaheadMinmax(torch.optim.SGD(weights, lr=0.1), k=2, foreach=foreach)
        for _ in range(5):
            for weight in weights:
                weight.grad = torch.sin(weight.detach())
            la.players["0"][0].step()
            la.step()
        results.append(torch.cat([weight.detach() for weight in weights]))
    assert torch.equal(*results)


def test_alpha_per_player() -> None:
    game = BilinearGame()
    la = LookaheadMinmax(game.players, k=2, alpha={"x": 1.0, "y": 0.25})
    for _ in range(2):
        game.simultaneous()
        la.step()
    assert game.point() == (0.75, 0.25)  # the fast point is (0.75, 1)
    assert la.alpha == {"x": 1.0, "y": 0.25}


def test_storage_is_kept_and_a_stale_graph_is_refused() -> None:
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    la = LookaheadMinmax(optimizer, k=1)
    pointer = weight.data_ptr()
    loss = (weight**2).sum()
    weight.grad = torch.ones(3)
    la.players["0"][0].step()
    la.step()
    assert weight.data_ptr() == pointer
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_slow_weights_are_those_before_the_first_step_even_after_a_move() -> None:
    layer = nn.Linear(2, 2)
    la = LookaheadMinmax(torch.optim.SGD(layer.parameters(), lr=0.1), k=2)
    with torch.no_grad():
        layer.weight.fill_(3.0)  # e.g. an initialisation after the optimizer was wrapped
    layer.to("cpu", torch.float32)
    layer.weight.grad = torch.ones(2, 2)
    la.players["0"][0].step()
    assert torch.equal(next(la.slow_parameters()), torch.full((2, 2), 3.0))


def test_exactly_one_extra_copy_per_level() -> None:
    weight = torch.zeros(1000, requires_grad=True)
    la = LookaheadMinmax(torch.optim.SGD([weight], lr=0.1), k=[2, 4])
    weight.grad = torch.ones(1000)
    la.players["0"][0].step()
    la.step()
    copies = [t for level in (1, 2) for t in la.slow_parameters(level=level)]
    assert sum(t.numel() * t.element_size() for t in copies) == 2 * 4000
    assert len({t.data_ptr() for t in [weight, *copies]}) == 3


# -- attach, callbacks, periods ------------------------------------------------------------------


def test_attached_player_ends_the_rounds() -> None:
    attached, explicit = BilinearGame(), BilinearGame()
    la = LookaheadMinmax(attached.players, k=2)
    handle = la.attach("x")
    other = LookaheadMinmax(explicit.players, k=2)
    for _ in range(3):
        attached.alternating(2)
        explicit.alternating(2)
        other.step()
    assert attached.point() == explicit.point()
    assert la.rounds == 3
    with pytest.raises(RuntimeError, match="two clocks"):
        la.step()
    with pytest.raises(RuntimeError, match="two clocks"):
        la.attach("y")
    handle.remove()
    handle.remove()
    attached.alternating(2)
    assert la.rounds == 3
    assert la.step() == 1


def test_step_that_the_grad_scaler_skips_ends_no_round() -> None:
    game = BilinearGame(dtype=torch.float32)
    la = LookaheadMinmax(game.players, k=1)
    la.attach("x")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(game.x * torch.inf).backward()
    scaler.step(game.opt_x)
    scaler.update()
    assert la.rounds == 0
    game.opt_x.zero_grad()
    scaler.scale(game.x * 1.0).backward()
    scaler.step(game.opt_x)
    assert la.rounds == 1


def test_on_sync_calls_back_at_its_level_only_and_can_be_removed() -> None:
    game = BilinearGame()
    la = LookaheadMinmax(game.players, k=[1, 2])
    calls: list[str] = []
    la.on_sync(lambda: calls.append("inner"))
    outer = la.on_sync(lambda: calls.append("outer"), level=2)
    for _ in range(2):
        la.step()
    outer.remove()
    la.sync()
    assert calls == ["inner", "inner", "outer", "inner"]


def test_random_periods_count_since_the_last_synchronisation() -> None:
    la = LookaheadMinmax(BilinearGame().players, k=UniformK(2, 6, seed=3))
    twin = UniformK(2, 6, seed=3)
    gaps, gap = [], 0
    for _ in range(60):
        gap += 1
        if la.step():
            gaps.append(gap)
            gap = 0
    assert gaps == [twin.sample() for _ in gaps]
    assert len(set(gaps)) > 2


def test_k_and_alpha_can_change_between_rounds() -> None:
    la = LookaheadMinmax(BilinearGame().players, k=5, alpha=0.5)
    la.step()
    la.k = 2
    assert la.step() == 1
    la.alpha = 0.25
    assert (la.k, la.alpha) == (2, 0.25)
    nested = LookaheadMinmax(BilinearGame().players, k=[2, 4], alpha=[0.5, 0.25])
    assert (nested.k, nested.alpha) == ([2, 4], [0.5, 0.25])
    with pytest.raises(ValueError, match="must keep its 1 levels"):
        la.k = [2, 4]
    assert la.k == 2


def test_manual_sync_and_reset() -> None:
    game = BilinearGame()
    la = LookaheadMinmax(game.players, k=[10, 20])
    game.simultaneous()
    la.step()
    la.sync(1)
    assert game.point() == (1.0, 0.25)
    assert la.since_sync == 0
    la.reset()
    assert la.rounds == 0
    assert [t.item() for t in la.slow_parameters()] == [1.0, 0.25]


# -- evaluation with slow weights ------------------------------------------------------------------


def test_slow_weights_are_in_place_inside_and_gone_after_also_on_an_error() -> None:
    game = BilinearGame()
    la = LookaheadMinmax(game.players, k=5)
    game.simultaneous()
    la.step()
    with la.slow_weights():
        assert game.point() == (1.0, 0.0)
    assert game.point() == (1.0, 0.5)
    with la.slow_weights("y"):
        assert game.point() == (1.0, 0.0)
    with la.slow_weights(["x"]):
        assert game.point() == (1.0, 0.5)
    with pytest.raises(ZeroDivisionError), la.slow_weights():
        raise ZeroDivisionError
    assert game.point() == (1.0, 0.5)


def test_slow_weights_of_level_two() -> None:
    game = BilinearGame()
    la = LookaheadMinmax(game.players, k=[1, 4])
    game.simultaneous()
    assert la.step() == 1
    with la.slow_weights(level=2):
        assert game.point() == (1.0, 0.0)
    assert game.point() == (1.0, 0.25)


def test_training_inside_slow_weights_is_refused() -> None:
    game = BilinearGame()
    la = LookaheadMinmax(game.players)
    with la.slow_weights():
        with pytest.raises(RuntimeError, match="entered already"), la.slow_weights():
            pass
        with pytest.raises(RuntimeError, match="inside slow_weights"):
            la.step()
        game.fill()
        with pytest.raises(RuntimeError, match="base optimizer stepped inside"):
            game.opt_x.step()
    game.simultaneous()
    la.step()


def test_slow_state_dict_holds_slow_parameters_and_live_buffers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    la = LookaheadMinmax(torch.optim.SGD(model.parameters(), lr=0.5), k=3)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(8, 2)).square().sum().backward()
    la.players["0"][0].step()
    la.step()
    slow = la.slow_state_dict(model)
    for name, value in model.state_dict().items():
        is_buffer = "running" in name or "num_batches" in name
        assert torch.equal(slow[name], value if is_buffer else before[name])
    assert not {v.data_ptr() for v in slow.values()} & {p.data_ptr() for p in model.parameters()}


def test_slow_state_dict_of_tied_weights_has_both_names() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    la = LookaheadMinmax(torch.optim.SGD(model.parameters(), lr=0.5), k=3)
    before = model["a"].weight.detach().clone()
    model["a"].weight.grad = torch.ones(2, 2)
    la.players["0"][0].step()
    slow = la.slow_state_dict(model)
    assert torch.equal(slow["a.weight"], before)
    assert torch.equal(slow["b.weight"], before)


# -- optimizer state and buffers ---------------------------------------------------------------------


def momentum_game(policy: Any) -> tuple[BilinearGame, LookaheadMinmax]:
    game = BilinearGame(lr=0.5, momentum=0.5)
    return game, LookaheadMinmax(game.players, k=2, state=policy)


def test_optimizer_state_is_kept_by_default() -> None:
    game, la = momentum_game("keep")
    for _ in range(2):
        game.simultaneous()
        momentum = game.opt_x.state[game.x]["momentum_buffer"].item()
        la.step()
    assert game.opt_x.state[game.x]["momentum_buffer"].item() == momentum


def test_optimizer_state_reset_starts_the_momentum_anew() -> None:
    game, la = momentum_game("reset")
    for _ in range(2):
        game.simultaneous()
        la.step()
    assert not game.opt_x.state
    game.simultaneous()
    assert game.opt_x.state[game.x]["momentum_buffer"] == game.x.grad


def test_optimizer_state_is_interpolated_with_its_last_value() -> None:
    game, la = momentum_game("interpolate")
    slow = 0.0
    for _ in range(3):
        for _ in range(2):
            game.simultaneous()
            fast = game.opt_y.state[game.y]["momentum_buffer"].item()
            la.step()
        slow += 0.5 * (fast - slow)
        assert game.opt_y.state[game.y]["momentum_buffer"].item() == pytest.approx(slow, rel=1e-14)


def test_adam_step_counter_is_never_interpolated() -> None:
    game = BilinearGame(torch.optim.Adam, lr=0.1)
    la = LookaheadMinmax(game.players, k=2, state="interpolate")
    for _ in range(4):
        game.simultaneous()
        la.step()
    assert game.opt_x.state[game.x]["step"].item() == 4


def normalised() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3, momentum=0.5)
    )
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("policy", ["keep", "interpolate"])
@pytest.mark.parametrize("as_mapping", [True, False])
def test_batch_norm_statistics_follow_the_policy_and_spectral_vectors_never(
    policy: Any, as_mapping: bool
) -> None:
    model, optimizer = normalised()
    modules: Any = {"0": model} if as_mapping else [model]
    la = LookaheadMinmax(optimizer, k=2, modules=modules, buffers=policy)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(16, 3)).square().sum().backward()
        optimizer.step()
        fast = {name: b.clone() for name, b in model.named_buffers()}
        la.step()
    for name, buffer in model.named_buffers():
        start = {"1.running_mean": torch.zeros(3), "1.running_var": torch.ones(3)}.get(name)
        if policy == "interpolate" and start is not None:
            torch.testing.assert_close(buffer, (start + fast[name]) / 2, rtol=0, atol=1e-7)
        else:
            assert torch.equal(buffer, fast[name])


# -- types and devices -------------------------------------------------------------------------------


def test_bfloat16_weights_keep_their_progress_in_a_float32_slow_copy() -> None:
    """slow 1, fast 1 + 2^-7, alpha 1/2: 1 + 2^-8 is no bfloat16 number."""
    weight = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    la = LookaheadMinmax(torch.optim.SGD([weight], lr=1.0), k=1)
    weight.grad = torch.full((1,), -(2.0**-7), dtype=torch.bfloat16)
    la.players["0"][0].step()
    la.step()
    (slow,) = la.slow_parameters()
    assert slow.dtype == torch.float32
    assert slow.item() == 1 + 2**-8
    narrow = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    la = LookaheadMinmax(torch.optim.SGD([narrow], lr=1.0), k=1, slow_dtype=torch.bfloat16)
    narrow.grad = weight.grad
    la.players["0"][0].step()
    la.step()
    assert next(la.slow_parameters()).item() == 1.0


def test_complex_weights() -> None:
    weight = torch.tensor([1 + 1j], requires_grad=True)
    la = LookaheadMinmax(torch.optim.SGD([weight], lr=1.0), k=1)
    weight.grad = torch.tensor([1j])
    la.players["0"][0].step()
    la.step()
    assert weight.item() == 1 + 0.5j


def test_sparse_gradients_work_since_weights_are_dense() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    before = table.weight.detach().clone()
    optimizer = torch.optim.SparseAdam(table.parameters(), lr=0.5)
    la = LookaheadMinmax(optimizer, k=1)
    table(torch.tensor([1])).sum().backward()
    optimizer.step()
    fast = table.weight.detach().clone()
    la.step()
    torch.testing.assert_close(table.weight.detach(), (before + fast) / 2)


def test_slow_copies_on_another_device_give_the_same_numbers() -> None:
    games = [BilinearGame(), BilinearGame()]
    las = [
        LookaheadMinmax(games[0].players, k=2),
        LookaheadMinmax(games[1].players, k=2, slow_device="cpu"),
    ]
    for _ in range(4):
        for game, la in zip(games, las, strict=True):
            game.simultaneous()
            la.step()
    assert games[0].point() == games[1].point()


def test_lbfgs_step_with_its_inner_evaluations_is_one_base_step() -> None:
    weight = torch.tensor([2.0, -1.0], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], lr=1.0, max_iter=5)
    la = LookaheadMinmax(optimizer, k=1)
    la.attach("0")

    def closure() -> float:
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    assert la.rounds == 1
    torch.testing.assert_close(weight.detach(), torch.tensor([1.0, -0.5]), rtol=0, atol=1e-5)


# -- groups, sharing, freezing ------------------------------------------------------------------------


def test_group_added_later_joins_with_its_current_value() -> None:
    a, b = (torch.ones(1, requires_grad=True) for _ in "ab")
    optimizer = torch.optim.SGD([a], lr=1.0)
    la = LookaheadMinmax(optimizer, k=2)
    a.grad = torch.ones(1)
    optimizer.step()
    la.step()
    optimizer.add_param_group({"params": [b]})
    a.grad, b.grad = torch.ones(1), torch.ones(1)
    optimizer.step()
    la.step()
    assert (a.item(), b.item()) == (0.0, 0.5)  # (1 + -1) / 2 and (1 + 0) / 2


def test_frozen_parameters_stay_where_they_are() -> None:
    a, b = (torch.ones(1, requires_grad=True) for _ in "ab")
    optimizer = torch.optim.SGD([a, b], lr=1.0)
    la = LookaheadMinmax(optimizer, k=1)
    b.requires_grad_(False)
    a.grad = torch.ones(1)
    optimizer.step()
    la.step()
    assert (a.item(), b.item()) == (0.5, 1.0)


def test_parameter_shared_by_two_players_is_pulled_back_once() -> None:
    shared = torch.ones(1, requires_grad=True)
    players = {name: torch.optim.SGD([shared], lr=1.0) for name in "ab"}
    la = LookaheadMinmax(players, k=1, alpha=0.5)
    shared.grad = torch.ones(1)
    players["a"].step()
    la.step()
    assert shared.item() == 0.5
    with pytest.raises(ValueError, match="share a parameter and have different alpha"):
        LookaheadMinmax(players, alpha={"a": 0.5, "b": 0.25})
    with pytest.raises(ValueError, match="share a parameter"):
        la.alpha = {"a": 0.5, "b": 0.25}
    assert la.alpha == 0.5


def test_order_of_players_and_grouping_of_parameters_do_not_matter() -> None:
    results = []
    for order in (("x", "y"), ("y", "x")):
        game = BilinearGame(torch.optim.Adam, lr=0.1)
        la = LookaheadMinmax({name: game.players[name] for name in order}, k=3)
        for _ in range(10):
            game.simultaneous()
            la.step()
        results.append(game.point())
    assert results[0] == results[1]


def test_player_of_several_optimizers() -> None:
    a, b = (torch.ones(1, requires_grad=True) for _ in "ab")
    la = LookaheadMinmax({"G": [torch.optim.SGD([a], lr=1.0), torch.optim.SGD([b], lr=2.0)]}, k=1)
    a.grad = b.grad = torch.ones(1)
    for optimizer in la.players["G"]:
        optimizer.step()
    la.step()
    assert (a.item(), b.item()) == (0.5, 0.0)


# -- saving ---------------------------------------------------------------------------------------------


def continue_run(game: BilinearGame, la: LookaheadMinmax, rounds: int) -> tuple[float, float]:
    for _ in range(rounds):
        game.alternating(2)
        la.step()
    return game.point()


@pytest.mark.parametrize("phase", range(9))
def test_resume_is_bit_exact_at_every_phase(phase: int) -> None:
    def build() -> tuple[BilinearGame, LookaheadMinmax]:
        game = BilinearGame(torch.optim.Adam, lr=0.1, dtype=torch.float32)
        return game, LookaheadMinmax(game.players, k=[3, 9], state="interpolate")

    game, la = build()
    continue_run(game, la, phase)
    file = io.BytesIO()
    saved = {
        "x": game.x.detach(),
        "y": game.y.detach(),
        "opt": [game.opt_x.state_dict(), game.opt_y.state_dict()],
        "la": la.state_dict(),
    }
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other, resumed = build()
    with torch.no_grad():
        other.x.copy_(loaded["x"])
        other.y.copy_(loaded["y"])
    other.opt_x.load_state_dict(loaded["opt"][0])
    other.opt_y.load_state_dict(loaded["opt"][1])
    resumed.load_state_dict(loaded["la"])
    assert continue_run(other, resumed, 14) == continue_run(game, la, 14)
    assert resumed.rounds == la.rounds


def test_resume_with_random_periods_draws_the_same_periods() -> None:
    la = LookaheadMinmax(BilinearGame().players, k=UniformK(2, 6, seed=1))
    for _ in range(7):
        la.step()
    other = LookaheadMinmax(BilinearGame().players, k=UniformK(2, 6, seed=99))
    other.load_state_dict(la.state_dict())
    assert [la.step() for _ in range(40)] == [other.step() for _ in range(40)]


def test_state_dict_in_a_fresh_process(tmp_path: Any) -> None:
    game = BilinearGame(dtype=torch.float32)
    la = LookaheadMinmax(game.players, k=3)
    continue_run(game, la, 2)
    torch.save({"point": game.point(), "la": la.state_dict()}, tmp_path / "state.pt")
    code = f"""
import sys, torch
sys.path.insert(0, {str(__file__.rpartition("/")[0])!r})
from conftest import BilinearGame
from lookahead_minmax import LookaheadMinmax
saved = torch.load({str(tmp_path / "state.pt")!r}, weights_only=True)
game = BilinearGame(start=saved["point"], dtype=torch.float32)
la = LookaheadMinmax(game.players, k=3)
la.load_state_dict(saved["la"])
for _ in range(2):
    game.alternating(2)
    la.step()
print(*game.point())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert tuple(map(float, out.stdout.split())) == continue_run(game, la, 2)


@pytest.mark.parametrize("phase", [0, 1, 4])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_independent_and_continue_alike(phase: int, how: str) -> None:
    game = BilinearGame(torch.optim.Adam, lr=0.1)
    la = LookaheadMinmax(game.players, k=3)
    continue_run(game, la, phase)
    both = (game, la)
    other, twin = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    before = game.point()
    after = continue_run(other, twin, 5)
    assert game.point() == before
    assert continue_run(game, la, 5) == after


def test_copy_of_an_attached_object_is_attached_to_the_copied_optimizer() -> None:
    game = BilinearGame()
    la = LookaheadMinmax(game.players, k=2)
    la.attach("x")
    other, twin = copy.deepcopy((game, la))
    other.alternating()
    assert (la.rounds, twin.rounds) == (0, 1)


def test_repr_shows_the_numbers() -> None:
    text = repr(LookaheadMinmax(BilinearGame().players, k=[2, 4], alpha=0.25))
    assert text == "LookaheadMinmax(x: SGD, y: SGD; k=[2, 4], alpha=[0.25, 0.25], rounds=0)"


# -- non-finite weights -----------------------------------------------------------------------------------


def poisoned(policy: Any) -> tuple[BilinearGame, LookaheadMinmax]:
    game = BilinearGame(torch.optim.Adam, lr=0.1, start=(1.0, 2.0))
    la = LookaheadMinmax(game.players, k=2, nonfinite=policy)
    game.simultaneous()
    with torch.no_grad():
        game.y.fill_(torch.nan)
    la.step()
    return game, la


def test_nonfinite_raise_names_player_and_parameter() -> None:
    _, la = poisoned("raise")
    with pytest.raises(FloatingPointError, match=r"parameter \(\) of player 'y' is not finite"):
        la.step()


def test_nonfinite_rollback_puts_all_players_back_and_warns_once() -> None:
    game, la = poisoned("rollback")
    with pytest.warns(UserWarning, match="went back to their slow weights"):
        assert la.step() == 0
    assert game.point() == (1.0, 2.0)
    assert not game.opt_x.state
    assert (la.rollbacks, la.since_sync) == (1, 0)
    with torch.no_grad():
        game.x.fill_(torch.inf)
    la.step()
    la.step()  # an unexpected warning would be an error
    assert game.point() == (1.0, 2.0)
    assert la.rollbacks == 2


def test_nonfinite_is_ignored_by_default() -> None:
    game, la = poisoned("ignore")
    assert la.step() == 1
    assert game.y.isnan()
    assert not game.x.isnan()


# -- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 0.0}, ValueError, r"alpha must be in \(0, 1\], got 0.0"),
        ({"alpha": 1.5}, ValueError, "got 1.5"),
        ({"alpha": float("nan")}, ValueError, "got nan"),
        ({"alpha": "a"}, TypeError, "alpha must be a number"),
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": 2.5}, TypeError, "k must be an int.*got 2.5"),
        ({"k": True}, TypeError, "k must be an int.*got True"),
        ({"k": []}, ValueError, "empty sequence"),
        ({"k": [2, 4], "alpha": [0.5]}, ValueError, "alpha has 1 values, k has 2 levels"),
        (
            {"k": [2, 5]},
            ValueError,
            "k of level 2 must be a larger multiple of k of level 1, got 5 and 2",
        ),
        ({"k": [4, 2]}, ValueError, "level 2"),
        ({"k": [2, 2]}, ValueError, "level 2"),
        ({"alpha": {"x": 0.5}}, KeyError, "the players are"),
        ({"alpha": {"x": 0.5, "z": 0.5}}, KeyError, "the players are"),
        ({"buffers": "interpolate"}, ValueError, "needs modules"),
        ({"buffers": "interpolate", "modules": [nn.ReLU()]}, ValueError, "modules has 1 entries"),
        ({"buffers": "interpolate", "modules": {"z": nn.ReLU()}}, KeyError, "no player 'z'"),
        ({"buffers": "drop"}, ValueError, "buffers must be one of"),
        ({"state": "drop"}, ValueError, "state must be one of"),
        ({"slow_init": "later"}, ValueError, "slow_init must be one of"),
        ({"nonfinite": "hide"}, ValueError, "nonfinite must be one of"),
        ({"slow_dtype": torch.int8}, ValueError, "slow_dtype must be a floating type"),
    ],
)
def test_bad_options_are_refused(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        LookaheadMinmax(BilinearGame().players, **options)


def test_bad_players_are_refused() -> None:
    optimizer = BilinearGame().opt_x
    empty = BilinearGame().opt_x
    empty.param_groups[0]["params"] = []
    cases: list[tuple[Any, Any, str]] = [
        ({}, ValueError, "players is empty"),
        ([], ValueError, "players is empty"),
        ({"G": empty}, ValueError, "owns no parameter"),
        ({"G": []}, ValueError, "owns no parameter"),
        ({"G": torch.optim.SGD}, TypeError, "the class SGD"),
        ({"G": nn.Linear(1, 1)}, TypeError, "got Linear"),
        ((o for o in [optimizer]), TypeError, "got generator"),
        ({"G": (o for o in [optimizer])}, TypeError, "got generator"),
        ("G", TypeError, "got str"),
        ({1: optimizer}, TypeError, "names must be strings"),
        ({"G": Lookahead(optimizer)}, ValueError, "Lookahead already"),
    ]
    for players, error, message in cases:
        with pytest.raises(error, match=message):
            LookaheadMinmax(players)


def test_integer_parameters_are_refused() -> None:
    counter = nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)
    with pytest.raises(ValueError, match=r"parameter of torch\.int64"):
        LookaheadMinmax(torch.optim.SGD([counter], lr=0.1))


def test_unknown_names_and_levels_are_refused() -> None:
    la = LookaheadMinmax(BilinearGame().players)
    with pytest.raises(KeyError, match="no player 'z'"):
        la.attach("z")
    with pytest.raises(KeyError, match="no player 'z'"), la.slow_weights("z"):
        pass
    with pytest.raises(ValueError, match=r"level must be in 1\.\.1, got 2"):
        la.sync(2)
    with pytest.raises(ValueError, match="got 0"):
        la.on_sync(print, level=0)


@pytest.mark.parametrize("change", ["shape", "dtype"])
def test_parameter_that_changed_shape_or_type_asks_for_a_reset(change: str) -> None:
    weight = torch.ones(2, requires_grad=True)
    la = LookaheadMinmax(torch.optim.SGD([weight], lr=0.1), k=1)
    la.step()
    weight.data = torch.ones(3) if change == "shape" else torch.ones(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        la.step()
    la.reset()
    assert la.step() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version: saved 2, here 1"),
        ({"k": [3, 9]}, "levels: saved 2, here 1"),
        ({"sampler": {}}, "one of saved and here is a sampler"),
        ({"options": {"state": "reset"}}, "options: saved"),
        ({"players": {}}, "players: saved"),
    ],
)
def test_state_of_another_game_is_refused_and_nothing_changes(change: Any, message: str) -> None:
    game = BilinearGame()
    la = LookaheadMinmax(game.players, k=3)
    game.simultaneous()
    la.step()
    before = copy.deepcopy(la.state_dict())
    with pytest.raises(ValueError, match=message):
        la.load_state_dict({**la.state_dict(), **change})
    assert str(la.state_dict()) == str(before)


def test_state_of_other_shapes_is_refused() -> None:
    def build(size: int) -> LookaheadMinmax:
        weight = torch.ones(size, requires_grad=True)
        return LookaheadMinmax({"G": torch.optim.SGD([weight], lr=0.1)})

    with pytest.raises(ValueError, match=r"shapes of 'G': saved \[\[3\]\], here \[\[2\]\]"):
        build(2).load_state_dict(build(3).state_dict())


def test_options_may_differ_without_strict() -> None:
    la = LookaheadMinmax(BilinearGame().players, state="reset")
    saved = LookaheadMinmax(BilinearGame().players).state_dict()
    with pytest.raises(ValueError, match="options"):
        la.load_state_dict(saved)
    la.load_state_dict(saved, strict=False)
