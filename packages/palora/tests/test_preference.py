from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
import torch
from conftest import fill
from torch import nn
from torch.utils.checkpoint import checkpoint

import palora
from palora.core import preference as module
from palora.core.preference import as_preference

TASKS = ["seg", "depth"]


def test_accepted_forms() -> None:
    for lam in ([0.75, 0.25], np.array([0.75, 0.25]), torch.tensor([0.75, 0.25], dtype=torch.float64),
                {"depth": 0.25, "seg": 0.75}):  # fmt: skip
        value = as_preference(lam, TASKS)
        assert value.dtype == torch.float32
        assert value.tolist() == [0.75, 0.25]
    assert as_preference({"seg": 1.0}, TASKS, partial=True).tolist() == [1.0, 0.0]
    assert as_preference([3.0, 1.0], TASKS, normalize=True).tolist() == [0.75, 0.25]
    rows = as_preference(
        {"seg": torch.tensor([0.0, 1.0]), "depth": torch.tensor([1.0, 0.0])}, TASKS
    )
    assert rows.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert as_preference([0.50005, 0.5], TASKS).shape == (2,)  # within 1e-4


@pytest.mark.parametrize(
    ("lam", "kw", "error", "message"),
    [
        ([0.5, 0.3, 0.2], {}, ValueError, r"\(2,\) or \(batch, 2\) for 2 tasks, got \(3,\)"),
        (torch.ones(1, 1, 2) / 2, {}, ValueError, "must have shape"),
        ([float("nan"), 1.0], {}, ValueError, "NaN"),
        ([float("inf"), 1.0], {}, ValueError, "infinite"),
        ([-0.1, 1.1], {}, ValueError, "negative entries"),
        ([0.5, 0.6], {}, ValueError, "must sum to 1.*normalize=True"),
        ([[0.5, 0.5], [0.5, 0.4]], {}, ValueError, "must sum to 1"),
        ([[0.5, 0.5]] * 40 + [[0.5, 0.4]], {}, ValueError, "must sum to 1"),
        ([[0.5, 0.5]] * 40 + [[1.5, -0.5]], {}, ValueError, "negative entries"),
        ([[0.5, 0.5]] * 40 + [[float("nan"), 1.0]], {}, ValueError, "NaN"),
        ([[0.5, 0.5]] * 40 + [[0.0, 0.0]], {"normalize": True}, ValueError, "sums to 0"),
        ([0.0, 0.0], {"normalize": True}, ValueError, "sums to 0"),
        (torch.zeros(0, 2), {}, ValueError, r"must have shape .* got \(0, 2\)"),
        ("ab", {}, ValueError, "must be numbers, one for each of 2 tasks.*'ab'"),
        ({"seg": 0.5, "normals": 0.5}, {}, KeyError, "unknown task 'normals'.*seg, depth"),
        ({"seg": 1.0}, {}, KeyError, "no weight for task 'depth'.*seg, depth.*partial=True"),
    ],
)
def test_bad_preferences(lam: Any, kw: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        as_preference(lam, TASKS, **kw)
    model = palora.inject(nn.Linear(2, 2), TASKS, rank=1)
    with pytest.raises(error, match=message), palora.preference(model, lam, **kw):
        pass
    with pytest.raises(error, match=message):
        palora.set_preference(model, lam, **kw)


def test_extrapolation_is_warned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_warned_extrapolation", False)
    assert as_preference([0.5, 0.5], TASKS, simplex=False).tolist() == [0.5, 0.5]
    with pytest.warns(UserWarning, match="off the simplex: extrapolating"):
        value = as_preference([1.5, -0.5], TASKS, simplex=False)
    assert value.tolist() == [1.5, -0.5]
    as_preference([2.0, -1.0], TASKS, simplex=False)  # an error if it warned again


def test_a_preference_is_needed_unless_a_default_is_given() -> None:
    model = fill(palora.inject(nn.Linear(2, 2), TASKS, rank=1))
    for mode in (True, False):
        with pytest.raises(RuntimeError, match="set a preference"):
            model.train(mode)(torch.ones(1, 2))
    assert palora.get_preference(model) is None
    even = fill(palora.inject(nn.Linear(2, 2), TASKS, rank=1, default="uniform"))
    with pytest.raises(RuntimeError, match="set a preference"):
        even(torch.ones(1, 2))
    torch.testing.assert_close(
        even.eval()(torch.ones(1, 2)), palora.merge(even, [0.5, 0.5])(torch.ones(1, 2))
    )
    assert palora.get_preference(even).tolist() == [0.5, 0.5]
    own = palora.inject(nn.Linear(2, 2), TASKS, rank=1, default={"seg": 0.25, "depth": 0.75})
    assert palora.get_preference(own).tolist() == [0.25, 0.75]
    with (
        pytest.raises(RuntimeError, match="not injected"),
        palora.preference(nn.Linear(1, 1), [1, 0]),
    ):
        pass


def test_contexts_nest_restore_and_go_before_the_sticky_preference() -> None:
    model = palora.inject(nn.Linear(2, 2), TASKS, rank=1)
    palora.set_preference(model, [0.5, 0.5])

    def now() -> list[float]:
        return palora.get_preference(model).tolist()

    with palora.preference(model, [0.25, 0.75]) as value:
        assert value.tolist() == now() == [0.25, 0.75]
        with palora.preference(model, [1.0, 0.0]):
            assert now() == [1.0, 0.0]
        assert now() == [0.25, 0.75]
        with pytest.raises(ZeroDivisionError), palora.preference(model, [0.0, 1.0]):
            raise ZeroDivisionError
        assert now() == [0.25, 0.75]
    assert now() == [0.5, 0.5]
    palora.set_preference(model, None)
    assert palora.get_preference(model) is None


def test_two_models_keep_their_own_preferences() -> None:
    first, second = (palora.inject(nn.Linear(2, 2), TASKS, rank=1) for _ in range(2))
    with palora.preference(first, [1.0, 0.0]), palora.preference(second, [0.0, 1.0]):
        assert palora.get_preference(first).tolist() == [1.0, 0.0]
        assert palora.get_preference(second).tolist() == [0.0, 1.0]


def test_the_callers_tensor_may_change_afterwards() -> None:
    model = palora.inject(nn.Linear(2, 2), TASKS, rank=1)
    lam = torch.tensor([0.5, 0.5])
    palora.set_preference(model, lam)
    lam.zero_()
    assert palora.get_preference(model).tolist() == [0.5, 0.5]


def test_threads_with_different_preferences_never_mix() -> None:
    model = fill(
        palora.inject(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), 2, rank=2)
    )
    model.eval()
    x = torch.randn(32, 8)
    lams = [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]
    with torch.no_grad():
        expected = []
        for lam in lams:
            with palora.preference(model, lam):
                expected.append(model(x))
    barrier = threading.Barrier(3)
    wrong: list[int] = []

    def work(i: int) -> None:
        barrier.wait()
        with torch.no_grad():
            for _ in range(100):
                with palora.preference(model, lams[i]):
                    if not torch.equal(model(x), expected[i]):
                        wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_asyncio_tasks_with_different_preferences_never_mix() -> None:
    model = fill(palora.inject(nn.Linear(4, 4), 2, rank=2))
    x = torch.randn(3, 4)

    async def ask(lam: list[float]) -> torch.Tensor:
        with palora.preference(model, lam):
            await asyncio.sleep(0)
            first = model(x)
            await asyncio.sleep(0)
            assert torch.equal(first, model(x))
            return first

    async def both() -> list[torch.Tensor]:
        return await asyncio.gather(ask([1.0, 0.0]), ask([0.0, 1.0]))

    outs = asyncio.run(both())
    for out, lam in zip(outs, ([1.0, 0.0], [0.0, 1.0]), strict=True):
        with palora.preference(model, lam):
            assert torch.equal(out, model(x))


def test_checkpointed_blocks_recompute_at_the_preference_of_their_forward_pass() -> None:
    model = fill(
        palora.inject(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), 2, rank=2)
    )
    x = torch.randn(3, 4, requires_grad=True)
    lams = [[0.9, 0.1], [0.2, 0.8]]

    def total(remat: bool) -> torch.Tensor:
        loss = torch.zeros(())
        for lam in lams:
            with palora.preference(model, lam):
                if remat:
                    y = checkpoint(
                        model, x, use_reentrant=False, context_fn=palora.checkpoint_context(model)
                    )
                else:
                    y = model(x)
            loss = loss + y.square().sum()
        return loss

    parameters = [x, *model.parameters()]
    expected = torch.autograd.grad(total(False), parameters)
    with palora.preference(model, [0.0, 1.0]):  # whatever is in force at the backward pass
        ours = torch.autograd.grad(total(True), parameters)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    palora.set_preference(model, [0.5, 0.5])  # a sticky preference needs no help
    checkpoint(model, x, use_reentrant=False).sum().backward()
    palora.set_preference(model, None)
    model.eval()
    with pytest.raises(RuntimeError, match="set a preference"):
        checkpoint(model, x, use_reentrant=False, context_fn=palora.checkpoint_context(model))


def test_all_adapters_get_gradients_at_a_vertex() -> None:
    model = fill(
        palora.inject(
            nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 2)),
            3,
            rank=1,
        )
    )
    for lam in ([1.0, 0.0, 0.0], [[1.0, 0.0, 0.0]] * 2):
        model.zero_grad()
        with palora.preference(model, lam):
            model(torch.randn(2, 4)).square().sum().backward()
        for name, parameter in model.named_parameters():
            if name.endswith(("palora_A", "palora_B")):
                assert parameter.grad[0].any()
                assert not parameter.grad[1:].any()  # zero, not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_preference_set_or_used_in_inference_mode_can_be_trained_on(
    dtype: torch.dtype, normalize: bool
) -> None:
    model = fill(palora.inject(nn.Linear(4, 3).to(dtype), 2, rank=1))
    x = torch.randn(5, 4, dtype=dtype)
    with torch.inference_mode():
        palora.set_preference(model, [0.25, 0.75], normalize=normalize)
        model(x)
    model(x).sum().backward()
    A, B = model.palora_A.detach(), model.palora_B.detach()
    for t, lam in enumerate([0.25, 0.75]):  # dB_t = s λ_t gᵀ (x A_tᵀ), here with g = 1
        expected = lam * (x @ A[t].t()).sum(0).expand_as(B[t])
        torch.testing.assert_close(model.palora_B.grad[t], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_preference_that_learns_is_read_anew_at_every_call(dtype: torch.dtype) -> None:
    model = fill(palora.inject(nn.Linear(4, 3).to(dtype), 2, rank=1)).eval()
    x = torch.randn(40, 4, dtype=dtype)
    lam = torch.tensor([0.25, 0.75], requires_grad=True)
    palora.set_preference(model, lam)
    with torch.no_grad():
        model(x)
    model(x).sum().backward()  # the pass without gradients left nothing behind that hides λ
    g = x.sum(0)
    A, B = model.palora_A.detach(), model.palora_B.detach()
    expected = torch.stack([(B[t] @ (A[t] @ g)).sum() for t in range(2)])
    torch.testing.assert_close(lam.grad, expected.float(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        lam.copy_(torch.tensor([0.75, 0.25]))
        found = model(x)
        weight = model.weight + 0.75 * B[0] @ A[0] + 0.25 * B[1] @ A[1]
        torch.testing.assert_close(found, x @ weight.t() + model.bias, rtol=1e-5, atol=1e-5)
