from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from conftest import close, fill
from torch import Tensor, nn

import palora
from palora.core.simplex import simplex_grid

D = torch.float64
RAYS = torch.tensor([[0.2, 0.8], [0.6, 0.4], [0.9, 0.1], [0.5, 0.5]])


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 1)])

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.encoder(x)
        return [head(h) for head in self.heads]


def losses(outputs: list[Tensor], target: Tensor, values: Tensor) -> list[Tensor]:
    return [
        nn.functional.cross_entropy(outputs[0], target),
        nn.functional.mse_loss(outputs[1][:, 0], values),
    ]


def problem() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = fill(palora.inject(TwoHeads().double(), 2, rank=2))
    return model, (torch.randn(9, 6, dtype=D), torch.randint(3, (9,)), torch.randn(9, dtype=D))


def accumulated(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
    """The objective as it is written: one pass per ray, one backward pass each."""
    table = []
    for lam in RAYS:
        with palora.preference(model, lam):
            values = torch.stack(losses(model(batch[0]), *batch[1:]))
        (lam.double() * values).sum().backward()
        table.append(values.detach())
    return torch.stack(table), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("chunk", [None, 1, 2, 3])
@pytest.mark.parametrize("backward", [False, True])
def test_objective_equals_accumulated_single_rays(chunk: int | None, backward: bool) -> None:
    model, batch = problem()
    twin = copy.deepcopy(model)
    table, gradients = accumulated(twin, batch)
    out = palora.step_loss(model, losses, batch, RAYS, chunk=chunk, backward=backward)
    if not backward:
        out.loss.backward()
    assert out.loss.requires_grad != backward
    close(out.losses, table)
    close(out.loss.detach(), (RAYS.double() * table).sum())
    close(out.weights, RAYS.double())
    for p, g in zip(model.parameters(), gradients, strict=True):
        close(p.grad, g, 1e-11)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        close(a.double(), b.double())


def test_mean_reduction_divides_by_the_rays() -> None:
    model, batch = problem()
    total = palora.step_loss(copy.deepcopy(model), losses, batch, RAYS).loss
    close(4 * palora.step_loss(model, losses, batch, RAYS, reduction="mean").loss, total)


def test_batches_and_losses_may_be_dicts_and_tuples() -> None:
    class Keyed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return self.layer(x) if y is None else self.layer(x + y)

    model = fill(palora.inject(Keyed().double(), ["a", "b"], rank=1))
    x = torch.randn(3, 4, dtype=D)

    def named(out: Tensor, *rest: Any) -> dict[str, Tensor]:
        return {"b": out[:, 1].mean(), "a": out[:, 0].mean()}

    def stacked(out: Tensor, *rest: Any) -> Tensor:
        return out.mean(0)

    expected = palora.step_loss(model, stacked, (x,), RAYS).loss
    assert palora.step_loss(model, named, ({"x": x}, 1), RAYS).loss == expected
    assert palora.step_loss(model, stacked, {"x": x}, RAYS).loss == expected
    zero = torch.zeros_like(x)
    assert palora.step_loss(model, named, ((x, zero),), RAYS).loss == expected
    one_ray = palora.step_loss(model, named, (x,), [0.5, 0.5])
    assert one_ray.losses.shape == (1, 2)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda y: [y.mean()], ValueError, "must return 2 losses, one per task; got 1"),
        (lambda y: [y.mean()] * 3, ValueError, "must return 2 losses.*got 3"),
        (lambda y: [y.mean(0), y.mean()], ValueError, "losses must be scalars"),
        (lambda y: y.mean(), ValueError, "must return 2 scalar losses"),
        (lambda y: {"task0": y.mean(), "x": y.mean()}, KeyError, "the tasks are: task0, task1"),
    ],
)
def test_bad_losses(returned: Any, error: type, message: str) -> None:
    model = palora.inject(nn.Linear(4, 2), 2, rank=1)
    with pytest.raises(error, match=message):
        palora.step_loss(model, returned, (torch.ones(3, 4),), RAYS)


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"reduction": "x"}, "reduction must be"),
        ({"balance": "gb"}, "balance must be None"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"balance": palora.GradBalance(), "scalarization": "tchebycheff"}, "defined for"),
        ({"balance": palora.GradBalance(), "multiforward": 1.0}, "compares all rays"),
        ({"backward": True, "chunk": 2, "multiforward": 1.0}, "compares all rays"),
        ({"scalarization": "x"}, "kind must be"),
        ({"multiforward": 1.0, "multiforward_sign": "x"}, "sign must be"),
    ],
)
def test_bad_options(kw: dict[str, Any], message: str) -> None:
    model, batch = problem()
    with pytest.raises(ValueError, match=message):
        palora.step_loss(model, losses, batch, RAYS, **kw)
    with pytest.raises(ValueError, match="batch must be"):
        palora.step_loss(model, losses, batch[0], RAYS)


def test_nan_is_propagated() -> None:
    model, batch = problem()
    out = palora.step_loss(model, losses, (batch[0] * float("nan"), *batch[1:]), RAYS)
    assert out.loss.isnan()
    assert out.losses.isnan().all()


def test_gradient_reaches_a_learned_operating_point() -> None:
    model, batch = problem()
    rays = RAYS[:1].clone().requires_grad_()
    palora.step_loss(model, losses, batch, rays).loss.backward()
    assert rays.grad.shape == (1, 2)
    assert rays.grad.any()


def test_scalarizations_by_hand() -> None:
    values, lam = torch.tensor([2.0, 5.0], dtype=D), torch.tensor([0.6, 0.4], dtype=D)
    z = torch.tensor([1.0, 1.0], dtype=D)
    assert palora.scalarize(values, lam).item() == pytest.approx(0.6 * 2 + 0.4 * 5)
    assert palora.scalarize(values, lam, "tchebycheff").item() == pytest.approx(2.0)
    assert palora.scalarize(values, lam, "tchebycheff", reference=z).item() == pytest.approx(1.6)
    smooth = palora.scalarize(values, lam, "smooth-tchebycheff", reference=z, smoothing=0.5)
    assert smooth.item() == pytest.approx(0.5 * math.log(math.exp(1.2) + math.exp(3.2)))
    sharp = palora.scalarize(values, lam, "smooth-tchebycheff", smoothing=1e-3)
    assert sharp.item() == pytest.approx(2.0, abs=1e-2)
    batch = palora.scalarize(values.expand(3, 2), lam)
    assert batch.shape == (3,)
    with pytest.raises(ValueError, match="tasks, the preference"):
        palora.scalarize(values, torch.ones(3))
    with pytest.raises(ValueError, match="smoothing must be positive"):
        palora.scalarize(values, lam, "smooth-tchebycheff", smoothing=0.0)


def by_hand(table: Tensor, rays: Tensor, sign: str) -> float:
    count, tasks = table.shape
    total = 0.0
    for k in range(tasks):
        order = sorted(range(count), key=lambda m: -float(rays[m, k]))
        row = [float(table[m, k]) for m in order]
        inner = 0.0
        for a, b in itertools.pairwise(row):
            inner += math.exp(max(0.0, a - b if sign == "monotone" else b - a))
        total += math.log(inner / ((count - 1) if sign == "monotone" else (tasks - 1)))
    return total


@pytest.mark.parametrize("sign", ["monotone", "reference"])
def test_multiforward_regulariser_by_hand(sign: Any) -> None:
    rays = torch.tensor([[0.1, 0.3, 0.6], [0.5, 0.25, 0.25], [0.3, 0.6, 0.1], [0.05, 0.15, 0.8]])
    table = torch.rand(4, 3, dtype=D)
    value = palora.multiforward_regularizer(table, rays, sign)
    assert value.item() == pytest.approx(by_hand(table, rays, sign), abs=1e-12)


def test_monotone_sign_is_zero_on_a_valid_front_and_the_released_one_is_not() -> None:
    rays = simplex_grid(2, 4)
    table = 1 - rays
    assert palora.multiforward_regularizer(table, rays) == 0
    assert palora.multiforward_regularizer(table.flip(0), rays) > 0
    assert palora.multiforward_regularizer(table, rays, "reference") > 0
    with pytest.raises(ValueError, match="compares rays"):
        palora.multiforward_regularizer(table[:1], rays[:1])


def test_rays_of_equal_preference_may_come_in_any_order() -> None:
    rays = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.2, 0.6, 0.2]])
    first = torch.tensor([1.0, 4.0, 3.0, 2.0])  # the loss of task 0, falling where λ_0 rises
    table = torch.stack([first, 1 - rays[:, 1], 1 - rays[:, 2]], 1).requires_grad_()
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        value = palora.multiforward_regularizer(table[order], rays[order])
        assert value.item() == pytest.approx(0.0, abs=1e-6)  # log of a mean of ones
    broken = table.detach().clone()
    broken[3, 0] = 3.5  # above one of the two rays with no weight on task 0
    assert palora.multiforward_regularizer(broken, rays).item() == pytest.approx(
        math.log((math.exp(0.5) + 2) / 3), abs=1e-6
    )


@pytest.mark.parametrize("chunk", [None, 2])
def test_multiforward_term_is_added_to_the_loss(chunk: int | None) -> None:
    model, batch = problem()
    plain = palora.step_loss(copy.deepcopy(model), losses, batch, RAYS)
    out = palora.step_loss(model, losses, batch, RAYS, multiforward=2.0, chunk=chunk)
    penalty = palora.multiforward_regularizer(plain.losses, RAYS)
    close(out.loss, plain.loss + 2.0 * penalty)


def test_cosine_diversity_by_hand_and_zero_for_untrained_up_projections() -> None:
    model = palora.inject(nn.Linear(5, 4).double(), 3, rank=2)
    A = model.palora_A.flatten(1)
    pairs = [(0, 1), (0, 2), (1, 2)]
    cosine = torch.nn.functional.cosine_similarity
    expected = sum(cosine(A[i], A[j], dim=0) for i, j in pairs) / 3 / 2  # B = 0 counts as 0
    close(palora.cosine_diversity(model), expected)
    palora.cosine_diversity(model).backward()
    assert model.palora_B.grad.isfinite().all()
    fill(model)
    A, B = model.palora_A.flatten(1), model.palora_B.flatten(1)
    expected = sum(cosine(S[i], S[j], dim=0) for S in (A, B) for i, j in pairs) / 3 / 2
    close(palora.cosine_diversity(model), expected)


@pytest.mark.parametrize("kind", ["tchebycheff", "smooth-tchebycheff"])
def test_the_ideal_point_may_be_a_list(kind: Any) -> None:
    values, lam = torch.tensor([1.0, 3.0]), torch.tensor([0.25, 0.75])
    found = palora.scalarize(values, lam, kind, reference=[0.5, 1.0], smoothing=0.1)
    terms = [0.25 * 0.5, 0.75 * 2.0]
    smooth = 0.1 * math.log(sum(math.exp(t / 0.1) for t in terms))
    assert found.item() == pytest.approx(max(terms) if kind == "tchebycheff" else smooth, rel=1e-6)


def test_arguments_that_carry_the_batch_can_be_named() -> None:
    """A table of as many rows as the batch is not tiled where it does not belong to it."""

    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return self.layer(x + table.mean(0)) + table.shape[0]

    model = fill(palora.inject(Looked(), 2, rank=1))
    batch = ((torch.randn(4, 3), torch.randn(4, 3)), torch.zeros(4))

    def scores(out: Tensor, target: Tensor) -> list[Tensor]:
        return [out[:, 0].mean(), out[:, 1].mean()]

    out = palora.step_loss(model, scores, batch, RAYS, batch_args=[0])
    for lam, found in zip(RAYS, out.losses, strict=True):
        with palora.preference(model, lam):
            expected = model(*batch[0]).mean(0)
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-5)
