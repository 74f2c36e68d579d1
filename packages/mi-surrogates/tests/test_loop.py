"""The loop: equivalences, constraints, trust, failures, bad input."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn
from toy_simulators import always_fails, ignores, linear, sometimes_fails, space

import mi_surrogates.loop.optimizer as optimizer_module
from mi_surrogates import (
    CallableObjective,
    DegenerateData,
    DesignSpace,
    InfeasibleDesign,
    MIObjective,
    Optimizer,
    OptimizeResult,
    RecoObjective,
    SimulationError,
    SurrogateError,
    optimize,
)
from mi_surrogates.errors import MissingExtra
from mi_surrogates.loop import Batch
from mi_surrogates.loop.execute import simulate
from mi_surrogates.problems import NoisyRosenbrock, ThreeHump

QUIET = {"progress": False, "designs": 10, "events": 60, "surrogate": "quadratic"}


def toy(objective="mi", **options):
    chosen = MIObjective("gaussian") if objective == "mi" else objective
    return optimize(linear, space(), chosen, **{**QUIET, "iterations": 6, **options})


def batch(designs: int = 4, events: int = 200, warm: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(designs, events, 1, generator=generator) * 5
    scale = torch.logspace(-2, 0.5, designs)[:, None, None]
    y = x + scale * torch.randn(designs, events, 1, generator=generator)
    theta = scale[:, :, 0].double().numpy()
    return Batch(theta, x, y, np.zeros(1), np.ones(1), 0, warm)


@pytest.mark.parametrize(
    "objective",
    [
        MIObjective(hidden=(16,)),
        MIObjective(amortized=False, hidden=(16,)),
        MIObjective("ba", hidden=(16,)),
        MIObjective("ksg"),
        RecoObjective(hidden=(16,)),
        RecoObjective("mse", hidden=(16,), log=False),
        RecoObjective("relative", gated=True),
        RecoObjective(lambda guess, x: (guess - x).abs().mean(-1), hidden=(16,)),
    ],
)
def test_objectives_order_designs_by_their_noise_and_go_on_from_a_state(objective) -> None:
    value, stderr = objective.evaluate(batch())
    assert value.shape == stderr.shape == (4,)
    assert value.dtype == torch.float64
    assert bool((stderr > 0).all())
    assert value[:2].min() > value[3]
    state = objective.state_dict()
    next_batch = Batch(
        **{**vars(batch()), "center": np.ones(1), "sigma": np.full(1, 2.0), "seed": 1}
    )
    following = objective.evaluate(next_batch)
    objective.load_state_dict(state)
    again = objective.evaluate(next_batch)
    assert torch.equal(following[0], again[0])


def test_learned_information_is_near_the_closed_form() -> None:
    x = torch.randn(4, 1000, 1, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(4, 1000, 1, generator=torch.Generator().manual_seed(1))
    scale = torch.tensor([0.2, 0.5, 1.0, 2.0])[:, None, None]
    each = Batch(scale[:, :, 0].double().numpy(), x, x + scale * noise, np.zeros(1), np.ones(1), 0)
    truth = 0.5 * torch.log1p(scale[:, 0, 0].double() ** -2)
    for amortized in (True, False):
        value, stderr = MIObjective(amortized=amortized, steps=300).evaluate(each)
        assert torch.all((value - truth).abs() < 3 * stderr + 0.08)


def test_log_of_the_reconstruction_loss_has_the_error_of_the_delta_method() -> None:
    plain, logged = (RecoObjective(log=log, hidden=(8,)) for log in (False, True))
    torch.manual_seed(0)
    value, stderr = logged.evaluate(batch())
    assert torch.allclose(stderr, stderr)
    loss = torch.exp(-value)
    assert bool((stderr * loss > 0).all())
    assert bool((plain.evaluate(batch())[0] < 0).all())


def test_warm_start_carries_the_critic() -> None:
    warm, cold = MIObjective(steps=60, hidden=(16,)), MIObjective(steps=60, hidden=(16,))
    for _ in range(6):
        warm.evaluate(batch())
        cold.evaluate(batch(warm=False))
    assert warm.evaluate(batch())[0].mean() > cold.evaluate(batch(warm=False))[0].mean()


@pytest.mark.parametrize("objective", [MIObjective(steps=10), RecoObjective(steps=10)])
def test_an_objective_that_served_another_run_starts_afresh(objective) -> None:
    """The networks of a first run must not leak into a second one with the same object."""
    options = {"iterations": 2, "surrogate": "mlp", "designs": 6}
    first, second = (toy(objective, **options) for _ in range(2))
    assert np.array_equal(first.values, second.values)
    assert np.array_equal(first.theta, second.theta)


@pytest.mark.parametrize("method", ["ksg", "gaussian"])
def test_a_degenerate_design_is_dropped_and_the_others_are_kept(method: str) -> None:
    each = batch()
    y = each.y.clone()
    y[2] = 1.0  # a dead channel
    with pytest.warns(UserWarning, match="1 of 4 designs have no estimate: "):
        value, stderr = MIObjective(method).evaluate(Batch(**{**vars(each), "y": y}))
    whole = MIObjective(method).evaluate(each)
    assert (
        torch.isnan(value).tolist() == torch.isnan(stderr).tolist() == [False, False, True, False]
    )
    kept = [0, 1, 3]
    assert torch.allclose(value[kept], whole[0][kept], rtol=1e-12)
    assert torch.allclose(stderr[kept], whole[1][kept], rtol=1e-12)  # summed in another order
    rounded = Batch(**{**vars(each), "y": each.y.round()})
    with pytest.raises(DegenerateData, match="ties" if method == "ksg" else "singular"):
        MIObjective(method).evaluate(
            rounded if method == "ksg" else Batch(**{**vars(each), "y": each.x})
        )


def test_best_iteration_is_found_where_a_nominal_design_failed() -> None:
    calls: list[int] = []

    def first_fails(theta, n, seed):
        calls.append(seed)
        if len(calls) == 1:
            raise RuntimeError("cold start")
        return linear(theta, n, seed)

    result = optimize(
        first_fails, space(), MIObjective("gaussian"), **QUIET, iterations=4, retries=0
    )
    assert math.isnan(result.history[0].value)
    lows = [it.value - 2 * it.stderr for it in result.history]
    assert result.best.index == int(np.nanargmax(lows))


def test_degenerate_events_are_refused() -> None:
    each = batch()
    for name, message in (("x", "no signal"), ("y", "no influence")):
        flat = Batch(**{**vars(each), name: torch.ones_like(getattr(each, name))})
        for objective in (MIObjective("ksg"), RecoObjective()):
            with pytest.raises(DegenerateData, match=message):
                objective.evaluate(flat)


def test_not_finite_predictions_fail_the_design_and_not_the_run() -> None:
    objective = CallableObjective(
        lambda theta, x, y: (math.nan if theta[0] > 0.4 else -float(theta[0]), 0.1)
    )
    result = toy(objective, iterations=2)
    assert any("not finite" in r for it in result.history for r in it.failed.values())


def test_the_loop_finds_the_quietest_design() -> None:
    result = toy(iterations=20, designs=12, events=200)
    assert np.allclose(result.theta, [0.7, 0.4], atol=0.12)
    assert result.value > result.history[0].value + 0.3
    assert result.best.value - 2 * result.best.stderr >= result.value - 2 * result.stderr
    assert result.events == sum(12 * 200 for _ in result.history)


def test_plain_published_loop() -> None:
    """adapt="none", no reuse, no std, from scratch, MLP, the paper's critic: one step is what a loop
    written from the paper gives on the same designs and values."""
    objective = MIObjective("mine", critic="paper", steps=20)
    opt = Optimizer(
        space(),
        objective,
        surrogate="mlp",
        designs=10,
        events=60,
        adapt="none",
        reuse=0,
        beta=0.0,
        warm_start=False,
        lr=0.05,
    )
    cov = opt.region.cov
    for trial in opt.ask():
        opt.tell(trial, *simulate(linear, trial.theta, *trial.blocks[0]))
    center = opt.theta.copy()
    first = opt.step()
    z = torch.from_numpy((np.stack([p[0] for p in opt._points]) - center) / 0.08).float()
    values = torch.tensor([p[1] for p in opt._points]).float()
    assert len(z) == 10
    mean, _ = opt.surrogate(z)
    # the surrogate is the one that was fitted to these points, and the step climbs it
    assert (mean - values).square().mean() < values.var()
    point = torch.zeros(1, 2, requires_grad=True)
    adam = torch.optim.Adam([point], 0.05)
    inside = point.detach().clone()
    for _ in range(60):
        adam.zero_grad()
        (-opt.surrogate(point)[0].sum()).backward()
        before = point.detach().clone()
        adam.step()
        theta = center + 0.08 * point.detach().numpy()[0]
        if point.detach().square().sum() >= 1.44:
            break
        assert (theta > 0).all()
        inside = point.detach().clone()
        if (inside - before).square().sum() < 1e-5:
            break
    assert np.allclose(first.proposal, center + 0.08 * inside.numpy()[0], atol=1e-5)
    assert np.array_equal(opt.region.cov, cov)
    assert not hasattr(objective, "center")


def test_stretched_region_follows_the_move() -> None:
    opt = Optimizer(
        space(),
        CallableObjective(lambda t, x, y: float(t[0])),
        adapt="stretch",
        designs=8,
        events=1,
        surrogate="quadratic",
    )
    for trial in opt.ask():
        opt.tell(trial, np.zeros(1), np.zeros(1))
    opt.step()
    assert opt.region.cov[0, 0] > opt.region.cov[1, 1]


def test_worse_step_is_rejected_and_halves_the_region() -> None:
    """The objective falls off a cliff that the surrogate cannot know of."""
    cliff = CallableObjective(lambda t, x, y: (float(t[0]) if t[0] < 0.36 else -5.0, 1e-3))
    opt = Optimizer(
        DesignSpace(initial=[0.3, 0.5], lower=0.0, upper=1.0, sigma=0.02),
        cliff,
        designs=8,
        events=1,
        surrogate="quadratic",
    )
    sigma, rejected = [], 0
    for _ in range(12):
        for trial in opt.ask():
            opt.tell(trial, np.zeros(1), np.zeros(1))
        before = opt.history[-1].sigma[1] if opt.history else None
        record = opt.step()
        sigma.append(record.sigma[1])
        if not record.accepted:
            rejected += 1
            assert record.sigma[1] == pytest.approx(before / 2, rel=1e-9)
    assert rejected > 0
    assert opt.result().value > 0.3


def test_constraints_are_met_at_the_end() -> None:
    soft = space()
    soft.add_constraint(lambda t: t.square().sum(-1), 0.75)
    start = soft.violation(soft.initial)
    assert start <= 1e-3
    result = optimize(
        linear, soft, MIObjective("gaussian"), **{**QUIET, "events": 300}, iterations=8
    )
    assert result.constraint_violation <= 1e-3
    assert all(it.violation <= 1e-3 for it in result.history)
    rows = space()
    rows.add_linear([1.0, 1.0], 1.1, equal=True)
    rows.add_linear([1.0, -1.0], 0.5)
    found = optimize(
        linear, rows, MIObjective("gaussian"), **{**QUIET, "events": 300}, iterations=4
    )
    assert found.constraint_violation < 1e-6


def test_augmented_lagrangian_raises_its_multiplier_where_violated() -> None:
    tight = DesignSpace(initial=[0.5], lower=0.0, upper=1.0, sigma=0.1)
    tight.add_constraint(lambda t: t[:, 0], 0.5)
    opt = Optimizer(
        tight,
        CallableObjective(lambda t, x, y: float(t[0])),
        designs=6,
        events=1,
        surrogate="quadratic",
    )
    opt.region = type(opt.region)(np.array([0.6]), opt.region.cov, 1.2)
    opt._update_multipliers(opt.theta)
    assert opt.multipliers.tolist() == pytest.approx([10 * 0.2])
    assert opt.penalty == 20


def test_failed_designs_are_dropped_and_reported() -> None:
    result = optimize(
        sometimes_fails, space(), MIObjective("gaussian"), **QUIET, iterations=2, retries=0
    )
    reasons = [r for it in result.history for r in it.failed.values()]
    assert reasons
    assert all("the beam tripped" in r and "seed" in r for r in reasons)


def test_too_many_failures_raise_the_first_traceback() -> None:
    with pytest.raises(SimulationError, match=r"only 0 of 10 designs succeeded(.|\n)*no licence"):
        optimize(always_fails, space(), MIObjective("gaussian"), **QUIET)


def test_simulator_that_ignores_the_design_is_told_from_a_plateau() -> None:
    for crn in (True, False):
        with pytest.warns(UserWarning, match="may ignore theta"):
            result = optimize(
                ignores, space(), MIObjective("gaussian"), **QUIET, iterations=9, crn=crn
            )
        assert result.status == "flat"
        assert len(result.history) < 9


def test_budgets_end_the_loop() -> None:
    assert toy(max_events=1300).status == "events"
    assert len(toy(max_events=1300).history) == 2
    assert toy(max_seconds=0.0).status == "seconds"
    assert toy(iterations=2).status == "iterations"
    assert toy(iterations=30, patience=2).status in ("patience", "floor")
    assert toy(callbacks=[lambda it: it.index == 1]).status == "callback"
    still = CallableObjective(lambda t, x, y: -1e-3 * float(((t - [0.3, 0.8]) ** 2).sum()))
    assert toy(still, iterations=40, sigma_min=0.2).status == "floor"


def test_blocks_make_the_events_of_a_design() -> None:
    sizes = []

    def counting(theta, n, seed):
        sizes.append((n, seed))
        return linear(theta, n, seed)

    optimize(counting, space(), MIObjective("gaussian"), **QUIET, iterations=1, block=25, crn=False)
    assert [n for n, _ in sizes] == [25, 25, 10] * 10
    assert len({seed for _, seed in sizes}) == 30
    sizes.clear()
    optimize(counting, space(), MIObjective("gaussian"), **QUIET, iterations=1)
    assert len({seed for _, seed in sizes}) == 1  # common random numbers


def test_surrogate_that_is_never_finite_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(nn.Module):
        def fit(self, *_: object) -> Broken:
            return self

        def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return (z * math.nan).sum(1), z[:, 0] * 0

    made = []
    monkeypatch.setattr(
        optimizer_module, "make_surrogate", lambda *a, **k: made.append(k) or Broken()
    )
    with pytest.raises(SurrogateError, match="no finite gradient"):
        toy(iterations=1)
    assert len(made) == 3  # at the start, for the first fit, and refitted with another seed


@pytest.mark.parametrize("dim", [2, 10])
def test_rosenbrock_and_camel_are_climbed_through_their_hidden_plane(dim: int) -> None:
    for problem in (NoisyRosenbrock(dim, noise=0.1), ThreeHump(dim, noise=0.1)):
        objective = CallableObjective(
            lambda t, x, y: (float(y.mean()), float(y.std()) / len(y) ** 0.5)
        )
        box = DesignSpace(initial=np.full(dim, -0.8), lower=-2.0, upper=2.0, sigma=0.15)
        result = optimize(
            problem,
            box,
            objective,
            surrogate="quadratic",
            designs=dim + 12,
            events=20,
            iterations=25,
            progress=False,
        )
        start = problem.value(box.initial)
        assert problem.value(result.theta) > 0.1 * start  # regret down to a tenth


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Optimizer(space(), "loss"), ValueError, "objective must be 'mi', 'reco'"),
        (lambda: Optimizer(space(), adapt="grow"), ValueError, "trust, stretch, none"),
        (lambda: Optimizer(space(), surrogate="quadratic", designs=3), ValueError, "designs >= 4"),
        (lambda: Optimizer(space(), events=20), ValueError, "events >= 50"),
        (
            lambda: Optimizer(space(), MIObjective(batch_size=61), events=60),
            ValueError,
            "batch_size 61 is above the 60 events",
        ),
        (
            lambda: Optimizer(space(), RecoObjective(batch_size=61), events=60),
            ValueError,
            "batch_size 61 is above the 60 events",
        ),
        (
            lambda: Optimizer(space(), MIObjective("ksg", k=9), events=9),
            ValueError,
            "k must be below the 9 events",
        ),
        (lambda: Optimizer(space(), designs=1), ValueError, "designs must be at least 2"),
        (lambda: Optimizer(space(), patience=0), ValueError, "patience must be at least 1"),
        (lambda: Optimizer(space(), seed=-1), ValueError, "seed must be at least 0"),
        (lambda: Optimizer(space(), kappa=0.0), ValueError, "kappa"),
        (lambda: Optimizer(space(), sigma_min=2.0, sigma_max=1.0), ValueError, "sigma_min"),
        (lambda: toy(iterations=0), ValueError, "iterations"),
        (lambda: toy(max_events=5), ValueError, "below one iteration"),
        (lambda: toy(resume="maybe"), ValueError, "resume"),
        (lambda: MIObjective(steps=0), ValueError, "steps"),
        (lambda: MIObjective(holdout=0.0), ValueError, "holdout"),
        (lambda: RecoObjective("huber"), ValueError, "scaled, mse, relative"),
        (lambda: RecoObjective(validation=1.0), ValueError, "validation"),
        (lambda: RecoObjective(steps=0), ValueError, "steps and batch_size"),
        (lambda: MIObjective("gauss"), ValueError, "method must be one of"),
    ],
)
def test_bad_arguments_are_named(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_infeasible_start_is_refused() -> None:
    tight = space()
    tight.add_linear([1.0, 1.0], 0.5)
    with pytest.raises(InfeasibleDesign, match="start from"):
        Optimizer(tight)


def fresh() -> Optimizer:
    return Optimizer(space(), MIObjective("gaussian"), surrogate="quadratic", designs=6, events=10)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda o: o.tell(0, np.ones(3), np.ones(3)), ValueError, "must have 10 events, got 3"),
        (lambda o: o.tell(np.int64(9), np.ones(10), np.ones(10)), ValueError, "no trial 9"),
        (lambda o: o.tell(9, np.ones(10), np.ones(10)), ValueError, "no trial 9"),
        (lambda o: o.tell(0, np.ones(10), np.full(10, np.inf)), ValueError, "NaN or infinite"),
        (lambda o: (o.fail(0, "x"), o.fail(0, "y")), ValueError, "told before"),
        (lambda o: o.step(), RuntimeError, "6 trials are pending"),
        (lambda o: o.result(), RuntimeError, "no iteration"),
        (
            lambda o: (
                o.tell(0, np.ones(10), np.ones(10)),
                o.tell(1, np.ones(10), np.ones((10, 2))),
            ),
            ValueError,
            "others have",
        ),
    ],
)
def test_bad_tells_are_named(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call(fresh())


def test_objective_of_the_wrong_shape_is_refused() -> None:
    class Wide:
        def evaluate(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(len(batch.theta), 1), torch.zeros(len(batch.theta))

        def state_dict(self) -> dict:
            return {}

        def load_state_dict(self, state: dict) -> None:
            pass

    with pytest.raises(ValueError, match=r"two tensors of shape \(10,\)"):
        toy(Wide(), iterations=1)


def test_ask_tell_goes_on_from_a_state_dict_in_the_middle_of_an_iteration() -> None:
    def answer(opt: Optimizer, trials) -> None:
        for trial in trials:
            opt.tell(trial, *simulate(linear, trial.theta, *trial.blocks[0]))

    def make() -> Optimizer:
        return Optimizer(space(), MIObjective(steps=10, hidden=(8,)), designs=8, events=60)

    one = make()
    for _ in range(2):
        answer(one, one.ask())
        one.step()
    answer(one, one.ask()[:3])
    one.fail(7, "lost")
    two = make()
    two.load_state_dict(one.state_dict())
    assert [t.design for t in two.ask()] == [3, 4, 5, 6]
    for opt in (one, two):
        answer(opt, opt.ask())
        opt.step()
        answer(opt, opt.ask())
        opt.step()
    assert np.array_equal(one.theta, two.theta)
    assert one.history[-1].value == two.history[-1].value


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        (([1, 2], [1, 2, 3]), "x must have 3 events"),
        ((np.array([None] * 3), np.ones(3)), "dtype object"),
        ((np.ones(3) * 1j, np.ones(3)), "dtype complex128"),
        ((np.ones(3), np.array([1, np.nan, 2])), "y has NaN or infinite values in 1 of 3 events"),
        ((np.ones(3),), "must return x and y"),
        ({"x": np.ones(3)}, "KeyError: 'y'"),
        (7, "TypeError"),
    ],
)
def test_what_a_simulator_must_not_return(events, reason: str) -> None:
    with pytest.raises(SimulationError, match=reason) as caught:
        simulate(lambda theta, n, seed: events, np.ones(1), 3, 17, 4)
    assert (caught.value.design, caught.value.seed) == (4, 17)


def test_tensors_and_mappings_and_integers_are_events() -> None:
    x, y = simulate(
        lambda t, n, s: {"x": torch.arange(n), "y": torch.ones(n, 2, 3)}, np.ones(1), 4, 0
    )
    assert x.shape == (4, 1)
    assert y.shape == (4, 6)
    assert x.dtype == np.float64


def test_results_are_saved_tabulated_and_drawn(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    result = toy(iterations=4, progress=True)
    last = capsys.readouterr().err.splitlines()[-1]
    top = max(result.history, key=lambda it: it.value)
    assert f"iteration 4/4  events {result.events}  value " in last
    assert f"best {top.value:.4g} ± {top.stderr:.2g}  left 0 s" in last
    result.save(tmp_path / "r.pt")
    loaded = OptimizeResult.load(tmp_path / "r.pt")
    assert np.array_equal(loaded.theta, result.theta)
    assert loaded.history == result.history
    assert loaded.theta_dict == result.theta_dict
    table = result.history.to_pandas()
    assert list(table["a"]) == [it.theta[0] for it in result.history]
    import matplotlib.pyplot as plt

    for kind in ("parameters", "objective", "surrogate", "slices"):
        axes = result.plot(kind)
        assert axes.has_data()
        plt.close(axes.figure)
    with pytest.raises(ValueError, match="kind must be"):
        result.plot("pie")
    with pytest.raises(ValueError, match="saved result"):
        loaded.plot("slices")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingExtra, match="plot"):
        result.plot()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtra, match="pandas"):
        result.history.to_pandas()
