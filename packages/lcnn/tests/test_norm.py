from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import lcnn
from lcnn.core.norm import LipschitzSyncBatchNorm

KINDS = [
    (nn.BatchNorm1d, lcnn.LipschitzBatchNorm1d, (6, 4)),
    (nn.BatchNorm2d, lcnn.LipschitzBatchNorm2d, (6, 4, 3, 2)),
    (nn.BatchNorm3d, lcnn.LipschitzBatchNorm3d, (6, 4, 2, 3, 2)),
]


def warmed(norm: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    for _ in range(3):
        norm(torch.randn(shape) * torch.tensor([0.5, 1, 2, 3]).view(-1, *[1] * (len(shape) - 2)))
    return norm


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("plain", "ours", "shape"), KINDS)
def test_bitwise_batch_norm_below_gamma(
    plain: type, ours: type, shape: tuple[int, ...], affine: bool
) -> None:
    bn = plain(4, affine=affine)
    if affine:
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
    norm = lcnn.from_batchnorm(copy.deepcopy(bn), lipschitz=1e6)
    assert type(norm) is ours
    for train in (True, True, False):
        bn.train(train)
        norm.train(train)
        x = torch.randn(shape)
        assert torch.equal(bn(x), norm(x))
    for name, value in bn.state_dict().items():
        assert torch.equal(value, norm.state_dict()[name])


@pytest.mark.parametrize("gamma", [0.05, 0.4, 100.0])
@pytest.mark.parametrize("affine", [False, True])
def test_slope_in_evaluation_is_exactly_the_smaller_one(gamma: float, affine: bool) -> None:
    norm = lcnn.LipschitzBatchNorm2d(4, affine=affine, lipschitz=gamma, dtype=torch.float64)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    norm.running_var.copy_(torch.tensor([0.3, 4.0, 2.0, 0.7]))
    norm.eval()
    a, b = torch.randn(2, 50, 4, 3, 3, dtype=torch.float64)
    gain = (norm(a) - norm(b)).flatten(1).norm(dim=1) / (a - b).flatten(1).norm(dim=1)
    slope = norm.slope().item()
    weight = norm.weight.abs() if affine else torch.ones(4, dtype=torch.float64)
    channel_slopes = weight / (norm.running_var + 1e-5).sqrt()
    assert slope == pytest.approx(min(channel_slopes.max().item(), gamma), rel=1e-12)
    assert (gain <= slope * (1 + 1e-6)).all()
    steepest = torch.zeros(1, 4, 1, 1, dtype=torch.float64)
    steepest[0, channel_slopes.argmax()] = 1
    attained = (norm(steepest) - norm(0 * steepest)).norm().item()
    assert attained == pytest.approx(slope, rel=1e-9)


def test_affine_shift_is_not_scaled() -> None:
    bn = nn.BatchNorm1d(2)
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([2.0, -3.0]))
        bn.bias.copy_(torch.tensor([5.0, -7.0]))
    bn.eval()
    norm = lcnn.from_batchnorm(bn, lipschitz=0.5)
    x = torch.randn(4, 2)
    slope = 3 / math.sqrt(1 + 1e-5)
    torch.testing.assert_close(norm(x), 0.5 / slope * (bn(x) - bn.bias) + bn.bias)


def test_training_uses_the_variance_before_the_update_without_gradient() -> None:
    norm = lcnn.LipschitzBatchNorm1d(3, lipschitz=0.4)
    norm.running_var.copy_(torch.tensor([0.5, 2.0, 3.0]))
    before = norm.running_var.clone()
    x = torch.randn(64, 3) * 5
    y = norm(x)
    want = (
        0.4 * (before + 1e-5).sqrt().min() * nn.functional.batch_norm(x, None, None, training=True)
    )
    torch.testing.assert_close(y, want)
    assert not torch.equal(norm.running_var, before)
    assert norm.num_batches_tracked == 1


def test_batch_statistics_bound_the_training_map_exactly_and_are_differentiable() -> None:
    norm = lcnn.LipschitzBatchNorm1d(3, lipschitz=0.4, stats="batch").double()
    x = (torch.randn(64, 3, dtype=torch.float64) * torch.tensor([0.1, 1.0, 5.0])).requires_grad_()
    m = (x.var(0, correction=0) + 1e-5).sqrt().min()
    want = 0.4 * m * nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(norm(x), want)
    seed = torch.randn(64, 3, dtype=torch.float64)
    got = torch.autograd.grad(norm(x), x, seed)[0]
    torch.testing.assert_close(got, torch.autograd.grad(want, x, seed)[0])


def test_gamma_has_a_gradient_only_where_it_clips_and_half_at_a_tie() -> None:
    x = torch.randn(16, 3, dtype=torch.float64)
    grads = {}
    for gamma in (0.5, 1.0, 2.0):
        norm = lcnn.LipschitzBatchNorm1d(3, eps=2.0**-40, lipschitz=gamma).double()
        norm.running_var.fill_(1 - 2.0**-40)
        norm(x).square().sum().backward()
        grads[gamma] = norm.log_lipschitz.grad.item()
    energy = (
        nn.functional.batch_norm(x, None, None, training=True, eps=2.0**-40).square().sum().item()
    )
    assert grads[2.0] == 0
    assert grads[1.0] == pytest.approx(energy, rel=1e-6)  # half of 2 Gamma^2 energy
    assert grads[0.5] == pytest.approx(2 * 0.25 * energy, rel=1e-6)


def test_all_zero_weights_stay_finite() -> None:
    bn = nn.BatchNorm2d(2)
    nn.init.zeros_(bn.weight)
    norm = lcnn.from_batchnorm(bn)
    norm(torch.randn(4, 2, 3, 3)).sum().backward()
    assert norm.slope() < 1e-30
    assert norm.log_lipschitz.grad.isfinite()


def test_without_running_statistics_the_batch_serves() -> None:
    norm = lcnn.LipschitzBatchNorm1d(2, track_running_stats=False, lipschitz=0.1).eval()
    assert norm(torch.randn(8, 2)).std() < 1
    with pytest.raises(RuntimeError, match="running statistics"):
        norm.slope()


def test_momentum_none_averages() -> None:
    plain, ours = nn.BatchNorm1d(2, momentum=None), lcnn.LipschitzBatchNorm1d(2, momentum=None)
    for _ in range(3):
        x = torch.randn(8, 2)
        plain(x)
        ours(x)
    assert torch.equal(plain.running_var, ours.running_var)


def test_sync_batch_norm_in_evaluation() -> None:
    for affine in (True, False):
        bn = nn.SyncBatchNorm(3, affine=affine)
        bn.running_var.fill_(0.25)
        bn.eval()
        norm = lcnn.from_batchnorm(bn, lipschitz=0.5)
        assert type(norm) is LipschitzSyncBatchNorm
        x = torch.randn(4, 3, 2, 2)
        torch.testing.assert_close(norm(x), bn(x) * 0.5 * math.sqrt(0.25 + 1e-5))
    with pytest.raises(ValueError, match="'running' for SyncBatchNorm"):
        LipschitzSyncBatchNorm(3, stats="batch")


def test_channels_last_is_kept() -> None:
    x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    y = lcnn.LipschitzBatchNorm2d(4)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("value", [0.0, -2.0, math.nan])
def test_bad_arguments(value: float) -> None:
    with pytest.raises(ValueError, match="lipschitz must be a positive finite number"):
        lcnn.LipschitzBatchNorm2d(3, lipschitz=value)
    with pytest.raises(ValueError, match="stats must be"):
        lcnn.LipschitzBatchNorm2d(3, stats="none")
    with pytest.raises(TypeError, match="from_batchnorm takes"):
        lcnn.from_batchnorm(nn.GroupNorm(1, 3))
    with pytest.raises(ValueError, match="expected 4D"):
        lcnn.LipschitzBatchNorm2d(3)(torch.zeros(2, 3))


def test_repr_shows_gamma() -> None:
    assert "lipschitz=10, stats='running'" in repr(lcnn.LipschitzBatchNorm2d(3))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_gradients_of_a_clipping_layer_are_those_of_the_step(
    affine: bool, backend: str
) -> None:
    norm = lcnn.LipschitzBatchNorm2d(3, affine=affine, lipschitz=0.5).double()
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    want = 0.5 * (x - x.mean((0, 2, 3), keepdim=True))
    want = want / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    want = want * math.sqrt(1 + 1e-5)  # m of the initial running variance, 1
    torch.compile(norm, backend=backend, fullgraph=True)(x).mul(x.abs()).sum().backward()
    assert norm.log_lipschitz.grad is not None
    # y is proportional to Gamma here
    torch.testing.assert_close(norm.log_lipschitz.grad, (want * x.abs()).sum())


def test_class_method_keeps_the_layer_and_refuses_another_kind() -> None:
    plain = nn.BatchNorm2d(2)
    plain(torch.randn(4, 2, 3, 3))
    made = lcnn.LipschitzBatchNorm2d.from_batchnorm(plain, lipschitz=3.0)
    assert made.lipschitz.item() == pytest.approx(3)
    assert made.running_var is plain.running_var
    with pytest.raises(TypeError, match=r"LipschitzBatchNorm1d\.from_batchnorm got BatchNorm2d"):
        lcnn.LipschitzBatchNorm1d.from_batchnorm(plain)
    assert "lipschitz=?" in repr(lcnn.LipschitzBatchNorm2d(2, device="meta"))
