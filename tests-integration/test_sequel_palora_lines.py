"""sequel-cl, palora and lines-merge: adapters learn one task after another, then become checkpoints to merge."""

from __future__ import annotations

import copy

import lines_merge as lm
import palora
import pytest
import sequel
import torch
from torch import Tensor, nn

BLOCKS, WIDTH, CLASSES = 4, 12, 4
SETTING = [0.5, 0.5]


class Net(nn.Module):
    """A residual network with blocks by number, and two heads: the class, and how sure it is."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, CLASSES + 1)
        for block in self.blocks:
            nn.init.orthogonal_(block.weight)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def task(number: int, count: int = 128) -> tuple[Tensor, Tensor]:
    """Clusters whose centres differ from task to task, and their labels."""
    generator = torch.Generator().manual_seed(number)
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    y = torch.randint(CLASSES, (count,), generator=generator)
    return centres[y] + 0.5 * torch.randn(count, WIDTH, generator=generator), y


def losses(out: Tensor, y: Tensor) -> list[Tensor]:
    correct = (out[:, :CLASSES].argmax(1) == y).float()
    return [
        nn.functional.cross_entropy(out[:, :CLASSES], y),
        nn.functional.binary_cross_entropy_with_logits(out[:, CLASSES], correct),
    ]


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with palora.preference(model, SETTING):
        return model(x)[:, :CLASSES]


def stream(
    lam: float,
) -> tuple[nn.Module, nn.Module, list[dict[str, Tensor]], sequel.torch.EWC, Tensor]:
    """Two tasks in a foreign loop; what came out: base, model, checkpoints, EWC, weighted drift."""
    torch.manual_seed(0)
    base = Net()
    model = palora.inject(copy.deepcopy(base), ["class", "sure"], rank=2, train_base=False)
    ewc = sequel.torch.EWC(model, lam, params=lambda name, p: "palora" in name)
    checkpoints = []
    for number in range(2):
        x, y = task(number)
        optimizer = torch.optim.Adam(palora.param_groups(model, lr=4e-3))
        for _ in range(60):
            out = palora.step_loss(model, losses, (x, y), [[0.8, 0.2], [0.2, 0.8]])
            optimizer.zero_grad()
            out.loss.backward()
            ewc.add_grad_()
            optimizer.step()
        if number:
            before, omega = ewc.anchor.get(), ewc.omega.get()
            drift = sum(
                (omega[n] * (p.detach() - before[n]) ** 2).sum() for n, p in ewc.current().items()
            )
        ewc.consolidate([(x, y)], forward=logits)
        checkpoints.append(palora.merge(model, SETTING).state_dict())
    return base, model, checkpoints, ewc, drift


@pytest.fixture(scope="module")
def learned() -> tuple[nn.Module, nn.Module, list[dict[str, Tensor]], sequel.torch.EWC, Tensor]:
    return stream(lam=200.0)


def test_only_adapters_are_kept_and_trained(learned) -> None:
    base, model, _, ewc, _ = learned
    adapters = {name for name, _ in model.named_parameters() if "palora" in name}
    assert set(ewc.names) == adapters
    state = model.state_dict()
    for name, value in base.state_dict().items():
        assert torch.equal(state[name], value), name
    assert all(value.sum() > 0 for name, value in ewc.omega.get().items() if "blocks" in name)


def test_importance_holds_the_first_task_s_adapters_in_place(learned) -> None:
    """What EWC weighs, sum of omega times squared drift, is smaller than without it."""
    free = stream(lam=0.0)[-1]
    assert learned[-1] < 0.5 * free


def test_fisher_under_a_preference_is_the_mean_of_squared_gradients(learned) -> None:
    """The second task's share of omega, sample by sample."""
    _, model, _, _, _ = learned
    x, y = task(3, count=6)
    fresh = sequel.torch.EWC(model, 1.0, mode="last", params=lambda name, p: "palora" in name)
    fresh.consolidate([(x[:4], y[:4]), (x[4:], y[4:])], forward=logits)
    assert fresh.penalty().item() == 0.0  # at the anchor
    params = [p for name, p in model.named_parameters() if "palora" in name]
    want = [torch.zeros_like(p) for p in params]
    for i in range(6):
        loss = nn.functional.cross_entropy(logits(model, x[i : i + 1]), y[i : i + 1])
        for total, g in zip(want, torch.autograd.grad(loss, params), strict=True):
            total += g**2 / 6
    for found, value in zip(fresh.omega.get().values(), want, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-9)


def test_the_merged_adapters_are_checkpoints_like_any_other(learned) -> None:
    base, _, checkpoints, _, _ = learned
    assert set(checkpoints[0]) == set(base.state_dict())  # no trace of the adapters
    merged = lm.merge(base, checkpoints, alpha=0.2, beta=0.6)
    for name, start in base.state_dict().items():
        depth = int(name.split(".")[1]) / (BLOCKS - 1) if name.startswith("blocks") else 0.0
        delta = sum(state[name].double() - start.double() for state in checkpoints)
        want = start.double() + (0.2 + 0.6 * depth) * delta
        torch.testing.assert_close(merged[name].double(), want, rtol=1e-6, atol=1e-7)
    model = Net()
    model.load_state_dict(merged)
    assert model(task(0)[0]).isfinite().all()
