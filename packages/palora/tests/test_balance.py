from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import close
from test_loss import RAYS, TwoHeads, losses, problem
from torch import Tensor, nn

import palora


def reference_gradients(
    model: nn.Module, batch: Any, rays: Tensor, xi: float, weigh: Any = None
) -> list[Tensor]:
    """T+1 backward passes: norms of each task's gradient, then the weighted loss."""
    shared = list(model.encoder.parameters())
    for lam in rays:
        with palora.preference(model, lam):
            values = torch.stack(losses(model(batch[0]), *batch[1:]))
        if weigh is not None:
            values = values * weigh(values)
        norms = []
        for value in values:
            found = torch.autograd.grad(value, shared, retain_graph=True, allow_unused=True)
            norms.append(torch.cat([g.flatten() for g in found if g is not None]).norm())
        scale = lam.double() / (torch.stack(norms).detach() + xi)
        (scale * values).sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("params", ["shared", lambda m: m.encoder.parameters()])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_gradient_balancing_equals_the_reference_formula(
    params: Any, batched: bool, backward: bool, reduction: Any, as_tensor: bool
) -> None:
    model, batch = problem()
    if batched:  # a batch normalisation's backward pass has no batching rule on every version
        model.encoder[1] = nn.Identity()
    twin = copy.deepcopy(model)
    expected = reference_gradients(twin, batch, RAYS, 1e-3)
    balance = palora.GradBalance(params=params, batched=batched)

    def returned(*args: Any) -> Any:
        found = losses(*args)
        return torch.stack(found) if as_tensor else found

    out = palora.step_loss(
        model, returned, batch, RAYS, balance=balance, backward=backward, reduction=reduction
    )
    if not backward:
        out.loss.backward()
    factor = 4 if reduction == "mean" else 1
    for p, g in zip(model.parameters(), expected, strict=True):
        close(factor * p.grad, g, 1e-10)  # a norm of a gradient of ~1e-1 divides
    close(factor * out.loss, (out.weights * out.losses).sum(), 1e-11)


def test_a_ray_costs_one_backward_pass_per_task() -> None:
    class Counted(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            Counted.calls += 1
            return g

    class Probe(TwoHeads):
        def forward(self, x: Tensor) -> list[Tensor]:
            h = Counted.apply(self.encoder(x))
            return [head(h) for head in self.heads]

    model = palora.inject(Probe(), 2, rank=1)
    batch = (torch.randn(9, 6), torch.randint(3, (9,)), torch.randn(9))
    out = palora.step_loss(model, losses, batch, RAYS[:3], balance=palora.GradBalance())
    out.loss.backward()
    assert Counted.calls == 2 * 3


def test_scaled_backward_scales_the_gradients() -> None:
    model, batch = problem()
    twin = copy.deepcopy(model)
    palora.step_loss(model, losses, batch, RAYS, balance=palora.GradBalance()).loss.backward()
    out = palora.step_loss(twin, losses, batch, RAYS, balance=palora.GradBalance())
    (8.0 * out.loss).backward()  # as an AMP scaler does
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        close(8.0 * p.grad, q.grad)


def test_parameters_that_a_task_does_not_reach_count_as_zero() -> None:
    model, batch = problem()

    def half(outputs: list[Tensor], target: Tensor, values: Tensor) -> list[Tensor]:
        first, _ = losses(outputs, target, values)
        return [first, torch.zeros((), dtype=torch.float64)]

    out = palora.step_loss(
        model, half, batch, RAYS[:1],
        balance=palora.GradBalance(params=lambda m: m.encoder.parameters()),
    )  # fmt: skip
    out.loss.backward()
    assert model.encoder[0].weight.grad.any()
    close(out.weights[0, 1], RAYS[0, 1].double() / 1e-3)  # no gradient: λ/ξ, large but finite
    clipped = palora.GradBalance(params=lambda m: m.encoder.parameters(), max_weight=5.0)
    out = palora.step_loss(model, half, batch, RAYS[:1], balance=clipped)
    close(out.weights[0, 1], RAYS[0, 1].double() * 5.0)


def test_rays_that_require_grad_are_refused() -> None:
    model, batch = problem()
    with pytest.raises(ValueError, match="detach the rays"):
        palora.step_loss(
            model, losses, batch, RAYS.clone().requires_grad_(), balance=palora.GradBalance()
        )


@pytest.mark.parametrize("mode", ["mean", "ratio"])
def test_loss_balancing_follows_its_memory(mode: Any) -> None:
    window = 3
    balance = palora.LossBalance(window, mode)
    history = [[1.0, 1.0, 1.0]] * (2 * window)
    for call in range(1, 12):
        vector = torch.rand(3, dtype=torch.float64) + call
        history.append(vector.tolist())
        weights = balance(vector)
        if call - 1 <= window:  # not more than `window` earlier calls
            assert weights.tolist() == [1.0, 1.0, 1.0]
            continue
        new = torch.tensor(history[-window:], dtype=torch.float64).mean(0)
        if mode == "ratio":
            new = new / torch.tensor(history[-2 * window : -window], dtype=torch.float64).mean(0)
        close(weights, 1 - new.abs() / new.abs().sum())


def test_loss_balancing_advances_once_per_ray_and_resumes() -> None:
    model, batch = problem()
    balance = palora.LossBalance(window=2)
    palora.step_loss(model, losses, batch, RAYS, balance=balance).loss.backward()
    assert balance.calls == 4
    other = palora.LossBalance(window=2)
    other.load_state_dict(balance.state_dict())
    twin = copy.deepcopy(model)
    first = palora.step_loss(model, losses, batch, RAYS, balance=balance)
    second = palora.step_loss(twin, losses, batch, RAYS, balance=other)
    assert torch.equal(first.loss, second.loss)
    assert not torch.equal(first.weights, RAYS.double())
    close(first.loss.detach(), (first.weights * first.losses).sum())


def test_full_balancing_is_loss_then_gradient_balancing() -> None:
    model, batch = problem()
    twin = copy.deepcopy(model)
    start = palora.LossBalance(window=1)
    for _ in range(3):
        start(torch.tensor([3.0, 1.0], dtype=torch.float64))
    full = palora.FullBalance()
    full.load_state_dict(copy.deepcopy(start.state_dict()))
    full.loss.window = 1
    weigh = copy.deepcopy(start)
    expected = reference_gradients(twin, batch, RAYS, 1e-3, weigh)
    out = palora.step_loss(model, losses, batch, RAYS, balance=full)
    out.loss.backward()
    for p, g in zip(model.parameters(), expected, strict=True):
        close(p.grad, g, 1e-10)
    assert full.state_dict()["calls"] == 7
    close(out.loss, (out.weights * out.losses).sum(), 1e-11)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: palora.LossBalance(0), "window must be at least 1"),
        (lambda: palora.LossBalance(mode="x"), "mode must be"),  # type: ignore[arg-type]
        (lambda: palora.GradBalance(-1.0), "xi must not be negative"),
        (lambda: palora.GradBalance(params="x"), "params must be"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def _by_slices(found: Tensor) -> list[Tensor]:
    return [found[0], found[1]]


class OneOutput(TwoHeads):
    """Both heads in one tensor: each loss reaches the other's head, with zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(super().forward(x), 1)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("joined", ["list", "tensor", "slices", "one output"])
def test_heads_are_not_shared_however_the_losses_are_returned(joined: str, batched: bool) -> None:
    model, batch = problem()
    model.encoder[1] = nn.Identity()
    twin = copy.deepcopy(model)
    expected = reference_gradients(twin, batch, RAYS, 1e-3)
    if joined == "one output":
        model.__class__ = OneOutput

    def returned(outputs: Any, *targets: Any) -> Any:
        if joined == "one output":
            outputs = list(outputs.split([3, 1], 1))
        found = losses(outputs, *targets)
        if joined in ("list", "one output"):
            return found
        stacked = torch.stack(found)
        return stacked if joined == "tensor" else _by_slices(stacked)

    balance = palora.GradBalance(batched=batched)
    palora.step_loss(model, returned, batch, RAYS, balance=balance).loss.backward()
    for p, g in zip(model.parameters(), expected, strict=True):
        close(p.grad, g, 1e-10)


@pytest.mark.parametrize("batched", [False, True])
def test_a_loss_of_zero_gradient_does_not_blow_up_the_other(batched: bool) -> None:
    """Nothing is shared then: the other loss is divided by the norm of all it reaches."""
    model, batch = problem()
    model.encoder[1] = nn.Identity()
    twin = copy.deepcopy(model)

    def met(outputs: list[Tensor], target: Tensor, values: Tensor) -> Tensor:
        first, second = losses(outputs, target, values)
        return torch.stack([first, (second - 1e6).relu()])  # a constraint that holds

    balance = palora.GradBalance(batched=batched)
    out = palora.step_loss(model, met, batch, RAYS[:1], balance=balance)
    with palora.preference(twin, RAYS[0]):
        losses(twin(batch[0]), *batch[1:])[0].backward()
    norm = torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None]).norm()
    close(out.weights[0, 0], RAYS[0, 0].double() / (norm + 1e-3), 1e-10)
    out.loss.backward()
    # a parameter with a gradient of zero has one, as DDP expects of every parameter
    assert all(p.grad is not None for p in model.parameters())


def test_losses_that_are_all_zero_keep_their_weights() -> None:
    balance = palora.LossBalance(window=1)
    for _ in range(3):
        weights = balance(torch.zeros(2))
    assert weights.tolist() == [1.0, 1.0]
