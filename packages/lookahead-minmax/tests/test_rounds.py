"""Where a run begins, when levels are due, and what a rollback leaves behind."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lookahead_minmax import EMA, ExtraGradient, Lookahead, LookaheadMinmax, Optimistic


def weight(value: float = 1.0) -> Tensor:
    return torch.tensor([value], dtype=torch.float64, requires_grad=True)


def descend(optimizer: Any, parameter: Tensor, gradient: float = 1.0) -> None:
    parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()


@pytest.mark.parametrize("look", ["state_dict", "attach", "slow_weights", "slow_state_dict"])
def test_slow_weights_are_those_before_the_first_base_step_whoever_looked_earlier(
    look: str,
) -> None:
    layer = nn.Linear(1, 1, bias=False).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    la = LookaheadMinmax({"G": optimizer}, k=1)
    if look == "slow_weights":
        with la.slow_weights():
            pass
    else:
        argument = {"attach": ["G"], "slow_state_dict": [layer]}.get(look, [])
        getattr(la, look)(*argument)
    layer.load_state_dict({"weight": torch.tensor([[10.0]])})  # a pretrained network
    descend(optimizer, layer.weight)
    if look != "attach":
        la.step()
    assert layer.weight.item() == 10 + 0.5 * (9.5 - 10)


def test_reset_fixes_the_slow_weights_at_once() -> None:
    w = weight()
    optimizer = torch.optim.SGD([w], lr=0.5)
    la = LookaheadMinmax(optimizer, k=1)
    la.reset()
    with torch.no_grad():
        w.fill_(10.0)
    descend(optimizer, w)
    la.step()
    assert w.item() == 1 + 0.5 * (9.5 - 1)


def test_slow_weights_come_back_after_a_change_that_no_optimizer_made() -> None:
    w = weight()
    optimizer = torch.optim.SGD([w], lr=0.5)
    la = LookaheadMinmax(optimizer, k=1)
    descend(optimizer, w)
    la.step()
    with torch.no_grad():
        w.fill_(10.0)
    with la.slow_weights():
        assert w.item() == 0.75
    assert w.item() == 10.0


def test_weights_replaced_in_the_optimizer_are_pulled_back() -> None:
    w = weight()
    optimizer = torch.optim.SGD([w], lr=0.5)
    la = LookaheadMinmax(optimizer, k=1)
    descend(optimizer, w)
    la.step()
    other = weight(4.0)
    optimizer.param_groups[0]["params"][0] = other
    descend(optimizer, other)
    la.step()
    assert other.item() == 4 + 0.5 * (3.5 - 4)
    assert [slow.item() for slow in la.slow_parameters()] == [3.75]


@pytest.mark.parametrize("clock", ["G", "D"])
def test_round_of_extragradient_ends_after_its_last_player_whoever_is_the_clock(clock: str) -> None:
    """f = xy, k = 1: z is multiplied by 1 - alpha + alpha (1 + i eta - eta^2)."""
    x, y = weight(1.0), weight(0.0)
    players = {
        "G": torch.optim.SGD([x], lr=0.5),
        "D": torch.optim.SGD([y], lr=0.5, maximize=True),
    }
    eg, la = ExtraGradient(players), LookaheadMinmax(players, k=1)
    la.attach(clock)

    def closure() -> None:
        eg.zero_grad()
        (x * y).sum().backward()

    for _ in range(2):
        eg.round(closure)
    z = (0.5 + 0.5 * (1 + 0.5j - 0.25)) ** 2
    assert (x.item(), y.item()) == pytest.approx((z.real, z.imag), rel=1e-14)
    assert la.rounds == 2


def test_level_two_takes_level_one_along_also_off_its_phase() -> None:
    w = weight()
    optimizer = torch.optim.SGD([w], lr=0.5)
    la = LookaheadMinmax(optimizer, k=[2, 4])
    reached = []
    for round_number in range(1, 5):
        descend(optimizer, w)
        reached.append(la.step())
        if round_number == 1:
            la.sync(1)  # from here level 1 is due at rounds 3 and 5, level 2 at round 4
    assert reached == [0, 0, 1, 2]
    # by hand: 1, .5 -> .75, .25, -.25 -> .25, -.25 -> level 1: 0, level 2: 1 + (0 - 1) / 2
    assert w.item() == 0.5


def test_rounds_that_were_rolled_back_count_for_no_level() -> None:
    w = weight()
    optimizer = torch.optim.SGD([w], lr=0.5)
    la = LookaheadMinmax(optimizer, k=[2, 4], nonfinite="rollback")

    def play(gradient: float) -> int:
        descend(optimizer, w, gradient)
        return la.step()

    reached = [play(1.0) for _ in range(3)]
    with pytest.warns(UserWarning, match="not finite"):
        reached.append(play(float("nan")))
    reached += [play(1.0) for _ in range(6)]
    assert reached == [0, 1, 0, 0, 0, 2, 0, 1, 0, 2]


def test_one_rollback_is_enough_under_optimistic() -> None:
    w = weight()
    optimizer = Optimistic(torch.optim.SGD([w], lr=0.5))
    la = LookaheadMinmax(optimizer, k=1, nonfinite="rollback")
    descend(optimizer, w)
    la.step()
    descend(optimizer, w, float("nan"))
    with pytest.warns(UserWarning, match="not finite"):
        la.step()
    descend(optimizer, w)
    la.step()
    assert la.rollbacks == 1
    assert w.item() == 1 - 0.25 - 0.25  # the step after it is a first step again


@pytest.mark.parametrize("copied", [False, True])
def test_rollback_resets_the_second_state_of_extragradient(copied: bool) -> None:
    w = weight()
    optimizer = torch.optim.Adam([w], lr=0.1)
    eg = ExtraGradient(optimizer, state="separate")
    la = LookaheadMinmax(optimizer, k=1, nonfinite="rollback")
    if copied:
        w, optimizer, eg, la = copy.deepcopy((w, optimizer, eg, la))

    def play(scale: float) -> None:
        def closure() -> None:
            eg.zero_grad()
            (scale * w**2).sum().backward()

        eg.round(closure)
        la.step()

    with pytest.warns(UserWarning, match="not finite"):
        play(float("nan"))
    assert w.item() == 1.0
    play(1.0)
    assert la.rollbacks == 1
    assert w.item() == pytest.approx(1 - 0.05, rel=1e-7)  # Adam's first step is lr, half way back


def test_statistics_that_are_not_finite_roll_back_too() -> None:
    layer = nn.BatchNorm1d(1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    options: dict[str, Any] = {"modules": {"G": layer}, "buffers": "interpolate"}
    la = LookaheadMinmax({"G": optimizer}, k=1, nonfinite="rollback", **options)
    layer(torch.full((2, 1), torch.nan))
    with pytest.warns(UserWarning, match="buffer running_mean of player 'G' is not finite"):
        assert la.step() == 0
    assert layer.running_mean.item() == 0.0


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("wrapper", [Lookahead, Optimistic])
def test_copy_of_a_scheduled_wrapper_steps_its_own_weights(wrapper: Any, how: str) -> None:
    w = weight()
    optimizer = wrapper(torch.optim.SGD([w], lr=0.5))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    v = twin.param_groups[0]["params"][0]
    descend(twin, v)
    assert (w.item(), v.item()) == (1.0, 0.5)


def test_parameter_without_gradient_stays_under_optimistic() -> None:
    """As under any torch optimizer; when the gradient is back, its last update counts."""
    w = weight()
    optimizer = Optimistic(torch.optim.SGD([w], lr=0.1))
    descend(optimizer, w, 2.0)
    w.grad = None
    optimizer.step()
    assert w.item() == 0.8
    descend(optimizer, w, 3.0)
    assert w.item() == pytest.approx(0.8 - 2 * 0.3 + 0.2, rel=1e-14)


def test_products_of_momenta_and_step_sizes_are_never_interpolated() -> None:
    for make in (torch.optim.NAdam, torch.optim.ASGD, torch.optim.Rprop):
        points = []
        for policy in ("keep", "interpolate"):
            w = weight()
            optimizer = make([w], lr=0.1)
            la = LookaheadMinmax(optimizer, k=2, state=policy)
            for _ in range(2):
                descend(optimizer, w)
                la.step()
            state = optimizer.state[w]
            points.append(
                [state[k].item() for k in ("mu_product", "eta", "mu", "step_size") if k in state]
            )
        assert points[0] == points[1] != []


def test_complex_momentum_is_interpolated() -> None:
    w = torch.ones(1, dtype=torch.complex128, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    la = LookaheadMinmax(optimizer, k=1, state="interpolate")
    w.grad = torch.full_like(w, 2 + 4j)
    optimizer.step()
    la.step()
    assert optimizer.state[w]["momentum_buffer"].item() == 1 + 2j


def test_sparse_parameters_are_refused() -> None:
    sparse = torch.eye(3).to_sparse().requires_grad_()
    with pytest.raises(ValueError, match=r"player '0' has a sparse parameter \(torch.sparse_coo\)"):
        LookaheadMinmax(torch.optim.SGD([sparse], lr=0.1))


def test_saved_state_with_missing_entries_is_refused() -> None:
    la = LookaheadMinmax(torch.optim.SGD([weight()], lr=0.1))
    saved = la.state_dict()
    del saved["rounds"], saved["players"]
    with pytest.raises(ValueError, match=r"no entries \['players', 'rounds'\]"):
        la.load_state_dict(saved)


class Extra(nn.Linear):
    """A layer whose state dict has an entry that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"scale": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.scale = state["scale"]


def test_extra_state_of_layers_is_passed_on() -> None:
    layer = Extra(1, 1)
    la = LookaheadMinmax(torch.optim.SGD(layer.parameters(), lr=0.1))
    assert la.slow_state_dict(layer)["_extra_state"] == {"scale": 3}
    average = EMA(layer)
    assert average.averaged_module().scale == 3
    assert repr(average) == "EMA(Extra, updates=0)"


def test_integer_parameters_that_join_later_are_refused() -> None:
    w = weight()
    optimizer = torch.optim.SGD([w], lr=0.1)
    LookaheadMinmax({"G": optimizer})
    counter = nn.Parameter(torch.ones(1, dtype=torch.int32), requires_grad=False)
    optimizer.add_param_group({"params": [counter]})
    with pytest.raises(ValueError, match=r"player 'G' has a parameter of torch.int32"):
        descend(optimizer, w)
    assert w.item() == 1.0


def test_copy_in_the_middle_of_an_extragradient_round_knows_that_it_is() -> None:
    w = weight()
    optimizer = torch.optim.SGD([w], lr=0.1)
    eg, la = ExtraGradient(optimizer), LookaheadMinmax(optimizer, k=1)
    w.grad = torch.ones_like(w)
    eg.extrapolate()
    v, twin, lookahead = copy.deepcopy((w, eg, la))
    with pytest.raises(RuntimeError, match="finish the round first"):
        lookahead.step()
    v.grad = torch.full_like(v, 2.0)
    twin.step()
    lookahead.step()
    assert v.item() == pytest.approx(1 - 0.1, rel=1e-14)  # half of 0.2
    assert w.item() == 0.9
