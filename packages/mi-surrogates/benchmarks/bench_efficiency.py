"""Information reached per simulated event: ours against pycma, Optuna and BoTorch, equal budgets.

Every peer maximises the same estimate (the problem's own method; a network is trained per call where it has
one) of the same number of events per design, from the same start where it takes one. The regret is that of
the exact information at the design that the method would return after 25, 50 and 100 % of the events.

`python benchmarks/bench_efficiency.py [--seeds 3] [--iterations 15] [--out FILE]`, one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mi_surrogates import MIObjective, optimize
from mi_surrogates.information.estimator import BatchedEstimator, Settings
from mi_surrogates.loop.execute import seed_of
from mi_surrogates.problems import PROBLEMS, Problem

DESIGNS, EVENTS = 20, 400
FAST = (
    "correlated",
    "water_filling",
    "uniform_noise",
    "noisy_channel",
    "saturating_sensor",
    "regression",
)
Trace = list[tuple[int, np.ndarray]]  # events spent, design that would be returned


def measure(problem: Problem, theta: np.ndarray, seed: int) -> float:
    x, y = (torch.from_numpy(v)[None] for v in problem.simulator(theta, EVENTS, seed))
    settings = Settings(problem.method, hidden=(48, 48), **problem.options)
    return float(BatchedEstimator(settings, x.shape[2], y.shape[2]).evaluate(x, y)[0])


def ours(surrogate: str) -> Callable[[Problem, int, int], Trace]:
    def run(problem: Problem, budget: int, seed: int) -> Trace:
        result = optimize(
            problem.simulator,
            problem.make_space(),
            MIObjective(problem.method, **problem.options),
            surrogate=surrogate,
            designs=DESIGNS,
            events=EVENTS,
            iterations=budget // (DESIGNS * EVENTS),
            seed=seed,
            progress=False,
        )
        trace, last = [], np.array(result.history[0].theta)
        for each in result.history:
            last = np.array(each.theta) if each.accepted else last
            trace.append((each.events, last))
        return trace

    return run


def cma_es(problem: Problem, budget: int, seed: int) -> Trace:
    import cma

    space = problem.make_space()
    if space.dim == 1:  # pycma needs two dimensions: a second one that does nothing
        start, sigma = np.append(space.to_unit(space.initial), 0.5), 0.1
    else:
        start, sigma = space.to_unit(space.initial), 0.1
    strategy = cma.CMAEvolutionStrategy(
        start, sigma, {"seed": seed + 1, "verbose": -9, "bounds": [0, 1]}
    )
    used, trace = 0, []
    while used + strategy.popsize * EVENTS <= budget:
        asked = strategy.ask()
        thetas = [space.project(space.from_unit(np.asarray(a)[: space.dim])) for a in asked]
        common = seed_of(seed, used)
        strategy.tell(asked, [-measure(problem, theta, common) for theta in thetas])
        used += len(asked) * EVENTS
        trace.append((used, space.project(space.from_unit(strategy.mean[: space.dim]))))
    return trace


def optuna_tpe(problem: Problem, budget: int, seed: int) -> Trace:
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
    for i in range(budget // EVENTS):
        trial = study.ask()
        for name, low, high in zip(space.names, space.lower, space.upper, strict=True):
            trial.suggest_float(name, low, high)
        study.tell(trial, measure(problem, design(trial.params), seed_of(seed, i)))
        trace.append(((i + 1) * EVENTS, design(study.best_params)))
    return trace


def botorch_lognei(problem: Problem, budget: int, seed: int) -> Trace:
    """qLogNoisyExpectedImprovement, batches of 10; the design of the highest posterior mean."""
    from botorch.acquisition.logei import qLogNoisyExpectedImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.transforms import Standardize
    from botorch.optim import optimize_acqf
    from gpytorch.mlls import ExactMarginalLogLikelihood

    torch.manual_seed(seed)
    space = problem.make_space()
    rng = np.random.default_rng(seed)
    units = [space.to_unit(space.initial), *rng.random((9, space.dim))]
    bounds = torch.tensor([[0.0] * space.dim, [1.0] * space.dim], dtype=torch.float64)
    xs: list[np.ndarray] = []
    values: list[float] = []
    trace = []
    while (len(xs) + len(units)) * EVENTS <= budget:
        for unit in units:
            theta = space.project(space.from_unit(np.asarray(unit)))
            values.append(measure(problem, theta, seed_of(seed, len(xs))))
            xs.append(space.to_unit(theta))
        x = torch.from_numpy(np.array(xs))
        y = torch.tensor(values, dtype=torch.float64)[:, None]
        model = SingleTaskGP(x, y, outcome_transform=Standardize(1))
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        with torch.no_grad():
            best = int(model.posterior(x).mean.argmax())
        trace.append((len(xs) * EVENTS, space.from_unit(xs[best])))
        acquisition = qLogNoisyExpectedImprovement(model, x, prune_baseline=True)
        found, _ = optimize_acqf(
            acquisition,
            bounds,
            q=10,
            num_restarts=2,
            raw_samples=64,
            sequential=False,
            options={"maxiter": 40},
        )
        units = list(found.numpy())
    return trace


METHODS: dict[str, Callable[[Problem, int, int], Trace]] = {
    "ours, quadratic": ours("quadratic"),
    "ours, ensemble": ours("ensemble"),
    "pycma": cma_es,
    "Optuna TPE": optuna_tpe,
    "BoTorch qLogNEI": botorch_lognei,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--problems", default=",".join(FAST))
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by ;")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    budget = arguments.iterations * DESIGNS * EVENTS
    rows: list[dict[str, Any]] = []
    for name in arguments.problems.split(","):
        problem = PROBLEMS[name]
        for method in arguments.methods.split(";"):
            regrets, begin = [], time.perf_counter()
            for seed in range(arguments.seeds):
                trace = METHODS[method](problem, budget, seed)
                points = []
                for share in (0.25, 0.5, 1.0):
                    reached = [t for used, t in trace if used <= share * budget] or [trace[0][1]]
                    points.append(problem.best - problem.information(reached[-1]))
                regrets.append(points)
            median = np.median(regrets, 0)
            row = {"problem": name, "method": method, "regret": median.tolist()}
            row["seconds"] = (time.perf_counter() - begin) / arguments.seeds
            rows.append(row)
            shown = "  ".join(f"{value:.4f}" for value in median)
            print(f"{name:18} {method:16} {shown}   {row['seconds']:6.1f} s a run", flush=True)
            if arguments.out:
                with open(arguments.out, "w", encoding="utf-8") as file:
                    json.dump(
                        {"command": " ".join(sys.argv), "budget": budget, "rows": rows},
                        file,
                        indent=1,
                    )


if __name__ == "__main__":
    main()
