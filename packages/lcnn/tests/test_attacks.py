from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lcnn


def linear() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A linear two-class model, its points, labels, and signed distances to the boundary."""
    net = nn.Linear(5, 2).double()
    x = torch.randn(200, 5, dtype=torch.float64)
    y = net(x).argmax(1)
    w = net.weight[1] - net.weight[0]
    margin = ((net(x)[:, 1] - net(x)[:, 0]) / w.norm()).abs().detach()
    return net, x, y, margin


def test_linear_model_is_attacked_optimally() -> None:
    net, x, y, margin = linear()
    for radius in (0.1, 0.5):
        want = (margin > radius).double().mean().item()
        got = lcnn.robust_accuracy(net, [(x, y)], [radius], steps=20, clip=None)[radius]
        assert got == pytest.approx(want, abs=1e-9)


def test_more_steps_never_help_a_linear_model() -> None:
    net, x, y, _ = linear()
    accuracies = [
        lcnn.robust_accuracy(net, [(x, y)], [0.5], steps=s, step_size=0.1, clip=None)[0.5]
        for s in (1, 2, 4, 8)
    ]
    assert accuracies == sorted(accuracies, reverse=True)


@pytest.mark.parametrize("start", [True, False])
def test_never_leaves_the_ball_nor_the_box(start: bool) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x = torch.rand(20, 1, 4, 4)
    adversarial = lcnn.pgd_l2(
        net, x, torch.arange(20) % 3, radius=0.7, random_start=start, restarts=2, steps=15
    )
    assert ((adversarial - x).flatten(1).norm(dim=1) <= 0.7 * (1 + 1e-6)).all()
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1


def test_radius_zero_is_the_identity() -> None:
    net, x, y, _ = linear()
    assert torch.equal(lcnn.pgd_l2(net, x, y, radius=0.0), x)


def test_zero_gradient_leaves_the_sample_unchanged() -> None:
    net = nn.Linear(4, 2)
    nn.init.zeros_(net.weight)
    x = torch.rand(3, 4)
    adversarial = lcnn.pgd_l2(net, x, torch.tensor([0, 1, 0]), radius=0.5, random_start=False)
    assert torch.equal(adversarial, x)


def test_targeted_attack_reaches_its_target() -> None:
    net, x, y, margin = linear()
    adversarial = lcnn.pgd_l2(
        net, x, 1 - y, radius=margin.max().item() * 1.1, steps=30, targeted=True, clip=None
    )
    assert torch.equal(net(adversarial).argmax(1), 1 - y)


def test_restarts_keep_the_worst_point() -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 3))
    x, y = torch.rand(40, 5), torch.arange(40) % 3
    loss = nn.CrossEntropyLoss(reduction="none")
    one = lcnn.pgd_l2(net, x, y, radius=1.0, steps=2)
    many = lcnn.pgd_l2(net, x, y, radius=1.0, steps=2, restarts=5)
    assert (loss(net(many), y) >= loss(net(one), y) - 1e-6).all()


def test_agrees_with_torchattacks_without_random_start() -> None:
    torchattacks = pytest.importorskip("torchattacks")
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 30), nn.Tanh(), nn.Linear(30, 3)).eval()
    x, y = torch.rand(20, 1, 4, 4), torch.arange(20) % 3
    theirs = torchattacks.PGDL2(net, eps=0.5, alpha=0.1, steps=7, random_start=False)(x, y)
    ours = lcnn.pgd_l2(net, x, y, radius=0.5, step_size=0.1, steps=7, random_start=False)
    # they add 1e-10 to the gradient's norm and work in single precision
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_agrees_with_foolbox_without_random_start() -> None:
    """As the how-to calls it; their point after seven steps of a fifth of the radius is ours."""
    foolbox = pytest.importorskip("foolbox")
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 30), nn.Tanh(), nn.Linear(30, 3)).eval()
    x = torch.rand(20, 1, 4, 4)
    y = net(x).argmax(1)
    steps = foolbox.attacks.L2PGD(rel_stepsize=0.2, steps=7, random_start=False)

    def attack(model: nn.Module, points: Tensor, labels: Tensor, radius: float) -> Tensor:
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=points.device)
        _, moved, _ = steps(wrapped, points, labels, epsilons=radius)
        return moved

    theirs = attack(net, x, y, 0.5)
    ours = lcnn.pgd_l2(net, x, y, radius=0.5, step_size=0.1, steps=7, random_start=False)
    assert not torch.equal(ours, x)
    # they divide by max(norm, 1e-12) and work in single precision
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    options = {"step_size": 0.1, "steps": 7, "random_start": False}
    robust = lcnn.robust_accuracy(net, [(x, y)], [0.5], attack)
    assert robust == lcnn.robust_accuracy(net, [(x, y)], [0.5], **options)
    assert robust[0.5] < 1


def test_own_attack_and_modes() -> None:
    net, x, y, _ = linear()
    net.train()
    calls: list[float] = []

    def attack(model: nn.Module, points: Tensor, labels: Tensor, radius: float) -> Tensor:
        assert not model.training
        calls.append(radius)
        return -points * 100

    result = lcnn.robust_accuracy(net, [(x, y), (x, y)], [0.0, 1.0], attack)
    assert result[0.0] == 1.0
    assert result[1.0] < 1
    assert calls == [1.0, 1.0]
    assert net.training


def test_autoattack_when_installed() -> None:
    pytest.importorskip("torchattacks")
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 10)).eval()
    x = torch.rand(4, 1, 4, 4)
    y = net(x).argmax(1)
    got = lcnn.robust_accuracy(net, [(x, y)], [0.0, 5.0], "autoattack")
    assert got[0.0] == 1.0
    assert got[5.0] <= lcnn.robust_accuracy(net, [(x, y)], [5.0])[5.0]


def test_bad_arguments() -> None:
    net, x, y, _ = linear()
    with pytest.raises(ValueError, match="radius must be"):
        lcnn.pgd_l2(net, x, y, radius=-1.0)
    with pytest.raises(ValueError, match="steps and restarts"):
        lcnn.pgd_l2(net, x, y, radius=1.0, steps=0)
    with pytest.raises(ValueError, match="attack must be"):
        lcnn.robust_accuracy(net, [(x, y)], [1.0], "fgsm")
    with pytest.raises(ValueError, match="no batches"):
        lcnn.robust_accuracy(net, [], [1.0])
