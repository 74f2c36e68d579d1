"""Lookahead is Zhang's rule, and passes for a torch optimizer in every respect."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from conftest import BilinearGame
from torch import Tensor, nn

from lookahead_minmax import Lookahead, LookaheadMinmax, Optimistic


def quadratic(make: Any = torch.optim.SGD, **options: Any) -> tuple[Tensor, torch.optim.Optimizer]:
    options.setdefault("lr", 0.1)
    weight = torch.tensor([1.0, -2.0], requires_grad=True)
    return weight, make([weight], **options)


def descend(weight: Tensor, optimizer: torch.optim.Optimizer, steps: int) -> Tensor:
    for _ in range(steps):
        optimizer.zero_grad()
        (weight * torch.tensor([1.0, 3.0]) * weight).sum().backward()
        optimizer.step()
    return weight.detach()


def zhang(steps: int, k: int, alpha: float) -> Tensor:
    """The rule of Zhang et al., Algorithm 1, written down for gradient descent in float64."""
    slow = torch.tensor([1.0, -2.0], dtype=torch.float64)
    fast = slow.clone()
    for step in range(1, steps + 1):
        fast = fast - 0.1 * 2 * torch.tensor([1.0, 3.0], dtype=torch.float64) * fast
        if step % k == 0:
            slow = slow + alpha * (fast - slow)
            fast = slow.clone()
    return fast


@pytest.mark.parametrize(("k", "alpha"), [(1, 0.5), (3, 0.3), (5, 0.8)])
def test_lookahead_is_zhangs_rule(k: int, alpha: float) -> None:
    weight, base = quadratic()
    result = descend(weight, Lookahead(base, k=k, alpha=alpha), 11)
    torch.testing.assert_close(result.double(), zhang(11, k, alpha), rtol=1e-5, atol=1e-7)


def test_one_player_game_is_lookahead_bit_for_bit() -> None:
    weight, base = quadratic(torch.optim.Adam)
    single = descend(weight, Lookahead(base, k=3), 10)
    other, optimizer = quadratic(torch.optim.Adam)
    la = LookaheadMinmax(optimizer, k=3)
    for _ in range(10):
        descend(other, optimizer, 1)
        la.step()
    assert torch.equal(single, other.detach())


def test_two_simultaneous_players_are_one_lookahead_over_the_joint_vector() -> None:
    game, joint = BilinearGame(), BilinearGame()
    la = LookaheadMinmax(game.players, k=3)
    optimizer = Lookahead(torch.optim.SGD([joint.x, joint.y], lr=0.5), k=3)
    for _ in range(7):
        game.simultaneous()
        la.step()
        joint.fill()
        optimizer.step()
    assert game.point() == joint.point()


def test_it_is_an_optimizer_and_shares_groups_state_and_defaults_with_its_base() -> None:
    _, base = quadratic(torch.optim.Adam)
    optimizer = Lookahead(base)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    assert "k=5, alpha=0.5, Adam" in repr(optimizer)


@pytest.mark.parametrize("held", ["wrapper", "base"])
@pytest.mark.parametrize("name", ["LambdaLR", "OneCycleLR"])
def test_schedulers_work_on_the_wrapper_and_on_the_base(held: str, name: str) -> None:
    weight, base = quadratic()
    optimizer = Lookahead(base)
    target = optimizer if held == "wrapper" else base
    schedulers = torch.optim.lr_scheduler
    scheduler: Any = (
        schedulers.LambdaLR(target, lambda step: 0.5**step)
        if name == "LambdaLR"
        else schedulers.OneCycleLR(target, max_lr=0.4, total_steps=4)
    )
    start = base.param_groups[0]["lr"]
    descend(weight, optimizer, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == base.param_groups[0]["lr"] != start


def test_hooks_closure_and_zero_grad() -> None:
    weight, base = quadratic()
    optimizer = Lookahead(base, k=2)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    base.register_step_post_hook(lambda *_: calls.append("base"))

    def closure() -> float:
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 5.0
    assert calls == ["pre", "base", "post"]
    optimizer.zero_grad()
    assert weight.grad is None
    assert optimizer.lookahead.rounds == 1


def test_grad_scaler_skips_the_whole_step() -> None:
    weight, base = quadratic()
    optimizer = Lookahead(base, k=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale((weight * torch.inf).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.lookahead.rounds == 0
    optimizer.zero_grad()
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)
    assert optimizer.lookahead.rounds == 1
    torch.testing.assert_close(weight.detach(), torch.tensor([0.95, -2.05]))


def test_add_param_group_reaches_the_base() -> None:
    _, base = quadratic()
    optimizer = Lookahead(base)
    optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 1.0})
    assert [group["lr"] for group in base.param_groups] == [0.1, 1.0]


@pytest.mark.parametrize("phase", range(4))
@pytest.mark.parametrize("wrapper", [Lookahead, Optimistic])
def test_state_dict_resumes_bit_for_bit(phase: int, wrapper: Any) -> None:
    weight, base = quadratic(torch.optim.Adam)
    optimizer = wrapper(base)
    descend(weight, optimizer, phase)
    saved = copy.deepcopy((weight.detach(), optimizer.state_dict()))
    other, other_base = quadratic(torch.optim.Adam)
    resumed = wrapper(other_base)
    with torch.no_grad():
        other.copy_(saved[0])
    resumed.load_state_dict(saved[1])
    assert torch.equal(descend(other, resumed, 7), descend(weight, optimizer, 7))
    assert resumed.param_groups is other_base.param_groups
    assert resumed.state is other_base.state


@pytest.mark.parametrize("wrapper", [Lookahead, Optimistic])
def test_state_dict_hooks_run(wrapper: Any) -> None:
    _, base = quadratic()
    optimizer = wrapper(base)
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("pre"))
    optimizer.register_state_dict_post_hook(lambda _, sd: {**sd, "note": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, sd: sd | {"seen": 1})
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    saved = optimizer.state_dict()
    assert saved["note"] == 1
    del saved["note"]
    optimizer.load_state_dict(saved)
    assert calls == ["pre", "loaded"]


@pytest.mark.parametrize("wrapper", [Lookahead, Optimistic])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue_alike_and_apart(wrapper: Any, how: str) -> None:
    weight, base = quadratic(torch.optim.Adam)
    optimizer = wrapper(base)
    descend(weight, optimizer, 3)
    pair = (weight, optimizer)
    other, twin = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    start = weight.detach().clone()
    after = descend(other, twin, 5).clone()
    assert torch.equal(weight.detach(), start)
    assert torch.equal(descend(weight, optimizer, 5), after)


def test_state_of_a_plain_optimizer_is_refused() -> None:
    _, base = quadratic()
    with pytest.raises(ValueError, match="has no entry 'lookahead'"):
        Lookahead(base).load_state_dict(base.state_dict())


def test_base_must_be_an_optimizer() -> None:
    with pytest.raises(TypeError, match=r"base must be a torch\.optim\.Optimizer, got Linear"):
        Lookahead(nn.Linear(1, 1))  # type: ignore[arg-type]


def test_slow_weights_and_sync() -> None:
    weight, base = quadratic()
    optimizer = Lookahead(base, k=5)
    descend(weight, optimizer, 1)
    with optimizer.slow_weights():
        assert weight.tolist() == [1.0, -2.0]
    optimizer.sync()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.9, -1.4]))


def test_compiled_model_and_compiled_optimizer_step_are_not_recompiled_by_a_sync() -> None:
    torch._dynamo.reset()
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    la = LookaheadMinmax(optimizer, k=2)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    for _ in range(6):
        optimizer.zero_grad()
        compiled(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        la.step()
    assert counter.frame_count == 1


def test_gradient_accumulation_counts_steps_not_backwards() -> None:
    weight, base = quadratic()
    optimizer = Lookahead(base, k=2)
    for _ in range(3):
        (weight.sum() / 3).backward()
    optimizer.step()
    assert optimizer.lookahead.since_sync == 1
