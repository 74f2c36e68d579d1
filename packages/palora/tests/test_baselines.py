from __future__ import annotations

import copy

import pytest
import torch
from conftest import close
from torch import nn

from palora.baselines import COSMOS, PHN, LinearScalarization, PaMaL, cosmos_loss

X = torch.randn(5, 4, dtype=torch.float64)
LAM = torch.tensor([0.25, 0.75])


def test_pamal_runs_at_the_mixed_weights() -> None:
    members = [
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double() for _ in range(2)
    ]
    model = PaMaL(members)
    mixed = copy.deepcopy(members[0])
    with torch.no_grad():
        for p, a, b in zip(*(m.parameters() for m in (mixed, *members)), strict=True):
            p.copy_(0.25 * a + 0.75 * b)
    close(model(LAM, X), mixed(X))
    assert sum(p.numel() for p in model.parameters()) == 2 * sum(
        p.numel() for p in mixed.parameters()
    )
    model(LAM, X).sum().backward()
    first, second = (m[0].weight.grad for m in members)
    close(3 * first, second)
    with pytest.raises(ValueError, match="at least 2 members"):
        PaMaL(members[:1])
    with pytest.raises(ValueError, match="one architecture"):
        PaMaL([nn.Linear(4, 2), nn.Linear(4, 3)])


def test_cosmos_appends_the_preference_to_features_or_channels() -> None:
    linear = nn.Linear(6, 3).double()
    close(COSMOS(linear)(LAM, X), linear(torch.cat([X, LAM.double().expand(5, 2)], 1)))
    conv = nn.Conv2d(3, 2, 1).double()
    image = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    planes = LAM.double().view(1, 2, 1, 1).expand(2, 2, 4, 4)
    close(COSMOS(conv)(LAM, image), conv(torch.cat([image, planes], 1)))
    with pytest.raises(ValueError, match="dimension 1"):
        COSMOS(linear)(LAM, X[0])
    losses = torch.tensor([2.0, 1.0], dtype=torch.float64)
    angle = (0.25 * 2 + 0.75) / (LAM.double().norm() * losses.norm())
    close(cosmos_loss(losses, LAM, 0.5), torch.tensor(1.25, dtype=torch.float64) - 0.5 * angle)


def test_phn_generates_every_weight_and_trains_only_itself() -> None:
    target = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    model = PHN(target, 2, hidden=7).double()
    ids = {id(p) for p in target.parameters()}
    assert len(ids) == 4  # the target itself is not touched
    assert not ids & {id(p) for p in model.parameters()}
    features = model.trunk(LAM.double())
    made = copy.deepcopy(target)
    with torch.no_grad():
        for head, parameter in zip(model.heads, made.parameters(), strict=True):
            parameter.copy_(head(features).view_as(parameter))
    close(model(LAM, X), made(X))
    model(LAM, X).sum().backward()
    assert all(p.grad is not None for p in model.trunk.parameters())
    assert all(p.grad is None for p in target.parameters())


def test_phn_follows_the_mode_and_keeps_the_statistics_of_its_target() -> None:
    target = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    model = PHN(target, 2, hidden=7).double()
    model(LAM, X)
    weight, bias = (head(model.trunk(LAM.double())) for head in list(model.heads)[:2])
    hidden = X @ weight.view(3, 4).t() + bias
    close(model.state_dict()["target.1.running_mean"], 0.1 * hidden.mean(0).detach())
    model.eval()
    close(model(LAM, X)[:2], model(LAM, X[:2]))  # no statistics of the batch


def test_linear_scalarisation_ignores_the_preference() -> None:
    net = nn.Linear(4, 2).double()
    assert torch.equal(LinearScalarization(net)(LAM, X), net(X))
