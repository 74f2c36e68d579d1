from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import lcnn
from lcnn.core.operator import ConvMap

GRID = [
    case
    for case in itertools.product((1, 3), (1, 2, 3), (0, 1, 2), (1, 2), (1, 2))
    if case[0] > 1 or case[3] == 1
]
MODES = ["zeros", "circular", "reflect", "replicate"]


def dense(conv: nn.Module, size: tuple[int, ...]) -> Tensor:
    """The matrix of the module itself, column by column."""
    channels = conv.in_channels
    n = channels * math.prod(size)
    columns = [
        conv(torch.eye(n, dtype=torch.float64)[i].view(1, channels, *size)).flatten()
        for i in range(n)
    ]
    return torch.stack(columns, 1)


def options(conv: Any) -> dict[str, Any]:
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    out = {name: getattr(conv, name) for name in names}
    if conv.transposed:
        out |= {"transposed": True, "output_padding": conv.output_padding}
    return out


@pytest.mark.parametrize(("k", "s", "p", "d", "g"), GRID)
def test_norm_is_the_largest_singular_value(k: int, s: int, p: int, d: int, g: int) -> None:
    conv = nn.Conv2d(4, 6, k, s, p, d, g, bias=False).double()
    size = (7, 5)
    with torch.no_grad():
        want = np.linalg.svd(dense(conv, size).numpy(), compute_uv=False)[0]
        power = lcnn.conv_operator_norm(conv.weight, size, **options(conv))
        exact = lcnn.conv_operator_norm(conv.weight, size, method="exact", **options(conv))
        fft = lcnn.conv_operator_norm(conv.weight, size, method="fft", **options(conv))
        gram = lcnn.conv_operator_norm(conv.weight, size, method="gram", **options(conv))
    assert power.item() == pytest.approx(want, rel=1e-4)
    assert exact.item() == pytest.approx(want, rel=1e-12)
    assert fft.item() >= want * (1 - 1e-12)  # upper bounds for zero padding
    assert fft.item() * (1 - 1e-12) <= gram.item() <= fft.item() * (1 + 1e-4)
    if k == 1 and s == 1:
        assert fft.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_modes(mode: str, stride: int) -> None:
    conv = nn.Conv2d(2, 3, 3, stride, padding=(1, 2), padding_mode=mode, bias=False).double()
    size = (6, 7)
    with torch.no_grad():
        want = np.linalg.svd(dense(conv, size).numpy(), compute_uv=False)[0]
        got = lcnn.conv_operator_norm(conv.weight, size, **options(conv))
        exact = lcnn.conv_operator_norm(conv.weight, size, method="exact", **options(conv))
    assert got.item() == pytest.approx(want, rel=1e-4)
    assert exact.item() == pytest.approx(want, rel=1e-12)


def test_circular_case_is_the_fourier_formula() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular", bias=False).double()
    size = (6, 5)
    with torch.no_grad():
        want = np.linalg.svd(dense(conv, size).numpy(), compute_uv=False)[0]
        for method in ("fft", "gram"):
            got = lcnn.conv_operator_norm(
                conv.weight, size, method=method, tol=1e-6, **options(conv)
            )
            assert got.item() == pytest.approx(want, rel=1e-5 if method == "gram" else 1e-12)
    spectrum = np.fft.fft2(conv.weight.detach().numpy(), s=size).transpose(2, 3, 0, 1)
    assert np.linalg.norm(spectrum, 2, axis=(2, 3)).max() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(("kernel", "padding"), [(1, 1), (1, 6), (3, 2), (3, 0)])
def test_fourier_norm_of_other_circular_padding_is_an_upper_bound(
    kernel: int, padding: int
) -> None:
    conv = nn.Conv2d(2, 2, kernel, padding=padding, padding_mode="circular", bias=False).double()
    size = (6, 6)
    with torch.no_grad():
        want = np.linalg.svd(dense(conv, size).numpy(), compute_uv=False)[0]
        for method in ("fft", "gram"):
            got = lcnn.conv_operator_norm(conv.weight, size, method=method, **options(conv))
            assert got.item() >= want * (1 - 1e-12)
    if padding == 6:  # the whole input three times on each axis
        assert got.item() == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_named_padding_with_an_even_kernel(padding: str) -> None:
    conv = nn.Conv2d(2, 2, (4, 3), padding=padding, bias=False).double()
    with pytest.warns(UserWarning, match="even kernel") if padding == "same" else _quiet():
        matrix = dense(conv, (6, 5))
    want = torch.linalg.matrix_norm(matrix, 2).item()
    got = lcnn.conv_operator_norm(conv.weight, (6, 5), **options(conv))
    assert got.item() == pytest.approx(want, rel=1e-4)


def _quiet() -> Any:
    import contextlib

    return contextlib.nullcontext()


@pytest.mark.parametrize("case", [(1, 0, 0, 1, 1), (2, 1, 1, 1, 2), (3, 1, 2, 2, 1)])
def test_transposed_convolutions(case: tuple[int, ...]) -> None:
    s, p, extra, d, g = case
    conv = nn.ConvTranspose2d(4, 6, 3, s, p, extra, g, False, d).double()
    with torch.no_grad():
        want = torch.linalg.matrix_norm(dense(conv, (4, 3)), 2).item()
        got = lcnn.conv_operator_norm(conv.weight, (4, 3), **options(conv))
    assert got.item() == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("n", [1, 3])
def test_one_and_three_dimensions(n: int) -> None:
    kind, size = {1: (nn.Conv1d, (9,)), 3: (nn.Conv3d, (4, 3, 5))}[n]
    conv = kind(2, 3, 3, stride=2, padding=1, bias=False).double()
    with torch.no_grad():
        want = torch.linalg.matrix_norm(dense(conv, size), 2).item()
        for method in ("power", "exact"):
            got = lcnn.conv_operator_norm(conv.weight, size, method=method, **options(conv))
            assert got.item() == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(("k", "s", "p", "d", "g"), GRID)
def test_adjoint(k: int, s: int, p: int, d: int, g: int) -> None:
    conv = nn.Conv2d(4, 6, k, s, p, d, g, bias=False).double()
    for mode in MODES if 0 < p < 3 else MODES[:1]:
        conv.padding_mode = mode
        linear = ConvMap.of(conv, (7, 5))
        source, image = linear.shapes(conv.weight)
        v, u = torch.randn(source).double(), torch.randn(image).double()
        left = (linear.forward(conv.weight, v) * u).sum()
        right = (v * linear.adjoint(conv.weight, u)).sum()
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


def test_gradient_of_the_norm_is_that_of_the_dense_matrix() -> None:
    w = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    size = (6, 4)
    power = lcnn.conv_operator_norm(w, size, padding=1, tol=1e-10)
    exact = lcnn.conv_operator_norm(w, size, padding=1, method="exact")
    got, want = torch.autograd.grad(power, w)[0], torch.autograd.grad(exact, w)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_reshaped_norm_brackets_the_operators() -> None:
    w = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    reshaped = torch.linalg.matrix_norm(w.flatten(1), 2).item()
    true = lcnn.conv_operator_norm(w, (8, 8), padding=1, method="exact").item()
    assert reshaped <= true <= 3 * reshaped
    one = torch.randn(5, 3, 1, 1, dtype=torch.float64)
    true = lcnn.conv_operator_norm(one, (4, 4)).item()
    assert true == pytest.approx(torch.linalg.matrix_norm(one.flatten(1), 2).item(), rel=1e-4)


def test_bad_operator_arguments() -> None:
    w = torch.randn(2, 2, 3, 3)
    with pytest.raises(ValueError, match="input_size must have 2 positive entries"):
        lcnn.conv_operator_norm(w, (4,))
    with pytest.raises(ValueError, match="smaller than the kernel"):
        lcnn.conv_operator_norm(w, (2, 2))
    with pytest.raises(ValueError, match="padding must be numbers, 'same' or 'valid', got 'full'"):
        lcnn.conv_operator_norm(w, (4, 4), padding="full")
    with pytest.raises(ValueError, match="method must be"):
        lcnn.conv_operator_norm(w, (4, 4), method="guess")
    with pytest.raises(ValueError, match="needs zero padding"):
        lcnn.conv_operator_norm(w, (4, 4), padding=1, padding_mode="reflect", method="fft")
    with pytest.raises(ValueError, match="larger than the input"):
        lcnn.conv_operator_norm(w, (2, 2), padding=1, padding_mode="circular", method="fft")


CONVS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv2d(3, 5, 3, padding=1), (8, 6)),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (7, 7)),
    (nn.Conv1d(2, 3, 5, dilation=2), (16,)),
    (nn.ConvTranspose2d(3, 2, 4, stride=2, padding=1), (5, 5)),
    (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (6, 6)),
]


@pytest.mark.parametrize(("conv", "size"), CONVS)
def test_normalised_layer_has_norm_one_after_training(conv: Any, size: tuple[int, ...]) -> None:
    conv = copy.deepcopy(conv).double()
    lcnn.conv_spectral_norm(conv, size)
    optimizer = torch.optim.SGD(conv.parameters(), 1e-2)
    for _ in range(40):
        x = torch.randn(8, conv.in_channels, *size).double()
        optimizer.zero_grad()
        (conv(x) - 1).square().mean().backward()
        optimizer.step()
    conv.eval()
    plain = copy.deepcopy(conv)
    plain.bias = None
    with torch.no_grad():
        norm = torch.linalg.matrix_norm(dense(plain, size), 2).item()
    assert 0.98 <= norm <= 1.02
    assert {f"parametrizations.weight.0._{b}" for b in "uv"} < set(conv.state_dict())


def test_matrix_norm_of_torch_leaves_a_steeper_layer() -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1, bias=False).double()
    reshaped = spectral_norm(copy.deepcopy(conv), n_power_iterations=50).eval()
    ours = lcnn.conv_spectral_norm(conv, (8, 8), init_iterations=100).eval()
    with torch.no_grad():
        steep = torch.linalg.matrix_norm(dense(reshaped, (8, 8)), 2).item()
        flat = torch.linalg.matrix_norm(dense(ours, (8, 8)), 2).item()
    assert steep > 1.2
    assert flat == pytest.approx(1, abs=1e-2)


def test_gradient_flows_through_sigma() -> None:
    conv = nn.Conv2d(2, 3, 3, padding=1, bias=False).double()
    lcnn.conv_spectral_norm(conv, (5, 5), init_iterations=2000).eval()
    w = conv.parametrizations.weight.original
    seed = torch.randn_like(w)
    got = torch.autograd.grad(conv.weight, w, seed)[0]
    exact = w / lcnn.conv_operator_norm(w, (5, 5), padding=1, method="exact")
    # u and v are converged to some 1e-6
    torch.testing.assert_close(got, torch.autograd.grad(exact, w, seed)[0], rtol=1e-3, atol=1e-4)


def test_no_power_step_in_evaluation_and_one_in_training() -> None:
    conv = lcnn.conv_spectral_norm(nn.Conv2d(2, 3, 3, padding=1), (5, 5), init_iterations=1)
    part = conv.parametrizations.weight[0]
    where = part._u.data_ptr()
    conv.eval()
    before = part._u.clone()
    conv(torch.randn(1, 2, 5, 5))
    assert torch.equal(part._u, before)
    conv.train()
    conv(torch.randn(1, 2, 5, 5))
    assert not torch.equal(part._u, before)
    assert part._u.data_ptr() == where  # in place


def test_checkpointed_forward_steps_once() -> None:
    conv = lcnn.conv_spectral_norm(nn.Conv2d(2, 3, 3, padding=1), (5, 5), init_iterations=1)
    twin = copy.deepcopy(conv)
    x = torch.randn(2, 2, 5, 5)
    checkpoint(conv, x, use_reentrant=False).sum().backward()
    twin(x).sum().backward()
    assert torch.equal(conv.parametrizations.weight[0]._u, twin.parametrizations.weight[0]._u)
    a, b = (m.parametrizations.weight.original.grad for m in (conv, twin))
    assert torch.equal(a, b)


def test_clip_only_shrinks() -> None:
    big, small = (nn.Conv2d(2, 2, 3, padding=1, bias=False) for _ in range(2))
    with torch.no_grad():
        big.weight.mul_(50)
        small.weight.mul_(0.01)
    kept = small.weight.clone()
    for conv in (big, small):
        lcnn.conv_spectral_norm(conv, (6, 6), mode="clip", target=2.0, init_iterations=50).eval()
    assert torch.equal(small.weight, kept)
    norm = lcnn.conv_operator_norm(big.weight.detach(), (6, 6), padding=1).item()
    assert norm == pytest.approx(2.0, rel=1e-2)


def test_zero_weight_stays() -> None:
    conv = nn.Conv2d(2, 2, 3, bias=False)
    nn.init.zeros_(conv.weight)
    lcnn.conv_spectral_norm(conv, (6, 6))
    conv(torch.randn(1, 2, 6, 6)).sum().backward()
    assert conv.weight.eq(0).all()
    assert conv.parametrizations.weight.original.grad.isfinite().all()


def test_pickle_and_deepcopy() -> None:
    conv = lcnn.conv_spectral_norm(nn.Conv2d(2, 3, 3, padding=1), (5, 5)).eval()
    x = torch.randn(1, 2, 5, 5)
    for again in (pickle.loads(pickle.dumps(conv)), copy.deepcopy(conv)):
        assert torch.equal(again(x), conv(x))
        assert list(again.state_dict()) == list(conv.state_dict())
        assert pickle.loads(pickle.dumps(again))(x).equal(conv(x))
    linear = lcnn.linear_spectral_norm(nn.Linear(4, 3)).eval()
    again = pickle.loads(pickle.dumps(linear))
    assert torch.equal(again.weight, linear.weight)


def test_bfloat16_autocast_computes_sigma_in_single() -> None:
    conv = lcnn.conv_spectral_norm(nn.Conv2d(2, 3, 3, padding=1), (5, 5))
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(torch.randn(2, 2, 5, 5))
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()
    assert conv.parametrizations.weight[0]._sigma.dtype == torch.float32


def test_bad_modules() -> None:
    with pytest.raises(TypeError, match=r"takes nn.Conv"):
        lcnn.conv_spectral_norm(nn.Linear(2, 2), (4, 4))
    conv = lcnn.conv_spectral_norm(nn.Conv2d(2, 2, 3), (4, 4))
    with pytest.raises(TypeError, match="already has a parametrized weight"):
        lcnn.conv_spectral_norm(conv, (4, 4))
    with pytest.raises(TypeError, match="is lazy"):
        lcnn.conv_spectral_norm(nn.LazyConv2d(2, 3), (4, 4))
    with pytest.raises(ValueError, match="mode must be"):
        lcnn.conv_spectral_norm(nn.Conv2d(2, 2, 3), (4, 4), mode="soft")
    with pytest.raises(ValueError, match="target must be a positive"):
        lcnn.conv_spectral_norm(nn.Conv2d(2, 2, 3), (4, 4), target=0.0)
    assert "size=(4, 4)" in repr(conv)


def by_hand(conv: Any, size: tuple[int, int]) -> Tensor:
    """The weight over sigma from the stored vectors, in NumPy."""
    part = conv.parametrizations.weight[0]
    weight = conv.parametrizations.weight.original.detach().double()
    image = nn.functional.conv2d(part._v.double(), weight, padding=conv.padding)
    return (weight / (part._u.double() * image).sum()).to(conv.weight.dtype)


def test_weight_is_kept_in_evaluation_and_follows_every_change() -> None:
    conv = lcnn.conv_spectral_norm(nn.Conv2d(2, 3, 3, padding=1), (6, 6)).eval()
    part, size = conv.parametrizations.weight[0], (6, 6)
    original = conv.parametrizations.weight.original
    with torch.no_grad():
        first = conv.weight
        assert conv.weight is first
        torch.testing.assert_close(first, by_hand(conv, size))
        original.mul_(torch.rand_like(original))  # as an optimizer does
        torch.testing.assert_close(conv.weight, by_hand(conv, size))
        twin = copy.deepcopy(conv)
        twin.parametrizations.weight.original.add_(1.0)
        torch.testing.assert_close(twin.weight, by_hand(twin, size))
        conv.load_state_dict(twin.state_dict())
        torch.testing.assert_close(conv.weight, by_hand(conv, size))
        part.power_step(original, 3)
        torch.testing.assert_close(conv.weight, by_hand(conv, size))
        conv.weight.zero_()  # a careless write into the result
        torch.testing.assert_close(conv.weight, by_hand(conv, size))
        original.data.mul_(torch.rand_like(original))
        conv.eval()  # not seen before
        torch.testing.assert_close(conv.weight, by_hand(conv, size))
        assert conv.double().weight.dtype == torch.float64
        torch.testing.assert_close(conv.weight, by_hand(conv, size))
    conv.train()
    with torch.no_grad():
        assert conv.weight is not conv.weight


def test_kept_weight_serves_gradients_and_inference_mode() -> None:
    conv = lcnn.conv_spectral_norm(nn.Conv2d(1, 2, 3), (5, 5)).eval()
    x = torch.randn(1, 1, 5, 5)
    with torch.inference_mode():
        want = conv(x).clone()
    out = conv(x)
    assert torch.equal(out, want)
    out.sum().backward()
    assert conv.parametrizations.weight.original.grad.abs().sum() > 0
    conv.requires_grad_(False)
    z = x.clone().requires_grad_()
    conv(z).sum().backward()  # through the kept weight
    assert z.grad is not None


def test_functional_transforms_run_in_evaluation() -> None:
    net = lcnn.convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), torch.zeros(1, 1, 4, 4)).eval()
    x = torch.randn(1, 1, 4, 4)
    hessian = torch.func.hessian(lambda z: net(z).sum())(x).view(16, 16)
    weight = net[0].weight.detach()
    pre = nn.functional.conv2d(x, weight, net[0].bias)
    bell = 5 * torch.sigmoid(5 * pre) * (1 - torch.sigmoid(5 * pre))
    j = nn.functional.conv2d(torch.eye(16).view(16, 1, 4, 4), weight).flatten(1).T
    torch.testing.assert_close(hessian, j.T @ (bell.flatten()[:, None] * j), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_training_step_equals_the_plain_one(reentrant: bool) -> None:
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)]
    net = lcnn.convert(nn.Sequential(*layers), torch.zeros(1, 1, 4, 4), lipschitz_init=0.5)
    twin = copy.deepcopy(net)
    for _ in range(2):
        x = torch.randn(6, 1, 4, 4, requires_grad=True)
        net(x).square().sum().backward()
        checkpoint(twin, x, use_reentrant=reentrant).square().sum().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(twin.get_buffer(name), buffer)
