"""Information reached per simulated event: ours against pycma, Optuna and BoTorch, equal budgets.

Every method maximises the same estimate of the same number of events per design, from the same start where
it takes one. Ours trains one network for all designs of an iteration where the estimate is learned, a peer
one for each design it asks for. The regret is that of the exact information (for the calorimeter, the loss
of an independent regression) at the design that the method would return after 25, 50 and 100 % of the events.

`python benchmarks/bench_efficiency.py [--seeds 10] [--slow-seeds 3] [--out efficiency.json]`, one thread; runs
that the file already has are not repeated. `--table` only prints the table of the file.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mi_surrogates import DesignSpace, MIObjective, Parameter, optimize
from mi_surrogates.errors import DegenerateData
from mi_surrogates.loop.execute import seed_of
from mi_surrogates.loop.objectives import Batch
from mi_surrogates.problems import PROBLEMS, Problem
from mi_surrogates.simulators import SamplingCalorimeter

EVENTS, BUDGET = 400, 96_000
SHARES = (0.25, 0.5, 1.0)
Trace = list[tuple[int, np.ndarray]]  # events spent, design that would be returned
CALO = SamplingCalorimeter(["Pb", "PbWO4"] * 3)


def calorimeter_space() -> DesignSpace:
    space = DesignSpace(
        {n: Parameter(20 if n[0] == "a" else 5, 0.05, 100, sigma=3) for n in CALO.names}
    )
    space.add_linear([1.0] * 6, upper=200.0)
    return space


ALL = {
    **PROBLEMS,
    "calorimeter": Problem(
        "calorimeter",
        CALO,
        calorimeter_space,
        lambda theta: -CALO.judge(theta)[0],
        0.0,
        (),
        method="mine",
    ),
}


def measure(problem: Problem, theta: np.ndarray, seed: int) -> float:
    """The objective of one design, as the peers see it."""
    x, y = (torch.from_numpy(v)[None] for v in problem.simulator(theta, EVENTS, seed))
    batch = Batch(theta[None], x, y, theta, np.ones_like(theta), seed, warm=False)
    if problem.name == "calorimeter":  # a critic trained on one design alone is far worse
        objective = MIObjective("ksg", k=5)
    else:
        objective = MIObjective(problem.method, **problem.options)
    try:
        return float(objective.evaluate(batch)[0])
    except DegenerateData:  # no sensor fires
        return 0.0


def ours(surrogate: str, designs: int | str) -> Callable[[Problem, int], Trace]:
    def run(problem: Problem, seed: int) -> Trace:
        result = optimize(
            problem.simulator,
            problem.make_space(),
            MIObjective(problem.method, **problem.options),
            surrogate=surrogate,
            designs=designs,
            events=EVENTS,
            iterations=10**6,
            max_events=BUDGET,
            seed=seed,
            progress=False,
        )
        trace, last = [], np.array(result.history[0].theta)
        for each in result.history:
            last = np.array(each.theta) if each.accepted else last
            trace.append((each.events, last))
        return trace

    return run


def cma_es(problem: Problem, seed: int) -> Trace:
    import cma

    space = problem.make_space()
    start, sigma = space.to_unit(space.initial), space.sigma / (space.upper - space.lower)
    if space.dim == 1:  # pycma needs two dimensions: a second one that does nothing
        start, sigma = np.append(start, 0.5), np.append(sigma, 0.1)
    options = {"seed": seed + 1, "verbose": -9, "bounds": [0, 1], "CMA_stds": sigma}
    strategy = cma.CMAEvolutionStrategy(start, 1.0, options)
    used, trace = 0, []
    while used + strategy.popsize * EVENTS <= BUDGET:
        asked = strategy.ask()
        thetas = [space.project(space.from_unit(np.asarray(a)[: space.dim])) for a in asked]
        common = seed_of(seed, used)
        strategy.tell(asked, [-measure(problem, theta, common) for theta in thetas])
        used += len(asked) * EVENTS
        trace.append((used, space.project(space.from_unit(strategy.mean[: space.dim]))))
    return trace


def optuna_tpe(problem: Problem, seed: int) -> Trace:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = problem.make_space()
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True)
    )
    study.enqueue_trial(dict(zip(space.names, space.initial, strict=True)))

    def design(params: dict[str, float]) -> np.ndarray:
        return space.project(np.array([params[name] for name in space.names]))

    trace = []
    for i in range(BUDGET // EVENTS):
        trial = study.ask()
        for name, low, high in zip(space.names, space.lower, space.upper, strict=True):
            trial.suggest_float(name, low, high)
        study.tell(trial, measure(problem, design(trial.params), seed_of(seed, i)))
        trace.append(((i + 1) * EVENTS, design(study.best_params)))
    return trace


def botorch_loop(
    problem: Problem, seed: int, propose: Callable[[Any, torch.Tensor, torch.Tensor], np.ndarray]
) -> Trace:
    """Batches of ten; returns the design of the highest posterior mean."""
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.transforms import Standardize
    from gpytorch.mlls import ExactMarginalLogLikelihood

    torch.manual_seed(seed)
    space, rng = problem.make_space(), np.random.default_rng(seed)
    units = np.array([space.to_unit(space.initial), *rng.random((9, space.dim))])
    xs: list[np.ndarray] = []
    values: list[float] = []
    trace = []
    while (len(xs) + len(units)) * EVENTS <= BUDGET:
        for unit in units:
            theta = space.project(space.from_unit(np.asarray(unit)))
            values.append(measure(problem, theta, seed_of(seed, len(xs))))
            xs.append(space.to_unit(theta))
        x = torch.from_numpy(np.array(xs))
        y = torch.tensor(values, dtype=torch.float64)[:, None]
        model = SingleTaskGP(x, y, outcome_transform=Standardize(1))
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        with torch.no_grad():
            mean = model.posterior(x).mean[:, 0]
        trace.append((len(xs) * EVENTS, space.from_unit(xs[int(mean.argmax())])))
        units = propose(model, x, mean)
    return trace


def botorch_lognei(problem: Problem, seed: int) -> Trace:
    """qLogNoisyExpectedImprovement."""
    from botorch.acquisition.logei import qLogNoisyExpectedImprovement
    from botorch.optim import optimize_acqf

    def propose(model: Any, x: torch.Tensor, mean: torch.Tensor) -> np.ndarray:
        bounds = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, x.shape[1])
        found, _ = optimize_acqf(
            qLogNoisyExpectedImprovement(model, x, prune_baseline=True),
            bounds,
            q=10,
            num_restarts=2,
            raw_samples=64,
            sequential=False,
            options={"maxiter": 40},
        )
        return found.numpy()

    return botorch_loop(problem, seed, propose)


def botorch_turbo(problem: Problem, seed: int) -> Trace:
    """One trust region as in TuRBO-1: Thompson samples in a box around the best posterior mean."""
    from botorch.generation import MaxPosteriorSampling

    state = {"length": 0.8, "best": -np.inf, "good": 0, "bad": 0}

    def propose(model: Any, x: torch.Tensor, mean: torch.Tensor) -> np.ndarray:
        best = float(mean.max())
        better = best > state["best"] + 1e-3 * abs(state["best"])
        state["good"], state["bad"] = (state["good"] + 1, 0) if better else (0, state["bad"] + 1)
        state["best"] = max(best, state["best"])
        if state["good"] == 3:
            state.update(length=min(1.6, 2 * state["length"]), good=0)
        elif state["bad"] == 2:
            state.update(length=state["length"] / 2, bad=0)
        if state["length"] < 0.5**7:
            state.update(length=0.8)
        center = x[mean.argmax()]
        scale = model.covar_module.lengthscale.detach().reshape(-1)
        scale = scale / scale.log().mean().exp()
        low = (center - state["length"] * scale / 2).clamp(0, 1)
        high = (center + state["length"] * scale / 2).clamp(0, 1)
        draw = torch.quasirandom.SobolEngine(x.shape[1], scramble=True, seed=seed * 1000 + len(x))
        cloud = low + (high - low) * draw.draw(500, dtype=torch.float64)
        with torch.no_grad():
            return MaxPosteriorSampling(model, replacement=False)(cloud, 10).numpy()

    return botorch_loop(problem, seed, propose)


METHODS: dict[str, Callable[[Problem, int], Trace]] = {
    "ours, designs auto": ours("quadratic", "auto"),
    "ours, designs 20": ours("quadratic", 20),
    "ours, ensemble, auto": ours("ensemble", "auto"),
    "pycma": cma_es,
    "Optuna TPE": optuna_tpe,
    "BoTorch TuRBO-like": botorch_turbo,
    "BoTorch qLogNEI": botorch_lognei,
}
SLOW = {"BoTorch TuRBO-like", "BoTorch qLogNEI"}
PEERS = ("pycma", "Optuna TPE", "BoTorch TuRBO-like", "BoTorch qLogNEI")


def run(problem: Problem, method: str, seed: int) -> dict[str, Any]:
    begin = time.process_time()
    trace = METHODS[method](problem, seed)
    seconds = time.process_time() - begin
    regret = []
    for share in SHARES:
        reached = [t for used, t in trace if used <= share * BUDGET] or [trace[0][1]]
        regret.append(problem.best - problem.information(reached[-1]))
    row = {"problem": problem.name, "method": method, "seed": seed}
    return {**row, "regret": regret, "events": trace[-1][0], "seconds": seconds}


def table(rows: list[dict[str, Any]]) -> None:
    """Medians over seeds, and how often the first of ours is the best."""
    print("| problem | method | seeds | 25 % | 50 % | 100 % | CPU s a run |")
    print("|---|---|---|---|---|---|---|")
    medians: dict[tuple[str, str], np.ndarray] = {}
    for name in dict.fromkeys(row["problem"] for row in rows):
        for method in METHODS:
            found = [r for r in rows if (r["problem"], r["method"]) == (name, method)]
            if not found:
                continue
            middle = medians[name, method] = np.median([r["regret"] for r in found], 0)
            shown = " | ".join(f"{max(value, 0):.4f}" for value in middle)
            seconds = float(np.median([r["seconds"] for r in found]))
            print(f"| {name} | {method} | {len(found)} | {shown} | {seconds:.1f} |")
    first = next(iter(METHODS))
    names = [name for name in ALL if (name, first) in medians]
    for i, share in enumerate(SHARES):
        best, close, twice = [], [], []
        for name in names:
            peer = min(float(medians[name, p][i]) for p in PEERS if (name, p) in medians)
            own = float(medians[name, first][i])
            best += [name] if own <= peer + 1e-6 else []
            close += [name] if own <= peer + 1e-3 else []
            twice += [name] if own > 2 * peer + 1e-3 else []
        print(
            f"\n{share:.0%}: {first} at most the best peer on {len(best)} of {len(names)}, within 0.001 "
            f"on {len(close)}; more than twice (and 0.001) worse on {', '.join(twice) or 'none'}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--slow-seeds", type=int, default=3, help="of the BoTorch methods")
    parser.add_argument("--problems", default=",".join(ALL))
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by ;")
    parser.add_argument("--out", type=Path, default=Path("efficiency.json"))
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else []
    known = {(row["problem"], row["method"], row["seed"]) for row in rows}
    for seed in range(0 if arguments.table else arguments.seeds):
        for name in arguments.problems.split(","):
            for method in arguments.methods.split(";"):
                if (name, method, seed) in known:
                    continue
                if method in SLOW and seed >= arguments.slow_seeds:
                    continue
                row = run(ALL[name], method, seed)
                rows.append(row)
                fresh = arguments.out.with_suffix(".tmp")
                fresh.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", "utf-8")
                os.replace(fresh, arguments.out)
                shown = "  ".join(f"{value:.4f}" for value in row["regret"])
                print(f"{name:18} {method:20} {seed:2} {shown} {row['seconds']:7.1f} s", flush=True)
    table(rows)


if __name__ == "__main__":
    main()
