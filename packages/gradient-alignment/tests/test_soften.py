from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradient_alignment as ga


class Block(nn.Module):
    """A residual block as torchvision writes it: one in-place ReLU module, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + x)


class Functional(nn.Module):
    """Calls ReLU in every functional way, and two kinks that are no ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x), inplace=True)
        x = torch.relu(x - 0.5)
        x = (x - 0.1).relu()
        x = F.leaky_relu(x) + x.clamp(min=-1)
        return F.relu(input=self.b(x))


class Untraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) if x.sum() > 0 else x


class UntraceableModule(nn.Module):
    """Branches on values, and calls a ReLU module that happens to be named relu."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x) if x.sum() > 0 else x


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "convnext_atto", "vgg11"])
def test_timm_networks_are_softened_in_place_with_their_state_dict(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=5)
    before, relus = copy.deepcopy(model.state_dict()), count(model, nn.ReLU)
    softened, report = ga.soften(model, report=True)
    assert softened is model
    assert count(model, nn.ReLU) == 0
    assert len(report.modules) >= relus
    assert report.calls == []
    assert before.keys() == model.state_dict().keys()
    assert count(model, nn.Softplus) == relus


def test_softened_timm_network_trains_with_score_matching():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = ga.soften(timm.create_model("resnet18", pretrained=False, num_classes=3))
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([0, 2])
    loss = ga.RegularizedLoss(model, ga.ScoreMatching())
    loss(x, y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert loss.terms["ScoreMatching.trace"].abs() > 0


def test_a_shared_relu_module_is_replaced_under_every_name():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(2, 2), relu, nn.Linear(2, 2), relu)
    softened, report = ga.soften(model, report=True)
    assert report.modules == ["1", "3"]
    assert count(softened, nn.ReLU) == 0


def test_torchvision_style_blocks_compute_softplus_where_relu_was():
    torch.manual_seed(0)
    block = Block().eval()
    x = torch.randn(2, 4, 6, 6)
    softened, report = ga.soften(copy.deepcopy(block), beta=7.0, report=True)
    out = F.softplus(block.bn1(block.conv1(x)), 7.0)
    expected = F.softplus(block.bn2(block.conv2(out)) + x, 7.0)
    torch.testing.assert_close(softened(x), expected, rtol=1e-6, atol=1e-6)
    assert (report.modules, report.calls, report.untouched) == (["relu"], [], {})


def test_functional_calls_are_replaced_in_the_traced_graph():
    torch.manual_seed(0)
    model = Functional().double()
    x = torch.randn(5, 3, dtype=torch.float64)
    softened, report = ga.soften(model, beta=5.0, report=True)
    h = F.softplus(model.a(x), 5.0)
    h = F.softplus(h - 0.5, 5.0)
    h = F.softplus(h - 0.1, 5.0)
    h = F.leaky_relu(h) + h.clamp(min=-1)
    torch.testing.assert_close(softened(x), F.softplus(model.b(h), 5.0), rtol=0, atol=1e-14)
    assert len(report.calls) == 4
    assert sorted(report.untouched) == ["clamp", "leaky_relu"]
    assert "replaced 0 modules and 4 calls, 2 untouched" in str(report)
    assert dict(softened.named_parameters()).keys() == dict(model.named_parameters()).keys()
    for copied in (copy.deepcopy(softened), pickle.loads(pickle.dumps(softened))):
        torch.testing.assert_close(copied(x), softened(x), rtol=0, atol=0)


class InPlace(nn.Module):
    """ReLU as a statement: its result is read from the argument."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(3, 4), nn.Linear(4, 2), how

    def forward(self, x):
        x = self.a(x)
        before = x * 2
        if self.how == "method":
            x.relu_()
        elif self.how == "inplace":
            F.relu(x, inplace=True)
        else:
            torch.relu_(x)
        return self.b(x) + before[:, :2]


@pytest.mark.parametrize("how", ["method", "inplace", "function"])
def test_calls_that_overwrite_their_argument_are_replaced(how):
    torch.manual_seed(0)
    model = InPlace(how)
    x = torch.randn(5, 3)
    h = model.a(x)
    expected = model.b(F.softplus(h, 5.0)) + 2 * h[:, :2]
    torch.testing.assert_close(ga.soften(model, beta=5.0)(x), expected, rtol=0, atol=1e-6)


def test_modes_of_traced_layers_stay():
    model = nn.Sequential(Functional(), nn.BatchNorm1d(2), nn.Dropout(0.5))
    model[1].eval()
    softened = ga.soften(model)
    assert softened.training
    assert not softened.get_submodule("1").training
    assert softened.get_submodule("2").training


def test_calls_stay_where_they_are_not_wanted():
    model = Functional()
    assert ga.soften(model, functional=False) is model


def test_untraceable_networks_are_returned_with_a_warning_and_a_report():
    model = nn.Sequential(nn.ReLU(), Untraceable())
    with pytest.warns(UserWarning, match=r"functional ReLUs in Untraceable were not replaced"):
        softened, report = ga.soften(model, report=True)
    assert softened is model
    assert report.modules == ["0"]
    assert "torch.fx cannot trace it" in report.untouched["relu in Untraceable.forward"]
    assert "untouched  relu in Untraceable.forward" in str(report)


def test_a_submodule_named_relu_is_no_functional_call():
    softened, report = ga.soften(UntraceableModule(), report=True)
    assert report.modules == ["relu"]
    assert report.untouched == {}
    assert isinstance(softened.relu, nn.Softplus)


def test_other_kinks_are_named():
    _, report = ga.soften(nn.Sequential(nn.LeakyReLU(), nn.ReLU6(), nn.GELU()), report=True)
    assert list(report.untouched) == ["0", "1"]
    assert "LeakyReLU is piecewise linear" in report.untouched["0"]


@pytest.mark.parametrize("training", [True, False])
def test_transformer_layers_of_torch_get_softplus(training):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(training)
    x = torch.randn(2, 3, 8)
    _, report = ga.soften(layer, report=True)
    assert report.modules == ["activation"]
    with torch.no_grad():
        h = layer.norm1(x + layer.self_attn(x, x, x, need_weights=False)[0])
        expected = layer.norm2(h + layer.linear2(F.softplus(layer.linear1(h), 10.0)))
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_a_bare_relu_becomes_a_softplus():
    softened, report = ga.soften(nn.ReLU(), report=True)
    assert isinstance(softened, nn.Softplus)
    assert softened.beta == 10.0
    assert report.modules == [""]
    assert isinstance(ga.soften(nn.ReLU()), nn.Softplus)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_beta(beta):
    with pytest.raises(ValueError, match="beta must be a finite number above 0"):
        ga.soften(nn.ReLU(), beta)
