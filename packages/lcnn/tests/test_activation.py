from __future__ import annotations

import itertools
import math
import pickle

import mpmath
import pytest
import torch
from torch import Tensor

from lcnn import CenteredSoftplus, centered_softplus
from lcnn.core.activation import _beta_curve, _beta_slope

XS = [s * 10.0**e for e in range(-6, 4) for s in (-1, 1)] + [0.0]
BETAS = [10.0**e for e in range(-6, 5)]


def exact(x: float, beta: float) -> mpmath.mpf:
    """The definition, with 60 digits: log((1 + e^(beta x)) / 2) / beta."""
    with mpmath.workdps(60):
        b = mpmath.mpf(beta)
        return mpmath.log((1 + mpmath.exp(b * mpmath.mpf(x))) / 2) / b


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_is_the_definition_to_four_units_at_every_beta(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    for x, beta in itertools.product(XS, BETAS):
        xt, bt = torch.tensor(x, dtype=dtype), torch.tensor(beta, dtype=dtype)
        want = exact(xt.item(), bt.item())
        got = centered_softplus(xt, bt).item()
        assert abs(got - want) <= 4 * eps * abs(want), (x, beta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivative_in_beta_is_exact_to_some_units_at_every_beta(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    for x, beta in itertools.product(XS, BETAS):
        xt, bt = torch.tensor(x, dtype=dtype), torch.tensor(beta, dtype=dtype)
        with mpmath.workdps(60):
            b, m = mpmath.mpf(bt.item()), mpmath.mpf(xt.item())
            want = (m / (1 + mpmath.exp(-b * m)) - exact(m, b)) / b
            second = ((m**2 * mpmath.sech(b * m / 2) ** 2 / 4) - 2 * want) / b
        got = _beta_slope(xt, bt).item()
        # 8 units: z tanh z - log cosh z cancels to one half of its first term
        floor = torch.finfo(dtype).tiny / min(1.0, float(bt) ** 2)
        assert abs(got - want) <= 8 * eps * abs(want) + floor, (x, beta)
        if dtype == torch.float64 and 1e-3 < abs(float(bt) * float(xt)) < 1e3:
            curve = _beta_curve(xt, bt).item()
            # the exact branch cancels to t^2/4 of its terms where it takes over from the series
            assert abs(curve - second) <= 1e-7 * abs(second), (x, beta)


def test_identities() -> None:
    x = torch.randn(1000, dtype=torch.float64) * 3
    for beta in (1e-3, 0.7, 5.0, 80.0):
        y = centered_softplus(x, beta)
        # a handful of roundings on numbers of size |x|
        torch.testing.assert_close(y - centered_softplus(-x, beta), x, rtol=1e-14, atol=1e-15)
        z = beta * x / 2
        even = x / 2 + (torch.logaddexp(z, -z) - math.log(2)) / beta
        torch.testing.assert_close(y, even, rtol=1e-9, atol=1e-12)
        gap = x.relu() - y
        assert (gap >= 0).all()
        assert (gap <= math.log(2) / beta + 1e-14).all()  # roundings of x
        assert ((y - x / 2).abs() <= beta * x**2 / 8 * (1 + 1e-9) + 1e-15).all()
    assert centered_softplus(torch.zeros(3), 7.0).eq(0).all()
    assert (centered_softplus(x, 1e4) - x.relu()).abs().max() <= math.log(2) / 1e4 + 1e-14


def test_slopes_at_zero() -> None:
    x = torch.zeros((), dtype=torch.float64, requires_grad=True)
    beta = 6.0
    (first,) = torch.autograd.grad(centered_softplus(x, beta), x, create_graph=True)
    (second,) = torch.autograd.grad(first, x, create_graph=True)
    (third,) = torch.autograd.grad(second, x)
    assert (first.item(), second.item(), third.item()) == (0.5, beta / 4, 0.0)


def test_third_derivative_is_the_closed_form() -> None:
    x = torch.linspace(-3, 3, 41, dtype=torch.float64, requires_grad=True)
    beta = torch.tensor(2.5, dtype=torch.float64)
    g = x
    out = centered_softplus(x, beta).sum()
    for _ in range(3):
        (g,) = torch.autograd.grad(out, x, create_graph=True)
        out = g.sum()
    s = torch.sigmoid(beta * x.detach())
    want = beta**2 * s * (1 - s) * (1 - 2 * s)
    torch.testing.assert_close(g.detach(), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(), (3, 1)])
def test_gradcheck_and_gradgradcheck_in_both_arguments(shape: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    beta = (torch.rand(shape, dtype=torch.float64) * 4 + 0.2).requires_grad_()
    check = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(centered_softplus, (x, beta), **check)
    assert torch.autograd.gradgradcheck(
        centered_softplus, (x, beta), check_batched_grad=True, check_fwd_over_rev=True
    )


def test_gradgradcheck_near_zero_where_the_series_serves() -> None:
    x = torch.tensor([-1e-2, 0.0, 1e-2], dtype=torch.float64, requires_grad=True)
    beta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(centered_softplus, (x, beta))


def test_func_hessian_is_the_bell_curve() -> None:
    x = torch.randn(5, dtype=torch.float64)
    beta = torch.tensor(3.0, dtype=torch.float64)

    def total(v: Tensor, b: Tensor) -> Tensor:
        return centered_softplus(v, b).sum()

    s = torch.sigmoid(beta * x)
    hessian = torch.func.hessian(total)(x, beta)
    torch.testing.assert_close(hessian, torch.diag(beta * s * (1 - s)))
    mixed = torch.func.jacfwd(torch.func.grad(total, argnums=1))(x, beta)
    torch.testing.assert_close(mixed, x * s * (1 - s))
    curve = torch.func.grad(torch.func.grad(total, argnums=1), argnums=1)(x, beta)
    torch.testing.assert_close(curve, _beta_curve(x, beta).sum())


def test_vmap_of_gradients_equals_a_loop() -> None:
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    beta = torch.rand(3, 1, dtype=torch.float64) + 1

    def total(v: Tensor, b: Tensor) -> Tensor:
        return centered_softplus(v, b).square().sum()

    for axes, bs in (((0, None), [beta] * 6), ((0, 0), list(torch.stack([beta] * 6) + 1))):
        b = beta if axes[1] is None else torch.stack(bs)
        got = torch.func.vmap(torch.func.grad(total, argnums=(0, 1)), axes)(x, b)
        want = [torch.func.grad(total, argnums=(0, 1))(v, c) for v, c in zip(x, bs, strict=True)]
        for i in range(2):
            torch.testing.assert_close(got[i], torch.stack([w[i] for w in want]))
    only = torch.func.vmap(centered_softplus, (None, 0))(x[0], torch.tensor([1.0, 2.0]).double())
    torch.testing.assert_close(only[1], centered_softplus(x[0], 2.0))


def test_one_activation_sized_tensor_is_saved() -> None:
    act = CenteredSoftplus()
    x = torch.randn(4, 8, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        act(x)
    assert [n for n in saved if n == x.numel()] == [x.numel()]


def test_half_precision_computes_in_single_and_keeps_its_type() -> None:
    x = torch.randn(100).bfloat16().requires_grad_()
    act = CenteredSoftplus(0.01)
    y = act(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, act(x.float()).bfloat16(), rtol=0, atol=0)
    y.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert act.log_beta.grad is not None
    assert act.log_beta.grad.dtype == torch.float32


def test_infinities_and_nan_come_through() -> None:
    y = centered_softplus(torch.tensor([-math.inf, math.inf, math.nan]), 2.0)
    assert y[0].item() == pytest.approx(-math.log(2) / 2)
    assert y[1].item() == math.inf
    assert y[2].isnan()


def test_module_learns_beta_by_channel() -> None:
    act = CenteredSoftplus(2.0, num_parameters=3)
    x = torch.randn(4, 3, 5)
    with torch.no_grad():
        act.log_beta.copy_(torch.tensor([1.0, 2.0, 3.0]).log())
    want = torch.stack([centered_softplus(x[:, c], float(c + 1)) for c in range(3)], 1)
    torch.testing.assert_close(act(x), want)
    act(x).sum().backward()
    assert act.log_beta.grad is not None
    assert act.log_beta.grad.shape == (3,)
    last = CenteredSoftplus(2.0, num_parameters=5, channel_dim=-1)
    assert last(x).shape == x.shape


def test_floor_is_added_as_in_the_authors_code() -> None:
    act = CenteredSoftplus(5.0, floor=1e-3)
    assert act.beta.item() == pytest.approx(5.0, rel=1e-6)
    assert act.log_beta.item() == pytest.approx(math.log(5 - 1e-3), rel=1e-6)


def test_fixed_beta_is_a_buffer_and_pickles() -> None:
    act = CenteredSoftplus(5.0, learnable=False)
    assert not list(act.parameters())
    assert list(act.state_dict()) == ["log_beta"]
    again = pickle.loads(pickle.dumps(act))
    assert again.beta == act.beta
    assert "learnable=False" in repr(act)
    assert "betas=3" in repr(CenteredSoftplus(num_parameters=3))


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
def test_bad_beta(beta: float) -> None:
    with pytest.raises(ValueError, match="beta must be a positive finite number, got"):
        CenteredSoftplus(beta)
    with pytest.raises(ValueError, match="beta must be a positive finite number, got"):
        centered_softplus(torch.zeros(1), beta)


def test_bad_floor_and_counts() -> None:
    with pytest.raises(ValueError, match="floor must be"):
        CenteredSoftplus(1.0, floor=-1.0)
    with pytest.raises(ValueError, match="num_parameters"):
        CenteredSoftplus(1.0, num_parameters=0)
    with pytest.raises(RuntimeError, match=r"has 3 betas, but .* has 4 channels"):
        CenteredSoftplus(num_parameters=3)(torch.zeros(2, 4))


def test_compiled_full_graph_equals_eager() -> None:
    act = CenteredSoftplus(3.0)
    compiled = torch.compile(act, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 5)
    for needs in (False, True):
        a, b = x.clone().requires_grad_(needs), x.clone().requires_grad_(needs)
        ya, yb = act(a), compiled(b)
        torch.testing.assert_close(ya, yb)
        if needs:
            ga = torch.autograd.grad(ya.square().sum(), [a, act.log_beta])
            gb = torch.autograd.grad(yb.square().sum(), [b, act.log_beta])
            torch.testing.assert_close(ga, gb)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), act(x))


@pytest.mark.parametrize("beta", [1e-4, 0.1, 5.0, 1e3])
def test_blocks_of_a_large_tensor_sum_to_the_gradient(beta: float) -> None:
    x = torch.randn(3, 70000, requires_grad=True)
    g = torch.randn(3, 70000)
    b = torch.tensor(beta, requires_grad=True)
    got = torch.autograd.grad(centered_softplus(x, b), (x, b), g)
    wide, exact = x.detach().double(), b.detach().double()
    torch.testing.assert_close(got[0], (g * torch.sigmoid(exact * wide)).float())
    want = g.double() * _beta_slope(wide, exact)
    # single precision: some eps of the sum of absolute values, which the sum cancels
    assert abs(got[1].item() - want.sum().item()) <= 1e-6 * want.abs().sum().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_the_gradient_of_beta_in_single(dtype: torch.dtype) -> None:
    act = CenteredSoftplus(2.0).to(dtype)
    x = torch.randn(4, 50000).to(dtype).requires_grad_()
    g = torch.randn(4, 50000).to(dtype)
    act(x).backward(g)
    beta, wide = act.beta.detach().double(), x.detach().double()
    want = (g.double() * _beta_slope(wide, beta)).sum() * beta  # of log beta
    assert act.log_beta.grad is not None
    # exp and its gradient are rounded once each in the parameter's precision
    assert act.log_beta.grad.item() == pytest.approx(want.item(), rel=2 * torch.finfo(dtype).eps)


def test_axis_that_the_input_lacks_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"has 3 betas, but .* has no channels on axis 2"):
        CenteredSoftplus(num_parameters=3, channel_dim=2)(torch.zeros(3, 4))


def test_repr_without_data() -> None:
    assert "CenteredSoftplus" in repr(CenteredSoftplus(device="meta"))
