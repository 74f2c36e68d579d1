"""Spaces, projections, surrogates and the trust region against SciPy and closed forms."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn

from mi_surrogates import (
    DesignSpace,
    EnsembleSurrogate,
    GPSurrogate,
    InfeasibleDesign,
    MLPSurrogate,
    Parameter,
    QuadraticSurrogate,
)
from mi_surrogates.design import Region, ascend, box_penalty, make_surrogate
from mi_surrogates.design.projection import nearest, nearest_soft
from mi_surrogates.design.surrogate import check_points
from mi_surrogates.design.trust import rescaled, stretched


def box(dim: int, **options) -> DesignSpace:
    return DesignSpace(initial=np.full(dim, 0.5), lower=0.0, upper=1.0, **options)


def test_parameters_and_arrays_make_the_same_space() -> None:
    one = DesignSpace({"a": Parameter(1.0, 0.0, 2.0, sigma=0.1), "b": Parameter(5.0, 0.0, 10.0)})
    two = DesignSpace(
        initial=[1.0, 5.0], lower=0.0, upper=[2.0, 10.0], sigma=[0.1, 1.0], names=["a", "b"]
    )
    assert one.config() == two.config()
    assert one.as_dict(one.initial) == {"a": 1.0, "b": 5.0}
    assert np.allclose(one.from_unit(one.to_unit(one.initial)), one.initial)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DesignSpace({"a": Parameter(0.5, 1.0, 1.0)}), "'a': lower 1.0 must be below"),
        (lambda: DesignSpace({"a": Parameter(3.0, 0.0, 1.0)}), "'a': initial 3.0 is outside"),
        (lambda: DesignSpace({"a": Parameter(0.5, 0.0, 1.0, sigma=0.0)}), "'a': sigma must be"),
        (lambda: DesignSpace({"a": Parameter(0.5, 0.0, math.inf, sigma=1.0)}), "'a': .* finite"),
        (lambda: DesignSpace({}), "at least one parameter"),
        (lambda: DesignSpace(), "give either"),
        (lambda: box(2, names=["a", "a"]), "names must be 2 different"),
        (lambda: box(2).add_linear([1.0], 1.0), "2 finite numbers"),
        (lambda: box(2).add_constraint(lambda t: t, 1.0), "must map"),
        (lambda: box(1).project(np.array([math.nan])), "finite"),
    ],
)
def test_bad_spaces_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_contradictory_and_violated_constraints_are_infeasible() -> None:
    space = box(2)
    space.add_linear([1.0, 1.0], 1.5)
    with pytest.raises(InfeasibleDesign, match="satisfies all linear"):
        space.add_linear([-1.0, -1.0], -1.8)
    assert len(space.linear) == 1
    tight = box(2)
    tight.add_linear([1.0, 1.0], 0.5)
    with pytest.raises(InfeasibleDesign, match="start from"):
        tight.check_initial()
    soft = box(2)
    soft.add_constraint(lambda t: t.sum(-1) + 10, 1.0)
    with pytest.raises(InfeasibleDesign, match="soft constraints"):
        soft.restore(soft.initial)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 3), st.integers(0, 10_000))
def test_projection_is_the_nearest_feasible_point_and_idempotent(
    dim: int, rows: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    inside = rng.random(dim)
    linear = []
    for i in range(rows):
        row = rng.standard_normal(dim)
        equal = i == 0 and dim > 1 and seed % 2 == 0
        linear.append((row, float(row @ inside) + (0.0 if equal else 0.1 * rng.random()), equal))
    theta = inside + 2 * rng.standard_normal(dim)
    low, high = np.zeros(dim), np.ones(dim)
    found = nearest(theta, low, high, linear)
    assert np.allclose(nearest(found, low, high, linear), found, atol=1e-9)
    assert (found >= low).all()
    assert (found <= high).all()
    for row, limit, equal in linear:
        assert row @ found <= limit + 1e-7
        assert not equal or row @ found >= limit - 1e-7
    constraints = [
        {"type": "eq" if e else "ineq", "fun": lambda t, a=a, b=b: b - a @ t} for a, b, e in linear
    ]
    slsqp = minimize(
        lambda t: ((t - theta) ** 2).sum(),
        inside,
        bounds=[(0, 1)] * dim,
        constraints=constraints,
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    # theirs is no nearer than ours, beyond its own tolerance on the constraints
    assert np.linalg.norm(found - theta) <= np.linalg.norm(slsqp.x - theta) + 1e-5


def test_projection_onto_the_simplex_is_the_known_one() -> None:
    space = DesignSpace(initial=[0.25] * 4, lower=0.0, upper=1.0)
    space.add_linear([1.0] * 4, 1.0, equal=True)
    theta = np.array([0.9, 0.6, -0.2, 0.1])
    shift = (0.9 + 0.6 - 1) / 2  # the two that stay positive
    assert np.allclose(space.project(theta), [0.9 - shift, 0.6 - shift, 0, 0], atol=1e-12)
    assert np.allclose(space.sample(50, 0).sum(1), 1.0)


def test_soft_constraints_are_met_beside_linear_ones() -> None:
    disc = nearest_soft(
        np.array([1.0, 1.0]),
        np.zeros(2),
        np.ones(2),
        [(np.array([1.0, 0.0]), 0.5, False), (np.array([0.0, 1.0]), 0.8, True)],
        [lambda t: t.square().sum(-1) - 0.73],
    )
    assert np.allclose(disc, [0.3, 0.8], atol=1e-4)


def test_box_penalty_is_zero_inside_and_pulls_back_outside() -> None:
    theta = torch.tensor([2.0, 0.5, -1.0], requires_grad=True)
    value = box_penalty(theta, torch.zeros(3), torch.ones(3))
    value.backward()
    assert value.item() == pytest.approx(2 / 3)
    assert theta.grad.tolist() == pytest.approx([2 / 3, 0.0, -2 / 3])


def points(dim: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quadratic(z: torch.Tensor) -> torch.Tensor:
    return 3 + z[:, 0] - 2 * z[:, 1] - z[:, 0] ** 2 + 0.7 * z[:, 0] * z[:, 1] - 2 * z[:, 1] ** 2


def test_quadratic_surrogate_is_exact_on_quadratics_with_its_gradient() -> None:
    surrogate = QuadraticSurrogate(3).fit(points(3, 40), quadratic(points(3, 40)))
    z = points(3, 10, 1).requires_grad_()
    mean, std = surrogate(z)
    assert torch.allclose(mean, quadratic(z), atol=1e-8)
    assert bool((std < 1e-5).all())
    ours = torch.autograd.grad(mean.sum(), z, retain_graph=True)[0]
    truth = torch.autograd.grad(quadratic(z).sum(), z)[0]
    assert torch.allclose(ours, truth, atol=1e-7)


def test_quadratic_surrogate_is_weighted_least_squares() -> None:
    z = points(1, 12)
    value = torch.sin(3 * z[:, 0])
    stderr = torch.linspace(0.5, 2.0, 12, dtype=torch.float64)
    surrogate = QuadraticSurrogate(1, ridges=(1e-13,)).fit(z, value, stderr)
    weight = check_points(z, value, stderr, None)
    columns = np.vander(z[:, 0].numpy(), 3)
    root = weight.sqrt().numpy()
    solution = np.linalg.lstsq(columns * root[:, None], value.numpy() * root, rcond=None)[0]
    assert np.allclose(surrogate(z)[0], columns @ solution, atol=1e-7)


def test_points_with_large_errors_count_less() -> None:
    weight = check_points(
        points(1, 2), torch.tensor([0.0, 1.0]).double(), torch.tensor([0.1, 1.0]), None
    )
    # errors of 0.1 and 1, and a floor of 2 % of the spread 0.5
    expected = (1 + 1e-4) / (0.01 + 1e-4)
    assert (weight[0] / weight[1]).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["ensemble", "mlp", "quadratic", "gp"])
def test_surrogates_learn_a_hill_and_round_trip(name: str) -> None:
    z, target = points(2, 40).float(), -points(2, 40).float().square().sum(1)
    surrogate = make_surrogate(name, 2, generator=torch.Generator().manual_seed(0))
    assert surrogate.fit(z, target, torch.full((40,), 0.05)) is surrogate
    top = surrogate(torch.zeros(1, 2))[0].item()
    side = surrogate(torch.full((1, 2), 1.2))[0].item()
    assert -0.7 < top < 0.7
    assert side < top - 1.5
    probe = torch.randn(7, 2, generator=torch.Generator().manual_seed(2))
    mean, std = (v.detach() for v in surrogate(probe))
    assert mean.shape == std.shape == (7,)
    other = make_surrogate(name, 2, generator=torch.Generator().manual_seed(9))
    other.load_state_dict(surrogate.state_dict())
    for twin in (other, copy.deepcopy(surrogate), pickle.loads(pickle.dumps(surrogate))):
        assert torch.allclose(twin(probe)[0], mean, atol=1e-5)


@pytest.mark.parametrize(
    "surrogate", [EnsembleSurrogate(2), MLPSurrogate(2), QuadraticSurrogate(2)]
)
def test_surrogates_compile(surrogate: nn.Module) -> None:
    probe = torch.randn(7, 2)
    compiled = torch.compile(surrogate, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(probe)[0], surrogate(probe)[0], atol=1e-6)


def test_batch_norm_is_that_of_torch_layer_by_layer() -> None:
    """The released surrogate: Linear, BatchNorm1d, ELU, three times, and Linear."""
    generator = torch.Generator().manual_seed(0)
    ours = MLPSurrogate(2, batch_norm=True, generator=generator, dtype=torch.float64)
    theta = torch.randn(30, 2, generator=generator, dtype=torch.float64)
    value = -theta.square().sum(1)
    net = ours.net
    layers: list[nn.Module] = []
    products = [net.first[0], *net.weights]
    for i, (weight, bias) in enumerate(zip(products, net.biases, strict=True)):
        linear = nn.Linear(*weight.shape[1:], dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(weight[0].T)
            linear.bias.copy_(bias[0, 0])
        layers.append(linear)
        if i < 3:
            layers += [nn.BatchNorm1d(weight.shape[2], dtype=torch.float64), nn.ELU()]
    theirs = nn.Sequential(*layers)
    torch.testing.assert_close(net.train()(theta[None])[0], theirs(theta))  # batch statistics
    torch.testing.assert_close(net.eval()(theta[None])[0], theirs.eval()(theta))  # running ones
    mean, _ = ours.fit(theta, value)(theta)
    assert not net.training
    assert (mean - value).square().mean() < 0.1 * value.var()
    again = MLPSurrogate(2, batch_norm=True, dtype=torch.float64)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(theta)[0], mean)


def test_ensemble_members_disagree_where_there_is_no_data() -> None:
    z = points(1, 30).float() * 0.3
    surrogate = EnsembleSurrogate(1, generator=torch.Generator().manual_seed(0)).fit(z, z[:, 0])
    near, far = (surrogate(torch.tensor([[t]]))[1].item() for t in (0.0, 5.0))
    assert far > 5 * near
    single = EnsembleSurrogate(1, members=1).fit(z, z[:, 0])
    assert single(z)[1].abs().max() == 0


def test_warm_started_surrogate_is_the_same_function_in_a_new_frame() -> None:
    z = points(2, 30).float()
    surrogate = EnsembleSurrogate(2, warm_start=True, generator=torch.Generator().manual_seed(0))
    surrogate.fit(z, z[:, 0])
    probe = torch.randn(5, 2)
    before = surrogate(probe)[0].detach()
    surrogate.steps = 0
    surrogate.fit(3 * z + 1, 10 * z[:, 0] - 4)  # other data: another frame, no training
    assert torch.allclose(surrogate(probe)[0], before, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_surrogate("forest", 2), "ensemble, mlp, quadratic, gp"),
        (lambda: EnsembleSurrogate(2, members=0), "members"),
        (lambda: EnsembleSurrogate(0), "dim"),
        (lambda: QuadraticSurrogate(3).fit(points(3, 4), torch.zeros(4)), "at least 5 designs"),
        (
            lambda: QuadraticSurrogate(1).fit(points(1, 9), torch.zeros(9, 1)),
            r"value must be \(9,\)",
        ),
        (
            lambda: EnsembleSurrogate(1).fit(points(1, 9), torch.zeros(9, 1)),
            r"value must be \(9,\)",
        ),
        (lambda: EnsembleSurrogate(1).fit(torch.zeros(9), torch.zeros(9)), "theta must be"),
        (lambda: EnsembleSurrogate(1).fit(points(1, 2) / 0, torch.zeros(2)), "finite"),
        (
            lambda: QuadraticSurrogate(1).fit(
                points(1, 9), torch.zeros(9), torch.full((9,), math.nan)
            ),
            "stderr must be finite",
        ),
        (
            lambda: EnsembleSurrogate(1).fit(points(1, 9), torch.zeros(9), None, -torch.ones(9)),
            "weight must be finite and at least 0",
        ),
        (
            lambda: EnsembleSurrogate(1).fit(points(1, 9), torch.zeros(9), None, torch.zeros(9)),
            "positive for at least one",
        ),
        (lambda: Region(np.zeros(1), np.eye(1), 0.0), "radius"),
    ],
)
def test_bad_regressions_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_gp_before_fit_says_so() -> None:
    with pytest.raises(RuntimeError, match="call fit"):
        GPSurrogate(1)(torch.zeros(1, 1))
    with pytest.raises(ValueError, match="value must be"):
        GPSurrogate(1).fit(torch.zeros(3, 1), torch.zeros(3, 1))


class Random(nn.Module):
    """A random smooth function of z."""

    def __init__(self, dim: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("a", torch.randn(8, dim, generator=generator).double() * 2)
        self.register_buffer("b", torch.randn(8, generator=generator).double())

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.sin(z @ self.a.T + self.b).sum(1), torch.zeros(len(z), dtype=z.dtype)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(0, 10_000))
def test_no_step_leaves_the_region_or_the_constraints(dim: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((dim, dim)) * 0.2 + 0.1 * np.eye(dim)
    space = box(dim)
    space.add_linear(np.ones(dim), 0.6 * dim)
    region = Region(space.project(rng.random(dim)), root @ root.T + 1e-4 * np.eye(dim), 1.2)
    step = ascend(Random(dim, seed), region, space)
    delta = step.theta - region.center
    assert delta @ np.linalg.solve(region.cov, delta) < 1.2**2
    assert space.violation(step.theta) < 1e-6


def test_ascent_finds_the_top_of_a_quadratic_inside() -> None:
    space = box(2)
    z = points(2, 30)
    top = torch.tensor([0.5, -0.3], dtype=torch.float64)
    surrogate = QuadraticSurrogate(2).fit(z, -(z - top).square().sum(1))
    region = Region(np.full(2, 0.5), np.diag([0.01, 0.04]))
    step = ascend(surrogate, region, space, epochs=300, tolerance=1e-12, beta=0.0)
    assert np.allclose(region.to_z(step.theta), top, atol=0.01)
    assert not step.at_boundary
    assert step.gain == pytest.approx(0.34, abs=1e-3)


def test_violated_soft_constraint_changes_the_step() -> None:
    """The authors' penalty sits on a detached design and has no gradient; this one has."""
    z = points(2, 30)
    surrogate = QuadraticSurrogate(2).fit(z, z[:, 0])
    region = Region(np.full(2, 0.5), 0.01 * np.eye(2))
    free = ascend(surrogate, region, box(2)).theta
    space = box(2)
    space.add_constraint(lambda t: t[:, 0], 0.52)
    held = ascend(surrogate, region, space).theta
    assert free[0] > 0.55
    assert held[0] <= 0.52 * (1 + 1e-3)


def test_not_finite_gradient_is_an_error() -> None:
    class Broken(nn.Module):
        def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return (z * math.nan).sum(1), z[:, 0] * 0

    with pytest.raises(FloatingPointError, match="not finite"):
        ascend(Broken(), Region(np.full(2, 0.5), np.eye(2)), box(2))


def test_covariance_adapts_within_its_limits() -> None:
    cov = np.array([[4.0, 1.0], [1.0, 1.0]])
    half = rescaled(cov, 0.25, np.full(2, 0.01), np.full(2, 10.0))
    assert np.allclose(half, cov / 4)
    capped = rescaled(cov, 100.0, np.full(2, 0.01), np.array([3.0, 10.0]))
    assert np.sqrt(np.diag(capped)).tolist() == pytest.approx([3.0, 10.0])
    move = np.array([3.0, 4.0])
    along = stretched(np.array([2.0, 2.0]), move)
    n = move / 5.0001
    assert np.allclose(along, 4 * np.eye(2) + 39 * np.outer(n, n))
