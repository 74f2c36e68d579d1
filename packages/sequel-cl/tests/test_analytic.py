"""Closed forms and special cases."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

import sequel
from sequel import functional as F
from sequel import metrics
from sequel.algorithms.quadratic import merge
from sequel.fisher import fisher_diagonal
from sequel.ops.torch import TorchOps

from .conftest import fit_quiet, small_learner, small_scenario

OPS = TorchOps()


# ---------------------------------------------------------------- projections
@pytest.mark.parametrize("kind", ["numpy", "torch", "jax"])
def test_agem_projects_the_textbook_case(kind: str) -> None:
    if kind == "jax":
        make: Any = pytest.importorskip("jax.numpy").asarray
    else:
        make = np.asarray if kind == "numpy" else torch.tensor
    out = F.agem_project(make([1.0, 0.0]), make([-1.0, 1.0]))
    assert np.asarray(out).tolist() == [0.5, 0.5]
    same = F.agem_project(make([1.0, 0.0]), make([1.0, 1.0]))
    assert np.asarray(same).tolist() == [1.0, 0.0]
    gem = F.gem_project(make([1.0, 0.0]), make([[-1.0, 1.0]]), margin=0.0, ridge=0.0)
    np.testing.assert_allclose(np.asarray(gem), [0.5, 0.5], atol=1e-7)


def test_agem_result_is_orthogonal_to_the_reference_and_zero_reference_is_no_op() -> None:
    rng = np.random.default_rng(0)
    g, r = rng.standard_normal(50), rng.standard_normal(50)
    r = r if g @ r < 0 else -r
    assert abs(F.agem_project(g, r) @ r) < 1e-12
    assert (F.agem_project(g, 0 * r) == g).all()


@pytest.mark.parametrize("seed", range(8))
def test_gem_solution_satisfies_the_kkt_conditions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    G, g = rng.standard_normal((6, 20)), rng.standard_normal(20)
    margin, ridge = 0.1, 1e-3
    v = F.gem_dual(G @ G.T, G @ g, margin, ridge)
    slope = (G @ G.T + ridge * np.eye(6)) @ v + G @ g
    assert (v >= margin - 1e-12).all()
    assert (slope >= -1e-9).all()
    assert abs(slope @ (v - margin)) < 1e-9


def test_gem_dual_agrees_with_a_general_solver() -> None:
    rng = np.random.default_rng(3)
    G, g = rng.standard_normal((4, 9)), rng.standard_normal(9)
    P, q = G @ G.T + 1e-3 * np.eye(4), G @ g
    found = minimize(
        lambda v: 0.5 * v @ P @ v + q @ v, np.ones(4), jac=lambda v: P @ v + q,
        bounds=[(0.5, None)] * 4, options={"ftol": 1e-15, "gtol": 1e-12},
    )  # fmt: skip
    np.testing.assert_allclose(F.gem_dual(G @ G.T, q), found.x, atol=1e-6)


def test_gem_leaves_an_agreeing_gradient_alone_and_ignores_inactive_rows() -> None:
    G = np.array([[1.0, 0.0], [-1.0, 0.0]])
    assert F.gem_dual(G[:1] @ G[:1].T, G[:1] @ [1.0, 0.0]).tolist() == [0.0]
    off = F.gem_dual(G @ G.T, G @ [1.0, 0.0], active=np.array([1, 0]))
    assert off.tolist() == [0.0, 0.0]


# ---------------------------------------------------------------------- Fisher
def softmax_linear() -> tuple[nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    model = nn.Linear(5, 4).double()
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.arange(30) % 4
    return model, x, y, model(x).softmax(-1).detach()


@pytest.mark.parametrize("closed", [True, False])
def test_empirical_fisher_of_softmax_regression_is_its_closed_form(closed: bool) -> None:
    model, x, y, p = softmax_linear()
    residual = p - nn.functional.one_hot(y, 4)
    expected = torch.einsum("nc,nd->ncd", residual, x).pow(2).mean(0)
    found = F.fisher_diagonal(model, [(x[:20], y[:20]), (x[20:], y[20:])], closed_form=closed)
    torch.testing.assert_close(found["weight"], expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found["bias"], residual.pow(2).mean(0), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("closed", [True, False])
def test_true_fisher_of_softmax_regression_is_its_closed_form(closed: bool) -> None:
    model, x, y, p = softmax_linear()
    expected = torch.einsum("nc,nd->cd", p * (1 - p), x.pow(2)) / len(x)
    found = F.fisher_diagonal(model, [(x, y)], "true", closed_form=closed)
    torch.testing.assert_close(found["weight"], expected, rtol=1e-12, atol=1e-15)


def test_mc_fisher_tends_to_the_true_fisher() -> None:
    model, x, y, p = softmax_linear()
    true = F.fisher_diagonal(model, [(x, y)], "true")["weight"]
    drawn = F.fisher_diagonal(model, [(x, y)] * 300, "mc")["weight"]
    # A label makes the entry (p_c - 1)² x² with probability p_c, else p_c² x²: its exact variance.
    spread = p * (1 - p) * (1 - 2 * p) ** 2
    deviation = (torch.einsum("nc,nd->cd", spread, x**4) / len(x) ** 2 / 300).sqrt()
    assert float(((drawn - true) / deviation).abs().max()) < 4.5  # 20 entries


def test_batch_fisher_is_the_square_of_the_batch_mean() -> None:
    model, x, y, p = softmax_linear()
    g = (p - nn.functional.one_hot(y, 4)).T @ x / len(x)
    found = F.fisher_diagonal(model, [(x, y)], "batch")["weight"]
    torch.testing.assert_close(found, g.pow(2), rtol=1e-12, atol=1e-15)


def test_output_sensitivity_of_a_linear_model_is_exact() -> None:
    model, x, y, _ = softmax_linear()
    expected = torch.einsum("nc,nd->ncd", 2 * model(x), x).abs().mean(0)
    found = fisher_diagonal(model, [(x, y)], "output")["weight"]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["empirical", "true", "mc", "output"])
def test_closed_forms_of_conv_layers_equal_the_per_sample_loop(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(27, 4),
    ).double()  # fmt: skip
    x, y = torch.randn(9, 2, 6, 6, dtype=torch.float64), torch.arange(9) % 4
    fast = fisher_diagonal(model, [(x, y)], kind)
    slow = fisher_diagonal(model, [(x, y)], kind, closed_form=False)
    for name in slow:
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-10, atol=1e-14)
    if kind == "empirical":
        loop = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        for i in range(9):
            model.zero_grad()
            nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
            for n, p in model.named_parameters():
                loop[n] += p.grad**2 / 9
        for name in slow:
            torch.testing.assert_close(fast[name], loop[name], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (3, 2), "stride": (1, 3), "padding": (0, 2), "dilation": (2, 1)},
        {"kernel_size": 1},
    ],
)
def test_conv_closed_form_for_any_geometry(geometry: dict[str, Any], power: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, bias=False, **geometry).double()
    x, v = torch.randn(70, 2, 7, 9, dtype=torch.float64), torch.rand(70, dtype=torch.float64)
    out = layer(x)
    delta = torch.randn_like(out)
    each = [torch.autograd.grad(layer(x[i]), layer.weight, delta[i])[0] for i in range(70)]
    expected = sum(v[i] * g.abs() ** power for i, g in enumerate(each))
    found = sequel.fisher._conv(layer, x, delta, v, power)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Branching(nn.Module):
    """Looks at values, which vmap cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Any) -> Any:
        return self.a(x) * (self.scale if bool((x > -9).all()) else 0.0)


@pytest.mark.parametrize("kind", ["empirical", "output"])
def test_a_model_that_vmap_cannot_follow_is_measured_sample_by_sample(kind: str) -> None:
    torch.manual_seed(0)
    model = Branching().double()
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 4
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i in range(9):
        out = model(x[i : i + 1])
        loss = (
            out.pow(2).sum() if kind == "output" else nn.functional.cross_entropy(out, y[i : i + 1])
        )
        for (n, _), g in zip(
            model.named_parameters(),
            torch.autograd.grad(loss, list(model.parameters())),
            strict=True,
        ):
            expected[n] += (g.abs() if kind == "output" else g**2) / 9
    found = fisher_diagonal(model, [(x, y)], kind)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-15)


def test_an_error_of_the_models_own_is_not_taken_for_vmaps() -> None:
    class Wrong(nn.Linear):
        def forward(self, x: Any) -> Any:
            raise RuntimeError("a wire is loose")

    with pytest.raises(RuntimeError, match="a wire is loose"):
        fisher_diagonal(
            Wrong(4, 4), [(torch.zeros(9, 4), torch.zeros(9, dtype=torch.long))], closed_form=False
        )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4, bias=False)
        self.b = nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Any) -> Any:
        return (self.b(self.a(x).relu()),)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return self.a(self.a(x).relu())


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Any) -> Any:
        return self.norm(self.a(x))


class Reused(nn.Module):
    """The layer's weight is also used outside the layer: only the check can see it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return self.a(x) + x @ self.a.weight


@pytest.mark.parametrize("kind", [Tied, Twice, Scaled, Reused])
def test_fisher_falls_back_where_the_closed_form_does_not_hold(kind: type[nn.Module]) -> None:
    model = kind().double()
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.arange(7) % 4
    found = fisher_diagonal(model, [(x, y), (x[:0], y[:0])], accumulate="kahan")
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i in range(7):
        out = model(x[i : i + 1])
        out = out[0] if isinstance(out, tuple) else out
        grads = torch.autograd.grad(
            nn.functional.cross_entropy(out, y[i : i + 1]), list(model.parameters())
        )
        for n, g in zip(total, grads, strict=True):
            total[n] += g**2 / 7
    for n, expected in total.items():
        torch.testing.assert_close(found[n], expected, rtol=1e-9, atol=1e-14)


def test_fisher_leaves_mode_gradients_and_statistics_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    one, two = (fisher_diagonal(model, [(x, y)]) for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)  # dropout is off
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------ quadratics
def test_separate_ewc_merges_seven_tasks_exactly() -> None:
    rng = torch.Generator().manual_seed(0)

    def draw() -> dict[str, torch.Tensor]:
        return {"w": torch.randn(40, generator=rng, dtype=torch.float64)}

    state: Any = {"omega": {"w": torch.zeros(40).double()}, "anchor": draw()}
    terms = []
    for _ in range(7):
        fisher = {"w": draw()["w"].relu()}  # half of the entries are 0
        anchor = draw()
        terms.append((fisher, anchor))
        state = merge(OPS, state, fisher, anchor)
    points = [draw() for _ in range(3)]
    values = [
        float(F.quad_penalty(p, state["omega"], state["anchor"], 2.0))
        - sum(float(F.quad_penalty(p, f, a, 2.0)) for f, a in terms)
        for p in points
    ]
    assert max(values) - min(values) < 1e-11 * abs(values[0])  # equal up to the constant
    p = points[0]["w"]
    gradient = sum(f["w"] * (p - a["w"]) for f, a in terms)
    merged = state["omega"]["w"] * (p - state["anchor"]["w"])
    torch.testing.assert_close(merged, gradient, rtol=1e-12, atol=1e-12)


def test_prox_is_the_argmin_and_stable_for_huge_lam() -> None:
    p, w, a, step = 1.3, 0.7, -0.4, 2.5
    found = minimize(
        lambda q: 0.5 * (q[0] - p) ** 2 + 0.5 * step * w * (q[0] - a) ** 2, [0.0], tol=1e-14
    ).x[0]
    assert F.prox_step(np.array(p), np.array(w), np.array(a), step) == pytest.approx(
        found, abs=1e-7
    )
    assert F.prox_step(np.array(p), np.array(w), np.array(a), 1e6 * 1e6) == pytest.approx(a)
    small = 1e-7
    explicit = p - small * w * (p - a)
    assert F.prox_step(np.array(p), np.array(w), np.array(a), small) == pytest.approx(
        explicit, abs=1e-13
    )


def test_ewc_equals_joint_training_on_orthogonal_linear_regression() -> None:
    """Squared loss, inputs e_i: the Fisher of Gaussian noise is the Hessian and lam = N matches."""
    x = torch.eye(4, dtype=torch.float64)
    y1, y2 = (
        torch.tensor([1.0, -2.0, 0.5, 3.0]).double(),
        torch.tensor([0.0, 1.0, 2.0, -1.0]).double(),
    )
    first = y1.clone()  # solution of task 1: x @ w = y1
    omega = x.pow(2).mean(0)
    w = torch.zeros(4, dtype=torch.float64)
    for _ in range(2000):  # ½ Σ (x w - y2)² + (N/2) omega (w - first)²
        g = x.T @ (x @ w - y2) + 4 * omega * (w - first)
        w = w - 0.3 * g
    joint = torch.linalg.lstsq(torch.cat([x, x]), torch.cat([y1, y2])[:, None]).solution[:, 0]
    torch.testing.assert_close(w, joint, rtol=1e-12, atol=1e-12)


def si_on_a_quadratic(lr: float, steps: int) -> tuple[float, float, float]:
    """Run the SI definition on L = a θ²/2; returns the path integral, its closed form and the drop."""
    a, start = 1.7, 2.0
    si = sequel.SI()
    state: Any = {"path": {"w": torch.zeros((), dtype=torch.float64)}, "omega": {}, "anchor": {}}

    class Ctx:
        past = 0

    theta = torch.tensor(start, dtype=torch.float64)
    for _ in range(steps):
        g = a * theta
        new = theta - lr * g
        _, state = si.after_step(OPS, {"w": theta}, {"w": new}, {"w": g}, Ctx(), state)  # type: ignore[arg-type]
        theta = new
    q = 1 - lr * a
    closed = lr * a * a * start**2 * (1 - q ** (2 * steps)) / (1 - q * q)
    drop = 0.5 * a * (start**2 - float(theta) ** 2)
    return float(state["path"]["w"]), closed, drop


def test_si_path_is_the_geometric_sum_and_tends_to_the_loss_drop() -> None:
    path, closed, _ = si_on_a_quadratic(0.1, 25)
    assert path == pytest.approx(closed, rel=1e-12)
    path, _, drop = si_on_a_quadratic(1e-3, 3000)
    assert path == pytest.approx(drop, rel=0.01)


class KeepsOld(sequel.Callback):
    """A hook around the optimizer's step: SI then keeps the old parameters and subtracts."""

    def on_before_optimizer_step(self, learner: Any, **info: Any) -> None: ...


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({}, True),
        ({"momentum": 0.9}, True),
        ({"momentum": 0.9, "dampening": 0.3}, True),
        ({"momentum": 0.9, "nesterov": True}, False),
        ({"weight_decay": 0.1}, False),
    ],
)
@pytest.mark.parametrize("source", ["task", "total"])
def test_si_takes_sgds_update_instead_of_a_difference(
    options: dict[str, Any], known: bool, source: str
) -> None:
    found = []
    for callbacks in ([], [KeepsOld()]):
        torch.manual_seed(0)
        model = sequel.nn.MLP(64, (8,), 6).double()
        optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.05, **options})
        learner = sequel.Learner(
            model, optimizer, sequel.SI(lam=5.0, grad_source=source), batch_size=8, grad_clip=1.0,
            callbacks=callbacks,
        )  # fmt: skip
        fit_quiet(learner, small_scenario(2), epochs=1)
        assert learner.backend.plain_sgd is known
        found.append((learner.backend.state, dict(learner.backend.params)))
    for name, omega in found[1][0]["omega"].items():
        assert omega.max() > 0
        torch.testing.assert_close(found[0][0]["omega"][name], omega, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found[0][1][name], found[1][1][name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", ["two rates", "prox"])
def test_si_subtracts_where_the_update_is_not_one_multiple_of_the_gradient(case: str) -> None:
    found = []
    for callbacks in ([], [KeepsOld()]):
        torch.manual_seed(0)
        model = sequel.nn.MLP(64, (8,), 6).double()
        rate = 0.01 if case == "two rates" else 0.05
        groups = [
            {"params": list(model.encoder.parameters()), "lr": rate},
            {"params": list(model.classifier.parameters()), "lr": 0.05},
        ]
        algorithm = sequel.SI(lam=5.0, apply="prox" if case == "prox" else "grad")
        learner = sequel.Learner(
            model, torch.optim.SGD(groups), algorithm, batch_size=8, callbacks=callbacks
        )
        fit_quiet(learner, small_scenario(3), epochs=1)
        found.append(learner.backend.state["omega"])
    for name, omega in found[1].items():
        assert omega.max() > 0
        assert torch.equal(found[0][name], omega)


def test_si_importance_is_not_zero_after_a_task() -> None:
    scenario = small_scenario(2)
    learner = small_learner(sequel.SI(lam=0.0), scenario)
    fit_quiet(learner, scenario, epochs=1)
    assert sum(float(v.sum()) for v in learner.backend.state["omega"].values()) > 0


@pytest.mark.parametrize("mode", ["online", "last"])
def test_penalty_at_the_new_anchor_is_exactly_zero(mode: str) -> None:
    scenario = small_scenario(2)
    learner = small_learner(sequel.EWC(lam=3.0, mode=mode), scenario)
    fit_quiet(learner, scenario, epochs=1)
    ewc, state = learner.algorithm, learner.backend.state
    assert ewc.penalty(learner.backend.params, state).item() == 0.0
    assert sum(float(v.sum()) for v in state["omega"].values()) > 0


@pytest.mark.parametrize("name", ["omega", "anchor"])
def test_jax_step_uses_the_state_of_now_and_not_of_its_first_trace(name: str) -> None:
    pytest.importorskip("jax")
    import optax

    scenario = small_scenario(3)
    torch.manual_seed(0)
    model = sequel.nn.to_jax(sequel.nn.MLP(64, (8,), 6))

    def run(change: bool) -> Any:
        learner = sequel.Learner(model, optax.sgd(0.05), sequel.EWC(lam=5.0), batch_size=8)
        fit_quiet(learner, scenario, epochs=1, stop_after=2)
        state = learner.backend.state
        if change:
            learner.backend.state = {**state, name: {k: v + 0.5 for k, v in state[name].items()}}
        fit_quiet(learner, scenario, epochs=1)
        assert learner.backend.traces == 1
        return np.asarray(learner.backend.params["classifier.bias"])

    assert np.abs(run(False) - run(True)).max() > 1e-3


# ---------------------------------------------------------------- special cases
def final(algorithm: Any, **options: Any) -> dict[str, torch.Tensor]:
    scenario = small_scenario(2)
    learner = small_learner(algorithm, scenario, **options)
    fit_quiet(learner, scenario, epochs=2)
    return {k: v.detach().clone() for k, v in learner.backend.params.items()}


@pytest.mark.parametrize(
    "algorithm",
    [
        sequel.EWC(lam=0.0), sequel.SI(lam=0.0), sequel.MAS(lam=0.0), sequel.LwF(alpha=0.0),
        sequel.LFL(lam=0.0, freeze_classifier=False), sequel.DER(memory=20, alpha=0.0),
        sequel.DERpp(memory=20, alpha=0.0, beta=0.0), sequel.EWC(lam=0.0, apply="prox"),
        sequel.MCSGD(per_task=5),
    ],
    ids=lambda a: a.name,
)  # fmt: skip
def test_without_weight_a_method_is_fine_tuning_bit_for_bit(algorithm: Any) -> None:
    one, two = final(algorithm), final(sequel.Naive())
    assert all(torch.equal(one[k], two[k]) for k in two)


def test_er_on_the_first_task_is_fine_tuning_bit_for_bit() -> None:
    scenario = small_scenario(2)
    results = []
    for algorithm in (
        sequel.ER(memory=20),
        sequel.AGEM(per_task=9),
        sequel.GEM(per_task=9),
        sequel.Naive(),
    ):
        learner = small_learner(algorithm, scenario)
        fit_quiet(learner, scenario, epochs=1, stop_after=1)
        results.append(torch.cat([p.detach().flatten() for p in learner.backend.params.values()]))
    assert all(torch.equal(r, results[-1]) for r in results)


def test_mcsgd_without_optimisation_stays_at_the_previous_connected_point() -> None:
    scenario = small_scenario(2)
    learner = small_learner(sequel.MCSGD(per_task=5, init_position=0.0, epochs=0), scenario)
    fit_quiet(learner, scenario, epochs=1, stop_after=1)
    before = {k: v.clone() for k, v in learner.backend.state["bar"].items()}
    fit_quiet(learner, scenario, epochs=1)
    assert all(torch.equal(v, before[k]) for k, v in learner.backend.state["bar"].items())


def test_mcsgd_gradient_is_the_sum_over_the_line() -> None:
    """The direction of the first step, against autograd on the written-out objective."""
    scenario = small_scenario(2, n=48)
    algorithm = sequel.MCSGD(
        per_task=6,
        epochs=1,
        line_samples=3,
        chain_rule=True,
        momentum=0.0,
        lr=0.1,
        normalize="mean",
    )
    learner = small_learner(algorithm, scenario)
    fit_quiet(learner, scenario, epochs=1, stop_after=1)
    bar = {k: v.clone() for k, v in learner.backend.state["bar"].items()}
    fit_quiet(learner, scenario, epochs=1)
    hat = {k: v.detach().clone() for k, v in learner.backend.params.items()}
    memory = learner.backend.state["memory"]
    w = {k: (bar[k] + 0.1 * (hat[k] - bar[k])).requires_grad_() for k in bar}

    def loss(params: Any, rows: slice) -> torch.Tensor:
        out = torch.func.functional_call(
            learner.backend.model.module, params, (memory["x"][rows].float(),)
        )
        return nn.functional.cross_entropy(out, memory["y"][rows])

    total = 0.0
    for s in (0.0, 1 / 3, 2 / 3, 1.0):
        total = total + loss({k: bar[k] + s * (w[k] - bar[k]) for k in w}, slice(0, 12))
        total = total + loss({k: hat[k] + s * (w[k] - hat[k]) for k in w}, slice(6, 12))
    grads = torch.autograd.grad(total, list(w.values()))
    for (k, p), g in zip(w.items(), grads, strict=True):
        torch.testing.assert_close(
            learner.backend.state["bar"][k], (p - 0.1 * g).detach(), rtol=1e-4, atol=1e-6
        )


def test_distillation_gradient_is_zero_where_student_equals_teacher() -> None:
    z = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    seen = torch.tensor([1.0, 1, 1, 0, 0, 1]).double()
    kl = sequel.LwF().distillation(OPS, z.detach(), z, seen).mean()
    (g,) = torch.autograd.grad(kl, z)
    assert float(kl.detach()) == 0.0
    assert float(g.abs().max()) < 1e-16


def test_distillation_is_the_kl_divergence_over_the_seen_classes() -> None:
    torch.manual_seed(0)
    old, new = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    seen = torch.tensor([1.0, 0, 1, 1]).double()
    found = sequel.LwF(temperature=2.0, t2_scaling=True).distillation(OPS, old, new, seen)
    keep = [0, 2, 3]
    p, q = (old[:, keep] / 2).softmax(-1), (new[:, keep] / 2).softmax(-1)
    torch.testing.assert_close(found, 4 * (p * (p / q).log()).sum(-1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", ["penalty", "lwf"])
def test_gradcheck_of_penalty_and_distillation(case: str) -> None:
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    other = torch.randn(4, 3, dtype=torch.float64)
    if case == "penalty":
        assert torch.autograd.gradcheck(lambda p: F.quad_penalty(p, other.abs(), other, 2.0), (z,))
    else:
        ones = torch.ones(3, dtype=torch.float64)
        assert torch.autograd.gradcheck(
            lambda p: sequel.LwF().distillation(OPS, other, p, ones), (z,)
        )


# --------------------------------------------------------------------- metrics
def test_metrics_of_the_two_task_example() -> None:
    R = torch.tensor([[0.9, 0.1], [0.6, 0.8]], dtype=torch.float64)
    assert metrics.acc(R) == pytest.approx(0.7)
    assert metrics.bwt(R) == pytest.approx(-0.3)
    assert metrics.forgetting(R) == pytest.approx(0.3)
    assert metrics.fwt(R, [0.1, 0.1]) == pytest.approx(0.0)
    one = [[0.5]]
    assert metrics.bwt(one) == metrics.fwt(one, [0.1]) == metrics.forgetting(one) == 0.0


def test_forgetting_takes_the_best_before_the_last_task() -> None:
    R = [[0.5, 0, 0], [0.9, 0.6, 0], [0.95, 0.4, 0.7]]
    assert metrics.forgetting(R) == pytest.approx(((0.9 - 0.95) + (0.6 - 0.4)) / 2)
    assert metrics.forgetting_sequel(R) == pytest.approx((0 - 0.2 + 0) / 3)
    with pytest.raises(ValueError, match="square"):
        metrics.acc([[1.0, 2.0]])


def test_herding_first_pick_is_optimal_and_repeats_nothing() -> None:
    rng = np.random.default_rng(0)
    phi = rng.standard_normal((12, 5))
    chosen = F.herding(phi, 12, normalize=False)
    mean = phi.mean(0)
    assert chosen[0] == ((phi - mean) ** 2).sum(1).argmin()
    assert sorted(chosen.tolist()) == list(range(12))
    assert F.herding(np.ones((4, 2)), 3).tolist() == [0, 1, 2]  # ties: lowest index


def test_reservoir_law_is_exact_for_two_slots_and_four_items() -> None:
    """All 3 * 4 equally likely draws of items 3 and 4: every item 1/2, every pair 1/6."""
    count: dict[frozenset[int], int] = {}
    for a in range(3):
        for b in range(4):
            u = np.array([0.0, 0.0, (a + 0.5) / 3, (b + 0.5) / 4])
            held = [-1, -1]
            for item, slot in enumerate(F.slots_from_uniforms(u, 0, 2).tolist()):
                if slot < 2:
                    held[slot] = item
            # "last wins" hides overwritten items, so replay the draws one by one for the truth
            slow = [0, 1]
            for item, drawn in ((2, a), (3, b)):
                if drawn < 2:
                    slow[drawn] = item
            assert held == slow
            count[frozenset(held)] = count.get(frozenset(held), 0) + 1
    assert {pair: n / 12 for pair, n in count.items()} == {
        frozenset(pair): pytest.approx(1 / 6) for pair in combinations(range(4), 2)
    }
