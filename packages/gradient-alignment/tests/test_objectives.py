"""Score-matching objectives against their definitions, and what they are minimised by."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import F64, exact_hessians, make_net

import gradient_alignment as ga


def make_case(seed=0, count=2):
    net = make_net(seed)

    def fn(x):
        return net(x)[:, 1]

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 5, generator=generator, dtype=F64)
    noise = torch.randn(count, 3, 5, generator=generator, dtype=F64)
    slope = torch.stack([torch.autograd.functional.jacobian(fn, s[None])[0, 0] for s in x])
    return fn, x, noise, slope, exact_hessians(fn, x)


def test_score_is_the_input_gradient():
    fn, x, _, slope, _ = make_case()
    torch.testing.assert_close(ga.score(fn, x), slope, rtol=0, atol=1e-13)
    assert not ga.score(fn, x).requires_grad
    assert ga.score(fn, x, create_graph=True).requires_grad


def test_objectives_are_their_formulas():
    fn, x, v, s, h = make_case()
    trace = h.diagonal(dim1=1, dim2=2).sum(1)
    vhv = torch.einsum("kbi,bij,kbj->kb", v, h, v).mean(0)
    norm = 0.5 * s.square().sum(1)
    curvature = h.diagonal(dim1=1, dim2=2).square().sum(1)
    expected = {
        "esm": (trace + norm, {"method": "exact"}),
        "ssm": (vhv + 0.5 * (v * s).sum(2).square().mean(0), {"noise": v}),
        "ssm-vr": (vhv + norm, {"noise": v}),
        "ksm": (trace + norm + 0.3 * curvature, {"curvature": 0.3}),
    }
    for objective, (value, options) in expected.items():
        found = ga.score_matching_loss(fn, x, objective, **options)
        torch.testing.assert_close(found, value, rtol=0, atol=1e-12)
        assert found.requires_grad
        assert not ga.score_matching_loss(fn, x, objective, create_graph=False).requires_grad


def test_finite_difference_objective_is_its_formula_and_tends_to_the_sliced_one():
    fn, x, v, _, _ = make_case()
    eps = 0.1
    rows = [
        (fn(x + eps * r) + fn(x - eps * r) - 2 * fn(x)) / eps**2
        + (fn(x + eps * r) - fn(x - eps * r)).square() / (8 * eps**2)
        for r in v
    ]
    found = ga.score_matching_loss(fn, x, "fd-ssm", noise=v, sigma=eps)
    torch.testing.assert_close(found, torch.stack(rows).mean(0), rtol=1e-12, atol=1e-12)
    sliced = ga.score_matching_loss(fn, x, "ssm", noise=v)
    near = ga.score_matching_loss(fn, x, "fd-ssm", noise=v, sigma=1e-4)
    torch.testing.assert_close(near, sliced, rtol=0, atol=1e-5)


def test_denoising_objective_is_its_formula():
    fn, x, z, _, _ = make_case()
    sigma = 0.4

    def slope(points):
        return torch.stack([torch.autograd.functional.jacobian(fn, p[None])[0, 0] for p in points])

    plain = torch.stack([0.5 * (slope(x + sigma * r) + r / sigma).square().sum(1) for r in z])
    found = ga.score_matching_loss(fn, x, "dsm", noise=z, sigma=sigma)
    torch.testing.assert_close(found, plain.mean(0), rtol=1e-12, atol=1e-12)
    weighted = ga.score_matching_loss(fn, x, "dsm", noise=z, sigma=sigma, sigma_weighted=True)
    torch.testing.assert_close(weighted, sigma**2 * plain.mean(0), rtol=1e-12, atol=1e-12)


def test_variance_reduction_keeps_the_mean_and_removes_the_blow_up():
    fn, x, _, _, _ = make_case()
    generator = torch.Generator().manual_seed(3)
    many = x[:1].expand(20_000, 5)
    z = torch.randn(1, 20_000, 5, generator=generator, dtype=F64)
    sigma = 0.05
    plain = ga.score_matching_loss(fn, many, "dsm", noise=z, sigma=sigma, create_graph=False)
    reduced = ga.score_matching_loss(
        fn, many, "dsm", noise=z, sigma=sigma, variance_reduction=True, create_graph=False
    )
    error = (plain - reduced).std() / math.sqrt(20_000)
    assert abs((plain - reduced).mean()) < 4 * error
    assert plain.var() / reduced.var() > 100


def gaussian_fit(objective, draws=1, **options):
    """Fit mean and precision of exp(-½(x-m)ᵀP(x-m)) to samples of a known 2-D Gaussian."""
    generator = torch.Generator().manual_seed(0)
    root = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=F64)
    data = torch.randn(4000, 2, generator=generator, dtype=F64) @ root.T + 1.0
    mean = torch.zeros(2, dtype=F64, requires_grad=True)
    factor = torch.eye(2, dtype=F64).requires_grad_()
    noise = torch.randn(draws, 4000, 2, generator=generator, dtype=F64)

    def log_density(x):
        return -0.5 * ((x - mean) @ factor).square().sum(1)

    optimizer = torch.optim.LBFGS([mean, factor], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = ga.score_matching_loss(log_density, data, objective, noise=noise, **options).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    precision = (factor @ factor.T).detach()
    return data, mean.detach(), torch.linalg.inv(precision)


def test_exact_score_matching_recovers_a_gaussian():
    """The minimiser is the sample's own mean and covariance, in closed form."""
    data, mean, covariance = gaussian_fit("esm", method="exact")
    torch.testing.assert_close(mean, data.mean(0), rtol=0, atol=1e-4)
    sample = torch.cov(data.T, correction=0)
    torch.testing.assert_close(covariance, sample, rtol=0, atol=1e-4)  # LBFGS stops there


@pytest.mark.parametrize("objective", ["ssm", "ssm-vr", "fd-ssm"])
def test_sliced_objectives_recover_it_within_their_noise(objective):
    data, mean, covariance = gaussian_fit(objective)
    sample = torch.cov(data.T, correction=0)
    assert (mean - data.mean(0)).norm() < 0.1
    assert (covariance - sample).norm() / sample.norm() < 0.1


def test_denoising_recovers_the_smoothed_density():
    sigma = 0.5
    data, mean, covariance = gaussian_fit("dsm", draws=16, sigma=sigma)
    smoothed = torch.cov(data.T, correction=0) + sigma**2 * torch.eye(2, dtype=F64)
    assert (mean - data.mean(0)).norm() < 0.1
    assert (covariance - smoothed).norm() / smoothed.norm() < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "foo"}, "objective must be one of"),
        ({"objective": "dsm", "sigma": -1.0}, "sigma must be"),
        ({"objective": "ksm", "curvature": math.inf}, "curvature must be finite"),
        ({"objective": "ssm", "num_samples": 0}, "num_samples must be"),
        ({"objective": "ssm", "method": "foo"}, "method must be one of"),
        ({"objective": "ssm", "noise": torch.zeros(2, 3)}, r"noise must be \(K, 2, 3\)"),
        ({"objective": "fd-ssm", "noise": torch.zeros(1, 1, 3)}, r"noise must be \(K, 2, 3\)"),
        ({"objective": "dsm", "noise": torch.zeros(0, 2, 3)}, r"noise must be \(K, 2, 3\)"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ga.score_matching_loss(lambda x: x.sum(1), torch.zeros(2, 3), **arguments)


def test_half_precision_is_refused_for_finite_differences_only():
    x = torch.randn(2, 3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="rounding noise"):
        ga.score_matching_loss(lambda x: x.square().sum(1), x, "fd-ssm")
    assert ga.score_matching_loss(lambda x: x.square().sum(1), x, "ssm").isfinite().all()
    with pytest.raises(TypeError, match="convert to float"):
        ga.score(lambda x: x.sum(1), torch.zeros(2, 3, dtype=torch.long))
