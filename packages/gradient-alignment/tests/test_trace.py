"""The trace estimators against exact Hessians, their bias and variance against the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import F64, exact_hessians, make_net
from torch import nn

import gradient_alignment as ga
from gradient_alignment.core.noise import directions
from gradient_alignment.core.trace import hessian_diagonal

UNBIASED = ["hutchinson", "forward-over-reverse", "forward-forward"]
FINITE = ["taylor", "taylor-cv", "antithetic"]


def quadratic(seed: int = 0, size: int = 5):
    """f(x) = ½ xᵀAx + bᵀx and its A, b."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(size, size, generator=generator, dtype=F64)
    a = a + a.T
    b = torch.randn(size, generator=generator, dtype=F64)
    return (lambda x: 0.5 * torch.einsum("bi,ij,bj->b", x, a, x) + x @ b), a, b


def label_function(net: nn.Module, y: torch.Tensor):
    """The class logit by hand, one label a sample."""
    return lambda x: net(x)[torch.arange(len(x)), y.repeat(len(x) // len(y))]


def test_exact_trace_and_diagonal_are_those_of_the_hessian(net, batch):
    x, y = batch
    hessians = torch.stack(
        [exact_hessians(lambda s, c=c: net(s)[:, c], x[i : i + 1])[0] for i, c in enumerate(y)]
    )
    fn = ga.class_logit(net, y)
    for chunk in (None, 1, 2, 100):
        diagonal = hessian_diagonal(fn, x, chunk=chunk)
        torch.testing.assert_close(diagonal, hessians.diagonal(dim1=1, dim2=2), rtol=0, atol=1e-12)
        trace = ga.hessian_trace(fn, x, method="exact", chunk=chunk)
        expected = hessians.diagonal(dim1=1, dim2=2).sum(1)
        torch.testing.assert_close(trace, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", UNBIASED)
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere"])
def test_products_give_the_quadratic_form_of_every_direction(method, distribution, net, batch):
    x, y = batch
    fn = ga.class_logit(net, y)
    noise = directions(x, 3, distribution, torch.Generator().manual_seed(2))
    per_class = {c: exact_hessians(lambda s, c=c: net(s)[:, c], x) for c in range(3)}
    hessians = torch.stack([per_class[int(c)][i] for i, c in enumerate(y)])
    expected = torch.einsum("kbi,bij,kbj->kb", noise, hessians, noise).mean(0)
    found = ga.hessian_trace(fn, x, method=method, noise=noise)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("sigma", [1e-3, 0.1, 10.0])
def test_control_variate_is_exact_on_quadratics_at_every_step_size(sigma):
    fn, a, _ = quadratic()
    x = torch.randn(6, 5, dtype=F64)
    noise = torch.randn(2, 6, 5, dtype=F64)
    expected = torch.einsum("kbi,ij,kbj->kb", noise, a, noise).mean(0)
    for method in ("taylor-cv", "antithetic"):
        found = ga.hessian_trace(fn, x, method=method, sigma=sigma, noise=noise)
        # rounding of f is divided by σ²
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13 / sigma**2 + 1e-11)


def test_taylor_with_given_noise_is_the_published_expression_to_the_bit(net, batch):
    x, y = batch
    v = 0.01 * torch.randn(3, 4, 5, dtype=F64)
    fn = label_function(net, y)
    published = 2 / 0.01**2 * torch.stack([fn(x + row) - fn(x) for row in v])
    found = ga.hessian_trace(ga.class_logit(net, y), x, method="taylor", noise=v / 0.01, chunk=1)
    # v / 0.01 * 0.01 rounds; everything else is the same arithmetic
    torch.testing.assert_close(found, published.mean(0), rtol=1e-12, atol=1e-8)
    v = torch.randn(3, 4, 5, dtype=F64)
    published = 2 / 0.5**2 * torch.stack([fn(x + 0.5 * row) - fn(x) for row in v])
    found = ga.hessian_trace(
        ga.class_logit(net, y), x, method="taylor", noise=v, sigma=0.5, chunk=1
    )
    assert torch.equal(found, published.mean(0))


def test_bias_of_the_taylor_form_on_a_cosine():
    """E = (2/σ²)(exp(-σ²‖k‖²/2) - 1) f for f = cos(k·x), Gaussian directions."""
    k = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    x = torch.tensor([[0.3, 0.1, -0.7]], dtype=F64)
    sigma, count = 0.5, 200_000
    noise = torch.randn(count, 1, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    value = torch.cos(x @ k)
    expected = 2 / sigma**2 * (math.exp(-(sigma**2) * float(k @ k) / 2) - 1) * value
    for method in FINITE:
        found, variance = ga.hessian_trace(
            lambda x: torch.cos(x @ k),
            x,
            method=method,
            sigma=sigma,
            noise=noise,
            return_var=True,
            create_graph=False,
        )
        assert abs(found - expected) < 4 * variance.sqrt()  # four standard errors
    assert abs(found - expected) < 0.02 * abs(expected)


def moments(method, distribution, sigma, fn, x, count=20_000):
    noise = directions(
        x.expand(count, -1), 1, distribution, torch.Generator().manual_seed(3)
    ).transpose(0, 1)
    noise = noise.reshape(count, 1, -1)
    mean, variance = ga.hessian_trace(
        fn,
        x,
        method=method,
        sigma=sigma,
        noise=noise,
        return_var=True,
        create_graph=False,
    )
    return float(mean), float(variance) * count


@pytest.mark.parametrize(
    ("method", "distribution", "formula"),
    [
        ("taylor", "gaussian", lambda g, h, s: 4 * g @ g / s**2 + 2 * h.square().sum()),
        ("taylor-cv", "gaussian", lambda g, h, s: 2 * h.square().sum()),
        ("antithetic", "gaussian", lambda g, h, s: 2 * h.square().sum()),
        (
            "taylor-cv",
            "rademacher",
            lambda g, h, s: 2 * (h.square().sum() - h.diagonal().square().sum()),
        ),
        (
            "antithetic",
            "rademacher",
            lambda g, h, s: 2 * (h.square().sum() - h.diagonal().square().sum()),
        ),
    ],
)
def test_variance_of_a_draw_is_that_of_the_formula(method, distribution, formula):
    net = make_net(4)

    def fn(x):
        return net(x)[:, 1]

    x = torch.randn(1, 5, dtype=F64, generator=torch.Generator().manual_seed(5))
    sigma = 0.01
    gradient = ga.score(fn, x)[0]
    hessian = exact_hessians(fn, x)[0]
    mean, variance = moments(method, distribution, sigma, fn, x)
    expected = float(formula(gradient, hessian, sigma))
    assert variance == pytest.approx(expected, rel=0.1)
    assert abs(mean - float(hessian.trace())) < 4 * math.sqrt(expected / 20_000)


def test_rademacher_directions_have_no_variance_on_a_diagonal_hessian():
    x = torch.randn(3, 4, dtype=F64)
    trace, variance = ga.hessian_trace(
        lambda x: x.square().sum(1), x, num_samples=5, return_var=True
    )
    torch.testing.assert_close(trace, torch.full((3,), 8.0, dtype=F64), rtol=0, atol=1e-12)
    assert (variance < 1e-20).all()


@pytest.mark.parametrize("method", ["taylor", "taylor-cv", "antithetic", *UNBIASED, "exact"])
def test_parameter_gradients_are_those_of_finite_differences(method, batch):
    x, y = batch
    net = make_net(2, hidden=3)
    noise = torch.randn(2, 4, 5, dtype=F64)

    def value(*parameters):
        names = [name for name, _ in net.named_parameters()]
        table = dict(zip(names, parameters, strict=True))
        fn = ga.class_logit(lambda x: torch.func.functional_call(net, table, (x,)), y)
        options = {} if method == "exact" else {"noise": noise, "sigma": 0.1}
        return ga.hessian_trace(fn, x, method=method, **options)

    assert torch.autograd.gradcheck(value, tuple(net.parameters()))


def test_estimates_along_the_same_directions_agree():
    net = make_net(6)
    x, noise = torch.randn(3, 5, dtype=F64), torch.randn(2, 3, 5, dtype=F64)

    def fn(x):
        return net(x)[:, 0]

    reference = ga.hessian_trace(fn, x, noise=noise)
    for method in UNBIASED[1:]:
        found = ga.hessian_trace(fn, x, method=method, noise=noise)
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-12)
    for method in ("taylor-cv", "antithetic"):  # third derivatives times σ
        found = ga.hessian_trace(fn, x, method=method, noise=noise, sigma=1e-4)
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", FINITE)
def test_draws_in_one_pass_are_the_draws_one_by_one(method, net, batch):
    x, y = batch
    fn, noise = ga.class_logit(net, y), torch.randn(5, 4, 5, dtype=F64)
    one = ga.hessian_trace(fn, x, method=method, noise=noise, chunk=1)
    for chunk in (None, 2, 5, 9):
        found = ga.hessian_trace(fn, x, method=method, noise=noise, chunk=chunk)
        torch.testing.assert_close(found, one, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_deflation_is_exact_on_low_rank_and_unbiased_beyond(method):
    torch.manual_seed(0)
    root = torch.randn(12, 2, dtype=F64)
    low = root @ root.T
    x = torch.randn(3, 12, dtype=F64)
    found = ga.hessian_trace(
        lambda x: 0.5 * torch.einsum("bi,ij,bj->b", x, low, x), x, method=method, num_samples=9
    )
    torch.testing.assert_close(found, low.trace().expand(3), rtol=1e-9, atol=1e-9)
    full = torch.randn(12, 12, dtype=F64)
    full = full + full.T

    def fn(x):
        return 0.5 * torch.einsum("bi,ij,bj->b", x, full, x)

    many = torch.zeros(3000, 12, dtype=F64)
    estimates = ga.hessian_trace(
        fn,
        many,
        method=method,
        num_samples=6,
        distribution="gaussian",
        generator=torch.Generator().manual_seed(1),
    )
    error = estimates.std() / math.sqrt(3000)
    assert abs(estimates.mean() - full.trace()) < 4 * error


@pytest.mark.parametrize("rank", [3, 2])
def test_xtrace_is_unbiased_where_directions_coincide(rank):
    """The mean over all 512 triples of signs in three dimensions; in most of them two are equal or opposite."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, rank, generator=generator, dtype=F64)
    h = root @ torch.diag(torch.tensor([1.0, -2.0, 3.0], dtype=F64)[:rank]) @ root.T

    def fn(x):
        return 0.5 * torch.einsum("bi,ij,bj->b", x, h, x)

    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=F64)] * 9)
    noise = signs.view(512, 3, 3).transpose(0, 1)
    zeros = torch.zeros(512, 3, dtype=F64)
    found = ga.hessian_trace(fn, zeros, method="xtrace", noise=noise, create_graph=False)
    torch.testing.assert_close(found.mean(), h.trace(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_deflated_estimates_have_unbiased_parameter_gradients(method):
    """d/dt of tr(H) for H = A + t B is tr B; the estimates of many draws average to it."""
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(6, 6, generator=generator, dtype=F64)
    b = torch.randn(6, 6, generator=generator, dtype=F64)
    t = torch.tensor(0.7, dtype=F64, requires_grad=True)

    def fn(x):
        h = a + a.T + t * (b + b.T)
        return 0.5 * torch.einsum("bi,ij,bj->b", x, h, x)

    many = torch.zeros(4000, 6, dtype=F64)
    estimates = ga.hessian_trace(fn, many, method=method, num_samples=3, generator=generator)
    (slope,) = torch.autograd.grad(estimates.mean(), t)
    assert float(slope) == pytest.approx(2 * float(b.trace()), abs=0.35)


def test_return_var_is_the_variance_of_the_mean(net, batch):
    x, y = batch
    noise = torch.randn(7, 4, 5, dtype=F64)
    fn = ga.class_logit(net, y)
    mean, variance = ga.hessian_trace(fn, x, noise=noise, return_var=True)
    draws = torch.stack([ga.hessian_trace(fn, x, noise=row[None]) for row in noise])
    torch.testing.assert_close(mean, draws.mean(0))
    torch.testing.assert_close(variance, draws.var(0) / 7)
    assert ga.hessian_trace(fn, x, method="exact", return_var=True)[1].eq(0).all()


def test_without_a_graph_nothing_can_be_differentiated(net, batch):
    x, y = batch
    fn = ga.class_logit(net, y)
    methods = [*FINITE, *UNBIASED, "exact", "hutch++", "xtrace"]
    for method in methods:
        options = {"num_samples": 3, "create_graph": False}
        assert not ga.hessian_trace(fn, x, method=method, **options).requires_grad


def test_linear_functions_have_no_trace():
    x = torch.randn(3, 4)
    for method in ("hutchinson", "exact", "hutch++"):
        found = ga.hessian_trace(lambda x: x.sum(1), x, method=method, num_samples=3)
        assert found.eq(0).all()


def test_images_are_traced_over_all_their_dimensions():
    x, noise = torch.randn(2, 3, 4, 4, dtype=F64), torch.randn(5, 2, 3, 4, 4, dtype=F64)
    weight = torch.randn(48, 48, dtype=F64)

    def fn(flat):
        return torch.einsum("bi,ij,bj->b", flat, weight, flat).sin()

    methods = [*FINITE, *UNBIASED, "hutch++", "xtrace"]
    for method in methods:
        flat = ga.hessian_trace(fn, x.flatten(1), method=method, noise=noise.flatten(2))
        found = ga.hessian_trace(lambda x: fn(x.flatten(1)), x, method=method, noise=noise)
        torch.testing.assert_close(found, flat, rtol=1e-9, atol=1e-6)
    exact = exact_hessians(fn, x.flatten(1)).diagonal(dim1=1, dim2=2).sum(1)
    found = ga.hessian_trace(lambda x: fn(x.flatten(1)), x, method="exact")
    torch.testing.assert_close(found, exact)


def test_the_callers_gradient_is_left_alone(net, batch):
    x, y = batch
    x.requires_grad_()
    x.grad = torch.full_like(x, 3.0)
    for method in (*FINITE, *UNBIASED, "exact"):
        ga.hessian_trace(ga.class_logit(net, y), x, method=method).sum().backward()
    assert x.grad.eq(3).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "foo"}, "method must be one of 'taylor'"),
        ({"sigma": 0.0}, "sigma must be a finite number above 0, got 0.0"),
        ({"sigma": math.nan}, "sigma must be"),
        ({"num_samples": 0}, "num_samples must be an integer of at least 1"),
        ({"num_samples": True}, "num_samples must be an integer"),
        ({"chunk": 0}, "chunk must be"),
        ({"distribution": "cauchy"}, "distribution must be one of"),
        ({"noise": torch.zeros(2, 3)}, "noise must be"),
        ({"method": "hutch++", "num_samples": 2}, "at least 3"),
        ({"method": "xtrace", "num_samples": 1}, "between 2 and the 4 dimensions"),
        ({"method": "xtrace", "num_samples": 5}, "between 2 and the 4 dimensions"),
    ],
)
def test_bad_numbers_and_words(arguments, message):
    with pytest.raises(ValueError, match=message):
        ga.hessian_trace(lambda x: x.square().sum(1), torch.zeros(2, 4), **arguments)


def test_bad_functions_and_types():
    with pytest.raises(ValueError, match=r"must map \(2, 4\) to \(2,\)"):
        ga.hessian_trace(lambda x: x, torch.zeros(2, 4))
    with pytest.raises(TypeError, match="convert to float"):
        ga.hessian_trace(lambda x: x.sum(1), torch.zeros(2, 4, dtype=torch.uint8))


@pytest.mark.parametrize("method", FINITE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_finite_differences_refuse_half_precision(method, dtype):
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="rounding noise"):
        ga.hessian_trace(lambda x: x.square().sum(1), x.to(dtype), method=method)
    with pytest.raises(ValueError, match="rounding noise"):
        ga.hessian_trace(lambda x: x.to(dtype).square().sum(1), x, method=method)
    found = ga.hessian_trace(
        lambda x: x.square().sum(1), x.to(dtype), method=method, allow_low_precision=True
    )
    assert found.dtype == dtype


def test_finite_differences_switch_autocast_off():
    net = nn.Sequential(nn.Linear(4, 8), nn.Softplus(2.0), nn.Linear(8, 1))
    x, noise = torch.randn(3, 4), torch.randn(2, 3, 4)

    def fn(x):
        return net(x).squeeze(1)

    for method in FINITE:
        plain = ga.hessian_trace(fn, x, method=method, noise=noise, sigma=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            found = ga.hessian_trace(fn, x, method=method, noise=noise, sigma=0.1)
        assert torch.equal(found, plain)
