from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import lcnn
from lcnn import CenteredSoftplus


def smooth_net(beta: float = 3.0) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 10),
        CenteredSoftplus(beta),
        nn.Linear(10, 8),
        CenteredSoftplus(beta),
        nn.Linear(8, 3),
    ).double()


def points(n: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 6, dtype=torch.float64), torch.arange(n) % 3


def hessians(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    def loss(v: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(net(v[None]), label[None])

    return torch.stack([torch.func.hessian(loss)(a, b) for a, b in zip(x, y, strict=True)])


@pytest.mark.parametrize("method", ["power", "lanczos", "exact"])
def test_indefinite_quadratic_with_a_tie(method: str) -> None:
    a = torch.diag(torch.tensor([4.0, -4.0, 1.0, 0.0, 2.0, -1.0], dtype=torch.float64))
    q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    a = q @ a @ q.T

    def f(x: Tensor) -> Tensor:
        return torch.einsum("bi,ij,bj->b", x, a, x)[:, None] / 2

    x = torch.randn(3, 6, dtype=torch.float64)
    r = lcnn.curvature(f, x, fn=lambda out, y: out[:, 0], method=method, iters=60)
    torch.testing.assert_close(r.hessian_norm, torch.full((3,), 4.0).double(), rtol=1e-9, atol=0)
    torch.testing.assert_close(r.grad_norm, (x @ a).norm(dim=1))
    torch.testing.assert_close(r.curvature, 4 / (r.grad_norm + 1e-6))


def test_binary_logistic_regression_in_closed_form() -> None:
    w = torch.randn(6, dtype=torch.float64)

    def model(x: Tensor) -> Tensor:
        z = x @ w
        return torch.stack([torch.zeros_like(z), z], 1)

    x = torch.randn(7, 6, dtype=torch.float64)
    y = torch.arange(7) % 2
    p1 = torch.sigmoid(x @ w)
    p = torch.where(y == 1, p1, 1 - p1)
    r = lcnn.curvature(model, x, y, iters=5)
    torch.testing.assert_close(r.grad_norm, (1 - p) * w.norm())
    torch.testing.assert_close(r.hessian_norm, p * (1 - p) * w.norm() ** 2)
    torch.testing.assert_close(r.hessian_norm / r.grad_norm, p * w.norm())


def test_exact_is_func_hessian_and_lanczos_reaches_it_in_d_steps() -> None:
    net = smooth_net()
    x, y = points()
    h = hessians(net, x, y)
    want = torch.linalg.eigvalsh(h).abs().amax(1)
    exact = lcnn.curvature(net, x, y, method="exact")
    torch.testing.assert_close(exact.hessian_norm, want, rtol=1e-10, atol=1e-14)
    lanczos = lcnn.curvature(net, x, y, method="lanczos", iters=6)
    torch.testing.assert_close(lanczos.hessian_norm, want, rtol=1e-6, atol=0)
    assert lanczos.products == 6
    assert exact.residual.eq(0).all()


def test_power_never_falls_and_never_exceeds() -> None:
    net = smooth_net()
    x, y = points()
    want = torch.linalg.eigvalsh(hessians(net, x, y)).abs().amax(1)
    last = torch.zeros(5, dtype=torch.float64)
    for iters in (1, 2, 4, 8, 16, 64):
        now = lcnn.curvature(net, x, y, iters=iters).hessian_norm
        assert (now >= last * (1 - 1e-12)).all()
        assert (now <= want * (1 + 1e-12)).all()
        last = now


def test_residual_measures_the_distance_to_an_eigenvector() -> None:
    net = smooth_net()
    x, y = points()
    few = lcnn.curvature(net, x, y, iters=2)
    many = lcnn.curvature(net, x, y, iters=200)
    assert (many.residual < few.residual).all()
    # the distance of the Rayleigh quotient to the spectrum is at most the residual
    values = torch.linalg.eigvalsh(hessians(net, x, y))
    lanczos = lcnn.curvature(net, x, y, method="lanczos", iters=3)
    gap = (values.abs() - lanczos.hessian_norm[:, None]).abs().amin(1)
    assert (gap <= lanczos.residual + 1e-12).all()


@pytest.mark.parametrize("method", ["power", "lanczos"])
def test_tolerance_stops_early_and_is_met(method: str) -> None:
    net = smooth_net()
    x, y = points()
    r = lcnn.curvature(net, x, y, method=method, iters=500, tol=1e-4)
    assert r.products < 500
    if method == "lanczos":
        assert (r.residual <= 1e-4 * r.hessian_norm).all()


def test_scale_invariance() -> None:
    net = smooth_net()
    x, y = points()
    plain = lcnn.curvature(net, x, y, iters=50)
    scaled = lcnn.curvature(
        net, x, y, iters=50, fn=lambda out, t: -7 * F.cross_entropy(out, t, reduction="none") + 3
    )
    ratios = [r.hessian_norm / r.grad_norm for r in (scaled, plain)]  # without the 1e-6 of C
    torch.testing.assert_close(*ratios, rtol=1e-10, atol=0)
    torch.testing.assert_close(scaled.hessian_norm, 7 * plain.hessian_norm)


def test_logit_of_label_and_of_prediction() -> None:
    net = smooth_net()
    x, _ = points()
    predicted = net(x).argmax(1)
    a = lcnn.curvature(net, x, predicted, fn="logit", method="exact")
    b = lcnn.curvature(net, x, fn="logit", method="exact")
    assert torch.equal(a.hessian_norm, b.hessian_norm)


def test_chunks_change_nothing() -> None:
    net = smooth_net()
    x, y = points()
    whole = lcnn.curvature(net, x, y, method="exact")
    parts = lcnn.curvature(net, x, y, method="exact", chunk=2)
    torch.testing.assert_close(whole.hessian_norm, parts.hessian_norm)
    again = lcnn.curvature(net, x, y, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.hessian_norm, lcnn.curvature(net, x, y).hessian_norm)


def test_linear_model_has_no_curvature() -> None:
    for method in ("power", "lanczos", "exact"):
        r = lcnn.curvature(
            nn.Linear(6, 1), torch.randn(2, 6), fn=lambda o, y: o[:, 0], method=method
        )
        assert r.hessian_norm.eq(0).all()
    constant = lcnn.curvature(lambda x: x, torch.randn(2, 6), fn=lambda o, y: torch.zeros(2))
    assert constant.grad_norm.eq(0).all()


def test_nan_is_never_silently_zero() -> None:
    net = smooth_net()
    x, y = points()
    x[1, 0] = math.nan
    for method in ("power", "lanczos", "exact"):
        r = lcnn.curvature(net, x, y, method=method, iters=6)
        assert r.hessian_norm.isnan().tolist() == [False, True, False, False, False]


def test_probes_run_in_single_precision_under_autocast() -> None:
    net = smooth_net().float()
    x, y = torch.randn(3, 6), torch.arange(3)
    want = lcnn.curvature(net, x, y).hessian_norm
    with torch.autocast("cpu", torch.bfloat16):
        got = lcnn.curvature(net, x, y).hessian_norm
        low = lcnn.curvature(net, x, y, allow_low_precision=True).hessian_norm
    assert torch.equal(got, want)
    assert not torch.equal(low, want)


def test_no_gradient_is_left_behind_and_no_grad_does_not_matter() -> None:
    net = smooth_net()
    x, y = points()
    with torch.no_grad():
        lcnn.curvature(net, x, y)
    assert all(p.grad is None for p in net.parameters())


def test_bad_input() -> None:
    net = smooth_net()
    x, y = points()
    with pytest.raises(ValueError, match="empty batch"):
        lcnn.curvature(net, x[:0], y[:0])
    with pytest.raises(ValueError, match="method must be"):
        lcnn.curvature(net, x, y, method="guess")
    with pytest.raises(ValueError, match="iters must be"):
        lcnn.curvature(net, x, y, iters=0)
    with pytest.raises(ValueError, match="needs y"):
        lcnn.curvature(net, x)
    with pytest.raises(ValueError, match="fn must be"):
        lcnn.curvature(net, x, y, fn="margin")
    with pytest.raises(ValueError, match="reduction='none'"):
        lcnn.curvature(net, x, y, fn=lambda o, t: o.sum())
    with pytest.raises(ValueError, match="at most 4096 elements"):
        lcnn.curvature(nn.Flatten(), torch.zeros(1, 5000), fn="logit", method="exact")
    with pytest.raises(RuntimeError, match="does not support on a compiled"):
        lcnn.curvature(torch.compile(net, backend="eager"), x, y)


def test_training_mode_is_refused_and_relu_warned_of() -> None:
    x, y = points()
    for layer in (nn.Dropout(0.1), lcnn.LipschitzBatchNorm1d(6).double()):
        net = nn.Sequential(layer, nn.Linear(6, 3).double())
        with pytest.raises(RuntimeError, match=r"call model.eval\(\) first"):
            lcnn.curvature(net, x, y)
        lcnn.curvature(net, x, y, allow_train=True)
    net = nn.Sequential(nn.ReLU(), nn.Linear(6, 3)).double()
    with pytest.warns(UserWarning, match="Hessian is zero almost everywhere; convert first"):
        lcnn.curvature(net, x, y)


def test_gradient_stability_equals_a_loop_and_obeys_groenwall() -> None:
    net = smooth_net()
    x, y = points(4)
    radii = [1e-3, 1e-2, 1e-1]
    got = lcnn.gradient_stability(net, x, y, radii, n_samples=3)
    assert got.shape == (3, 4)
    generator = torch.Generator().manual_seed(0)

    def gradient(p: Tensor) -> Tensor:
        p = p.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(net(p), y, reduction="sum"), p)[0]

    want, limit = torch.zeros(2, 3, 4, dtype=torch.float64)
    base = gradient(x)
    for _ in range(3):
        e = torch.randn(x.shape, dtype=x.dtype, generator=generator)
        e = e / e.norm(dim=1, keepdim=True)
        for i, radius in enumerate(radii):
            moved = gradient(x + radius * e)
            want[i] += (moved - base).norm(dim=1) / base.norm(dim=1) / 3
            segment = torch.stack(
                [
                    lcnn.curvature(net, x + t * radius * e, y, method="exact").curvature
                    for t in torch.linspace(0, 1, 9)
                ]
            )
            # 1 %: the largest curvature between two of nine points
            limit[i] += torch.expm1(1.01 * segment.amax(0) * radius) / 3
    torch.testing.assert_close(got, want)
    assert (want <= limit).all()
    with pytest.raises(ValueError, match="empty batch"):
        lcnn.gradient_stability(net, x[:0], y[:0], radii)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.floats(0.2, 20.0),
    st.sampled_from(["chain", "residual", "concat"]),
    st.integers(0, 99),
)
def test_hessian_bound_holds(depth: int, beta: float, shape: str, seed: int) -> None:
    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act = nn.Linear(6, 6), nn.Linear(6, 6), CenteredSoftplus(beta)

        def forward(self, x: Tensor) -> Tensor:
            if shape == "chain":
                return self.act(self.b(self.act(self.a(x))))
            if shape == "residual":
                return x + 0.5 * self.act(self.a(x))
            return torch.cat([self.act(self.a(x))[:, :3], self.act(self.b(x))[:, :3]], 1)

    torch.manual_seed(seed)
    if shape == "concat":
        blocks = [_Concat(beta) for _ in range(depth)]
    else:
        blocks = [Mix() for _ in range(depth)]
    net = nn.Sequential(*blocks, nn.Linear(6, 3)).double()
    x, y = torch.randn(8, 6, dtype=torch.float64) * 2, torch.arange(8) % 3
    logit, loss = lcnn.hessian_bound(net), lcnn.hessian_bound(net, with_loss=True)
    assert not logit.unbounded
    for fn, bound in (("logit", logit), ("loss", loss)):
        r = lcnn.curvature(net, x, y, fn=fn, method="exact")
        assert (r.hessian_norm <= bound.hessian * (1 + 1e-9)).all()
        assert (r.grad_norm <= bound.lipschitz * (1 + 1e-9)).all()


class _Concat(nn.Module):
    def __init__(self, beta: float) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(6, 3), nn.Linear(6, 3), CenteredSoftplus(beta)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.act(self.a(x)), self.act(self.b(x))], 1)


def test_hessian_bound_is_attained_by_one_layer() -> None:
    net = nn.Sequential(nn.Linear(2, 2), CenteredSoftplus(4.0), nn.Linear(2, 1)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.diag(torch.tensor([2.0, 1.0])))
        net[0].bias.zero_()
        net[2].weight.copy_(torch.tensor([[1.0, 0.0]]))
    r = lcnn.curvature(net, torch.zeros(1, 2).double(), fn=lambda o, y: o[:, 0], method="exact")
    assert r.hessian_norm.item() == pytest.approx(4 / 4 * 2**2)
    assert lcnn.hessian_bound(net).hessian.item() == pytest.approx(4.0)


def test_hessian_bound_of_a_trained_convolutional_net() -> None:
    net = lcnn.models.small_resnet(4, size=8)
    optimizer = torch.optim.SGD(lcnn.param_groups(net), 0.05)
    criterion = lcnn.LCNNLoss(net)
    x, y = torch.rand(32, 1, 8, 8), torch.arange(32) % 4
    for _ in range(10):
        optimizer.zero_grad()
        criterion(x, y).backward()
        optimizer.step()
    net.eval()
    for with_loss, fn in ((False, "logit"), (True, "loss")):
        bound = lcnn.hessian_bound(net, with_loss=with_loss)
        r = lcnn.curvature(net, x, y, fn=fn, method="lanczos")
        assert not bound.unbounded
        assert bound.hessian.isfinite()
        assert (r.hessian_norm <= bound.hessian).all()
        assert (r.grad_norm <= bound.lipschitz).all()


def test_layer_rules() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"),
        nn.BatchNorm2d(2),
        nn.Softplus(6.0),
        nn.AvgPool2d(2),
        nn.Dropout(),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Tanh(),
    ).eval()
    bound = lcnn.hessian_bound(net)
    rows = bound.per_module
    assert rows["2"] == (1.0, 1.5)
    assert rows["3"] == (0.5, 0.0)
    assert rows["5"] == (1.0, math.inf)
    assert rows["8"][1] == pytest.approx(0.7698, abs=1e-4)
    assert bound.unbounded == ["5 (MaxPool2d)"]
    assert bound.hessian.item() == math.inf
    assert bound.lipschitz.isfinite()


def test_overlapping_average_pool_is_bounded_by_its_matrix() -> None:
    pool = nn.AvgPool2d(3, stride=2)
    matrix = pool(torch.eye(49).view(49, 1, 7, 7)).flatten(1)
    want = torch.linalg.matrix_norm(matrix, 2).item()
    got = lcnn.hessian_bound(nn.Sequential(pool)).lipschitz.item()
    assert want <= got <= 1.5 * want


def test_what_is_unknown_makes_it_infinite_with_a_name() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.exp(x) if False else x.sin()

    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    bound = lcnn.hessian_bound(nn.Sequential(Odd()))
    assert bound.unbounded == ["sin (sin)"]
    assert bound.hessian.item() == math.inf
    assert "torch.fx" in lcnn.hessian_bound(Branch()).unbounded[0]
    grouped = lcnn.hessian_bound(nn.Sequential(nn.GroupNorm(1, 2)))
    assert grouped.unbounded == ["0 (GroupNorm)"]
    padded = lcnn.hessian_bound(
        nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"))
    )
    assert padded.lipschitz.item() == math.inf


def test_functional_rules() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = F.avg_pool2d(x * 3, 2) / 2
            return -y.flatten(1)

    class Kinked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x).mean(1)

    assert lcnn.hessian_bound(Net()).lipschitz.item() == pytest.approx(0.75)
    assert lcnn.hessian_bound(Kinked()).unbounded == ["relu (<function relu" + _tail(F.relu)]


def _tail(function: object) -> str:
    return str(function).removeprefix("<function relu") + ")"


def slope_at(model: nn.Module, x: Tensor) -> float:
    jacobian = torch.autograd.functional.jacobian(lambda z: model(z).flatten(), x)
    assert isinstance(jacobian, Tensor)
    return torch.linalg.matrix_norm(jacobian.reshape(jacobian.shape[0], -1), 2).item()


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.act = CenteredSoftplus(8.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(x=self.lin(input=10 * x))
        return torch.cat(tensors=[h, torch.add(input=x, other=h)], dim=1)


class Repeating(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, [0, 0, 0, 0]]


class Steeper(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 7 * super().forward(input)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (ByName(), (1, 3)),
        (Repeating(), (1, 3)),
        (Steeper(3, 3), (1, 3)),
        (nn.AvgPool2d(2, divisor_override=1), (1, 1, 4, 4)),
        (nn.Conv2d(1, 1, 1, padding=2, padding_mode="circular"), (1, 1, 3, 3)),
    ],
)
def test_bound_is_above_the_slope_however_the_network_is_written(
    model: nn.Module, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape)
    bound = lcnn.hessian_bound(nn.Sequential(model))
    assert slope_at(model, x) <= bound.lipschitz.item() * (1 + 1e-6)


def test_named_arguments_carry_their_bound() -> None:
    bound = lcnn.hessian_bound(ByName())
    assert bound.hessian.isfinite()
    assert bound.per_module.keys() == {"lin", "act"}


def test_large_circular_layer_with_generous_padding_is_bounded() -> None:
    conv = nn.Conv2d(1, 1, 1, padding=1, padding_mode="circular", bias=False)
    made = lcnn.conv_spectral_norm(conv, (40, 40)).eval()  # too large for a dense matrix
    corner = torch.zeros(1, 1, 40, 40)
    corner[..., 0, 0] = 1.0  # appears four times
    assert made(corner).norm().item() <= lcnn.hessian_bound(nn.Sequential(made)).lipschitz.item()


def test_inference_mode_is_refused_instead_of_a_silent_zero() -> None:
    net, x, y = nn.Linear(2, 2), torch.randn(3, 2), torch.tensor([0, 1, 0])
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="inference mode records no gradient"):
            lcnn.curvature(net, x, y)
        with pytest.raises(RuntimeError, match="inference mode records no gradient"):
            lcnn.gradient_stability(net, x, y, [0.1])


@pytest.mark.parametrize("chunk", [0, -1])
def test_bad_chunk(chunk: int) -> None:
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        lcnn.curvature(nn.Linear(2, 2), torch.randn(3, 2), torch.tensor([0, 1, 0]), chunk=chunk)
