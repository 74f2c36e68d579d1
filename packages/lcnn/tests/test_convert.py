from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lcnn
from lcnn import CenteredSoftplus, ConvSpectralNorm
from lcnn.core.norm import LipschitzBatchNormAct2d, LipschitzNorm

X = torch.rand(2, 3, 32, 32)


def kinds(model: nn.Module, kind: type) -> int:
    return sum(isinstance(m, kind) for m in model.modules())


def plain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.GroupNorm(2, 8),
        nn.LeakyReLU(),
        nn.Flatten(),
        nn.Linear(392, 16),
        nn.ReLU6(),
        nn.Linear(16, 4),
    )


class Functional(nn.Module):
    """A network that calls its activations as functions, in all the ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = x + torch.relu(self.b(x)) + self.b(x).relu()
        return self.c(F.relu(input=x, inplace=True))


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x)) if x.sum() > 0 else x


class Moody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(self.a(x)), training=self.training)


def test_report_lists_what_changed_and_what_did_not() -> None:
    model = plain()
    made = lcnn.convert(model, X)
    report = made.lcnn_report
    assert [e.name for e in report.converted] == ["0", "1", "2", "4", "6", "9", "10"]
    left = {e.name: e.note for e in report.left}
    assert "not smooth" in left["3"]
    assert "depends on the data" in left["5"]
    assert "linear='all'" in left["8"]
    notes = {e.name: e.note for e in report.converted}
    assert "upper cut" in notes["9"]
    assert "negative slope" in notes["6"]
    assert "LipschitzBatchNorm2d" in str(report)
    assert str(report).splitlines()[0].split() == ["name", "was", "is", "note"]
    assert not hasattr(model, "lcnn_report")
    assert isinstance(model[2], nn.ReLU)  # a copy was converted
    assert isinstance(lcnn.convert(model, X, inplace=True)[2], CenteredSoftplus)
    assert isinstance(model[2], CenteredSoftplus)


def test_example_pass_leaves_statistics_and_modes_alone() -> None:
    model = plain().train()
    model[1].eval()
    made = lcnn.convert(model, X)
    assert made[1].num_batches_tracked == 0
    assert made[1].running_mean.eq(0).all()
    assert made.training
    assert not made[1].training


def test_second_conversion_changes_nothing() -> None:
    made = lcnn.convert(plain(), X)
    again = lcnn.convert(made, X)
    assert str(again) == str(made)
    assert lcnn.convert(made, X, inplace=True) is made
    for a, b in zip(made.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    del again.lcnn_report  # as a state that does not know of the first conversion
    assert str(lcnn.convert(again, X)) == str(made)


def test_switches() -> None:
    made = lcnn.convert(plain(), X, activation="keep", norm="keep", conv="none", linear="none")
    assert str(made) == str(plain())
    made = lcnn.convert(plain(), X, linear="all", conv="reshape")
    assert kinds(made, ConvSpectralNorm) == 0
    assert sum("spectral" in e.new for e in made.lcnn_report.converted) == 2
    assert sum("reshaped" in e.new for e in made.lcnn_report.converted) == 2
    made = lcnn.convert(plain(), X, include=lambda name, module: name != "2")
    assert isinstance(made[2], nn.ReLU)
    assert {e.name: e.note for e in made.lcnn_report.left}["2"] == "excluded by include"
    silu = nn.Sequential(nn.Linear(2, 2), nn.SiLU())
    assert "activations=" in lcnn.convert(silu).lcnn_report.left[0].note
    assert isinstance(lcnn.convert(silu, activations=(nn.SiLU,))[1], CenteredSoftplus)


def test_sharing_beta() -> None:
    channel = lcnn.convert(plain(), X, share_beta="channel")
    assert channel[2].beta.shape == (6,)
    assert channel[9].beta.shape == (16,)
    one = lcnn.convert(plain(), X, share_beta="model")
    assert one[2].log_beta is one[9].log_beta
    assert lcnn.penalty(one, beta=1.0, lipschitz=0.0).item() == pytest.approx(5, rel=1e-6)
    assert len(lcnn.param_groups(one)[1]["params"]) == 1
    with pytest.raises(ValueError, match="needs the channel counts"):
        lcnn.convert(nn.Sequential(nn.ReLU()), share_beta="channel")


def test_functional_calls_get_modules_of_their_own() -> None:
    made = lcnn.convert(Functional(), torch.randn(5, 4), linear="none")
    assert kinds(made, CenteredSoftplus) == 4
    reference = Functional()
    reference.load_state_dict({k: v for k, v in made.state_dict().items() if "log_beta" not in k})
    x = torch.randn(5, 4)
    for module in made.modules():
        if isinstance(module, CenteredSoftplus):
            module.log_beta.data.fill_(12.0)  # beta = 160,000: ReLU to some 1e-5
    torch.testing.assert_close(made(x), reference(x), rtol=0, atol=1e-3)
    assert (
        kinds(lcnn.convert(Functional(), linear="none"), CenteredSoftplus) == 4
    )  # from the source
    copied = copy.deepcopy(made)
    assert torch.equal(copied(x), made(x))


@pytest.mark.parametrize(("net", "why"), [(Untraceable, "control flow"), (Moody, "self.training")])
def test_untraceable_forwards_are_reported(net: type, why: str) -> None:
    with pytest.warns(UserWarning, match="cannot be traced"):
        made = lcnn.convert(nn.Sequential(net()), torch.ones(2, 4))
    entry = made.lcnn_report.left[0]
    assert entry.name == "0"
    assert why in entry.note


def test_one_module_called_twice_is_split_by_fx_or_counted_once() -> None:
    class Twice(nn.Module):
        def __init__(self, branch: bool) -> None:
            super().__init__()
            self.a, self.b, self.act, self.branch = (
                nn.Linear(4, 4),
                nn.Linear(4, 4),
                nn.ReLU(),
                branch,
            )

        def forward(self, x: Tensor) -> Tensor:
            if self.branch and x.sum() > 1e9:
                return x
            return self.act(self.b(self.act(self.a(x))))

    split = lcnn.convert(Twice(False), torch.ones(2, 4))
    assert kinds(split, CenteredSoftplus) == 2
    with pytest.warns(UserWarning, match="calls one activation several times"):
        shared = lcnn.convert(Twice(True), torch.ones(2, 4))
    assert kinds(shared, CenteredSoftplus) == 1
    assert any("counted once" in e.note for e in shared.lcnn_report.entries)
    act = nn.ReLU()
    both = lcnn.convert(nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act))
    assert lcnn.penalty(both, beta=1.0).item() == pytest.approx(5, rel=1e-6)
    assert any("shared with an earlier name" in e.note for e in both.lcnn_report.entries)


def test_layers_never_reached_are_left_with_a_warning() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.live, self.dead = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.live(x)

    with pytest.warns(UserWarning, match="dead .* never reached"):
        made = lcnn.convert(Dead(), X)
    assert made.lcnn_report.left[0].note == "never reached by the example forward"


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="pass example_input"):
        lcnn.convert(plain())
    for name in ("activation", "norm", "conv", "linear", "share_beta"):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            lcnn.convert(plain(), X, **{name: "other"})
    with pytest.raises(ValueError, match="beta_init must be a positive"):
        lcnn.convert(plain(), X, beta_init=-1.0)
    with pytest.raises(ValueError, match="lipschitz_init must be a positive"):
        lcnn.convert(plain(), X, lipschitz_init=0.0)
    with pytest.raises(TypeError, match=r"0 .*is lazy"):
        lcnn.convert(nn.Sequential(nn.LazyConv2d(2, 3)), X)
    with pytest.raises(TypeError, match=r"0 .*is lazy"):
        lcnn.convert(nn.Sequential(nn.LazyBatchNorm2d()))
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3))
    with pytest.raises(TypeError, match=r"0 .*already has a parametrized weight"):
        lcnn.convert(nn.Sequential(normed), X)
    with pytest.raises(ValueError, match="calibrate=True needs"):
        lcnn.convert(nn.Sequential(nn.ReLU()), calibrate=True)

    class Quantized(nn.Conv2d):
        pass

    Quantized.__module__ = "torch.ao.nn.quantized"
    with pytest.raises(TypeError, match="is quantised"):
        lcnn.convert(nn.Sequential(Quantized(3, 3, 3)), X)


def nets() -> dict[str, Any]:
    import timm
    import torchvision

    vision, image = torchvision.models, {"num_classes": 7}
    return {
        "torchvision resnet18": lambda: vision.resnet18(**image),
        "torchvision densenet": lambda: vision.DenseNet(8, (2, 2), 16, **image),
        "torchvision mobilenet": lambda: vision.mobilenet_v2(width_mult=0.25, **image),
        "timm resnet18d": lambda: timm.create_model("resnet18d", pretrained=False, **image),
        "timm mobilenetv2": lambda: timm.create_model("mobilenetv2_035", pretrained=False, **image),
    }


@pytest.mark.parametrize("name", list(nets()))
def test_published_architectures(name: str) -> None:
    model = nets()[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = lcnn.convert(model, X)
    assert kinds(made, nn.ReLU) == kinds(made, nn.ReLU6) == 0
    assert kinds(made, LipschitzNorm) == kinds(model, nn.BatchNorm2d)
    assert kinds(made, ConvSpectralNorm) == kinds(model, nn.Conv2d)
    assert lcnn.convert(made, X).state_dict().keys() == made.state_dict().keys()
    criterion = lcnn.LCNNLoss(made, gradnorm=1e-3)
    criterion(X, torch.tensor([0, 1])).backward()
    assert all(p.grad is not None for p in made.parameters())
    made.eval()
    restored = lcnn.restore(made)
    assert kinds(restored, CenteredSoftplus) == kinds(restored, LipschitzNorm) == 0
    torch.testing.assert_close(restored(X), made(X), rtol=1e-5, atol=1e-5)
    lcnn.load_pretrained(made, model.state_dict())


def test_torchvision_block_has_two_activations() -> None:
    import torchvision

    made = lcnn.convert(torchvision.models.resnet18(num_classes=3), X)
    assert kinds(made, CenteredSoftplus) == 17  # one after the stem, two in each of eight blocks
    assert type(made.layer1[0]).__name__ == "BasicBlock"


def test_timm_fused_norm_and_activation() -> None:
    from timm.layers import BatchNormAct2d

    model = nn.Sequential(BatchNormAct2d(3), nn.Conv2d(3, 2, 1)).eval()
    made = lcnn.convert(model, X, lipschitz_init=1e6)
    assert type(made[0]) is LipschitzBatchNormAct2d
    assert isinstance(made[0].act, CenteredSoftplus)
    made[0].act.log_beta.data.fill_(12.0)
    torch.testing.assert_close(made[0](X), model[0](X), rtol=0, atol=1e-4)
    assert {"0.weight", "0.running_mean", "0.act.log_beta"} <= set(made.state_dict())
    torch.testing.assert_close(lcnn.restore(made)(X), made(X), rtol=1e-5, atol=1e-6)


def test_state_dict_keys_are_final_and_documented() -> None:
    made = lcnn.convert(plain(), X)
    keys = set(made.state_dict())
    assert {"2.log_beta", "1.log_lipschitz", "1.running_var"} <= keys
    assert {
        f"0.parametrizations.weight.{k}" for k in ("original", "0._u", "0._v", "0._sigma")
    } <= keys
    made(X)
    assert set(made.state_dict()) == keys


def test_round_trips(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    made = lcnn.convert(plain(), X)
    made(X)
    made.eval()
    want = made(X)
    save_file(made.state_dict(), tmp_path / "a.safetensors")
    other = lcnn.convert(plain(), X).eval()
    other.load_state_dict(load_file(tmp_path / "a.safetensors"))
    assert torch.equal(other(X), want)
    assert torch.equal(copy.deepcopy(made)(X), want)
    assert torch.equal(pickle.loads(pickle.dumps(made))(X), want)
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(X), want)


def test_checkpoint_of_the_unconverted_network_loads() -> None:
    model = plain()
    made = lcnn.convert(plain(), X, linear="all")
    lcnn.load_pretrained(made, model.state_dict())
    assert torch.equal(made[0].parametrizations.weight.original, model[0].weight)
    assert torch.equal(made[8].parametrizations.weight.original, model[8].weight)
    made.eval()
    norm = lcnn.conv_operator_norm(made[0].weight.detach(), (32, 32), padding=1).item()
    assert norm == pytest.approx(1, abs=0.01)  # a hundred power steps
    with pytest.raises(RuntimeError, match="Unexpected key"):
        lcnn.load_pretrained(made, {**model.state_dict(), "extra": torch.zeros(1)})


def test_calibration_brings_a_trained_function_back() -> None:
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)
    )
    with torch.no_grad():
        net[1].weight.uniform_(0.5, 3)
        net[4].bias.normal_()
    batches = [torch.rand(16, 3, 12, 12) * 0.1 for _ in range(4)]
    lcnn.calibrate(net, batches)  # statistics of the plain network, too
    net.eval()
    made = lcnn.convert(net, batches[0], beta_init=1e4)
    before = (made(batches[0]) - net(batches[0])).abs().max()
    lcnn.calibrate(made, [(b, None) for b in batches])
    after = (made(batches[0]) - net(batches[0])).abs().max()
    # the statistics' 1e-5 weighs differently after the change of scale
    assert before > 0.1
    assert after < 0.02
    assert not made.training
    torch.testing.assert_close(
        lcnn.convert(net, batches[0], calibrate=True)[1].running_mean.shape, torch.Size([6])
    )
    with pytest.raises(ValueError, match="batches is empty"):
        lcnn.calibrate(made, [])


def test_restore_single_layers_and_refusals() -> None:
    norm = lcnn.LipschitzBatchNorm1d(3, lipschitz=0.5).eval()
    x = torch.randn(4, 3)
    torch.testing.assert_close(lcnn.restore(norm)(x), norm(x))
    act = CenteredSoftplus(2.0, num_parameters=3)
    torch.testing.assert_close(lcnn.restore(act)(x), act(x))
    last = CenteredSoftplus(2.0, num_parameters=3, channel_dim=-1)
    assert isinstance(lcnn.restore(last), CenteredSoftplus)
    sync = lcnn.from_batchnorm(nn.SyncBatchNorm(3)).eval()
    assert isinstance(lcnn.restore(nn.Sequential(sync))[0], nn.SyncBatchNorm)
    with pytest.raises(ValueError, match="no running statistics"):
        lcnn.restore(nn.Sequential(lcnn.LipschitzBatchNorm1d(3, track_running_stats=False)))


def test_restored_network_exports(tmp_path: Path) -> None:
    made = lcnn.convert(plain(), X)
    made(X)
    restored = lcnn.restore(made.eval()).eval()
    want = restored(X)
    program = torch.export.export(restored, (X,))
    torch.testing.assert_close(program.module()(X), want, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.__version__ < (2, 6), reason="onnx.export(dynamo=True) works from 2.6 on")
def test_restored_network_runs_in_onnxruntime(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    made = lcnn.convert(plain(), X)
    made(X)
    restored = lcnn.restore(made.eval()).eval()
    path = tmp_path / "a.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(restored, (X,), str(path), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), restored(X), rtol=1e-4, atol=1e-5)


def test_compiled_training_step_is_one_graph_and_equals_eager() -> None:
    made = lcnn.convert(plain(), X)
    twin = copy.deepcopy(made)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        a, b = made(X), compiled(X)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        a.square().sum().backward()
        b.square().sum().backward()
    for (name, p), q in zip(made.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3, msg=name)
    assert torch.allclose(
        made[0].parametrizations.weight[0]._u, twin[0].parametrizations.weight[0]._u, atol=1e-5
    )


def test_bfloat16_autocast_is_finite() -> None:
    made = lcnn.convert(plain(), X)
    with torch.autocast("cpu", torch.bfloat16):
        loss = lcnn.LCNNLoss(made)(X, torch.tensor([0, 1]))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in made.parameters())


class Classic(nn.Module):
    """ReLU as a function in the network's own forward, beside attributes and methods."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.classes = 4

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x))

    def predict(self, x: Tensor) -> Tensor:
        return self(x).argmax(1)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x))


def test_rewritten_network_keeps_class_attributes_methods_and_hooks() -> None:
    model = Classic()
    calls: list[int] = []
    model.register_forward_hook(lambda *a: calls.append(1))
    x = torch.randn(3, 4)
    made = lcnn.convert(model, x)
    calls.clear()
    assert isinstance(made, Classic)
    assert made.classes == 4
    made.eval()
    z = 5 * made.a(x)
    want = (F.softplus(z) - math.log(2)) / 5
    torch.testing.assert_close(made(x), want, rtol=1e-5, atol=1e-6)
    assert made.predict(x).tolist() == want.argmax(1).tolist()
    assert len(calls) == 2
    assert [e.name for e in made.lcnn_report.left] == ["features"]  # still ReLU, and said so
    assert type(model) is Classic
    same = lcnn.convert(model, x, inplace=True)
    assert same is model


def test_rewritten_network_pickles_and_copies() -> None:
    made = lcnn.convert(Functional(), torch.randn(5, 4)).eval()
    x = torch.randn(5, 4)
    for twin in (pickle.loads(pickle.dumps(made)), copy.deepcopy(copy.deepcopy(made))):
        assert isinstance(twin, Functional)
        assert torch.equal(twin(x), made(x))
        assert str(twin.lcnn_report) == str(made.lcnn_report)


class Standardised(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, 7 * self.weight, self.bias, self.stride, self.padding)


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 7 * super().forward(input)


class Named(nn.Conv2d):
    """A subclass that computes what its parent computes."""


def test_layers_with_a_forward_of_their_own_are_left() -> None:
    net = nn.Sequential(Standardised(3, 2, 3), Named(2, 2, 3), nn.Flatten(), Scaled(1568, 2))
    for conv in ("operator", "reshape"):
        report = lcnn.convert(net, X, conv=conv).lcnn_report
        assert [e.name for e in report.left] == ["0", "3"]
        assert all("forward of its own" in e.note for e in report.left)
        assert [e.name for e in report.converted] == ["1"]
    with pytest.raises(TypeError, match="Standardised has a forward of its own"):
        lcnn.conv_spectral_norm(Standardised(3, 2, 3), (8, 8))
    bound = lcnn.hessian_bound(lcnn.convert(net, X))
    assert bound.unbounded == ["0 (Standardised)", "3 (Scaled)"]


def test_same_padding_of_timm_is_left() -> None:
    from timm.layers import Conv2dSame

    net = nn.Sequential(Conv2dSame(3, 2, 5, stride=2), nn.AdaptiveAvgPool2d(1))
    left = lcnn.convert(net, torch.zeros(1, 3, 4, 4)).lcnn_report.left  # smaller than the kernel
    assert left[0].new == "Conv2dSame"


@pytest.mark.parametrize(
    ("layer", "shape", "new"),
    [
        (nn.ReLU(), (2, 3), "CenteredSoftplus"),
        (nn.BatchNorm1d(3), (2, 3), "LipschitzBatchNorm1d"),
        (nn.Conv1d(3, 2, 2), (2, 3, 5), "ParametrizedConv1d"),
        (nn.Linear(3, 2), (2, 3), "ParametrizedLinear"),
    ],
)
def test_a_single_layer_is_converted(layer: nn.Module, shape: tuple[int, ...], new: str) -> None:
    made = lcnn.convert(layer, torch.zeros(shape))
    assert type(made).__name__ == new
    assert len(made.lcnn_report.converted) == 1
    assert type(layer).__name__ != new


def test_excluded_convolutions_need_no_example() -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU())
    made = lcnn.convert(net, include=lambda name, module: isinstance(module, nn.ReLU))
    assert [e.name for e in made.lcnn_report.converted] == ["1"]


def test_calibration_takes_networks_of_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            out: Tensor = self.norm(x + y)
            return out

    x, y = torch.randn(9, 3), torch.randn(9, 3)
    made = lcnn.convert(Two(), (x, y), calibrate=True)
    torch.testing.assert_close(made.norm.running_mean, (x + y).mean(0))


def test_calibration_without_data_leaves_the_statistics_alone() -> None:
    made = lcnn.convert(nn.Sequential(nn.BatchNorm1d(3)))
    made(torch.randn(9, 3))
    before = made[0].running_var.clone()
    with pytest.raises(ValueError, match="batches is empty"):
        lcnn.calibrate(made, [])
    assert torch.equal(made[0].running_var, before)
