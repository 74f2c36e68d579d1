"""Bias, variance and time of every trace estimator, and the time to a given standard error.

python benchmarks/bench_trace.py [--draws 400] [--json FILE]
"""

from __future__ import annotations

import math

import torch
from common import finish, milliseconds, options
from torch import nn

import gradient_alignment as ga
from gradient_alignment.recipes.bench import compare_estimators
from gradient_alignment.recipes.models import small_cnn


def table(columns: list[str], rows: list[list[object]]) -> None:
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        cells = [cell if isinstance(cell, str) else f"{cell:.4g}" for cell in row]
        print("| " + " | ".join(cells) + " |")
    print(flush=True)


def hand_written(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Hutchinson's estimate by two backward passes, as one writes it without a library."""
    point = x.detach().requires_grad_()
    value = model(point).gather(1, y[:, None]).sum()
    (slope,) = torch.autograd.grad(value, point, create_graph=True)
    v = torch.randint(0, 2, x.shape, dtype=x.dtype) * 2 - 1
    (product,) = torch.autograd.grad(slope, point, v, create_graph=True)
    return (v * product).flatten(1).sum(1)


def speed(args: object, batch: int, size: int) -> dict[str, float]:
    torch.manual_seed(0)
    model = small_cnn(size=size).eval()
    x, y = torch.rand(batch, 1, size, size), torch.arange(batch) % 10
    fn, parameters = ga.class_logit(model, y), list(model.parameters())

    def of(method: str) -> object:
        def run() -> object:
            trace = ga.hessian_trace(fn, x, method=method)
            return torch.autograd.grad(trace.mean(), parameters, allow_unused=True)

        return run

    compiled = {}
    for method in ("antithetic", "forward-over-reverse", "forward-forward"):

        def whole(x: torch.Tensor, method: str = method) -> torch.Tensor:
            return ga.hessian_trace(fn, x, method=method).mean()

        fast = torch.compile(whole, fullgraph=True, dynamic=False)

        def run(fast: object = fast) -> object:
            return torch.autograd.grad(fast(x), parameters, allow_unused=True)

        compiled[method] = run
    calls = {
        "double backward by hand": lambda: torch.autograd.grad(
            hand_written(model, x, y).mean(), parameters, allow_unused=True
        ),
        **{m: of(m) for m in ("hutchinson", "taylor", "taylor-cv", "antithetic")},
        **{m: of(m) for m in ("forward-over-reverse", "forward-forward")},
        **{f"{m}, compiled": run for m, run in compiled.items()},
    }
    times = dict(zip(calls, milliseconds(list(calls.values()), args.repeats), strict=True))
    if size == 8:
        times["exact"] = milliseconds([of("exact")], 1)[0]
    return times


def main() -> None:
    parser = options(__doc__.splitlines()[0], 15)
    parser.add_argument("--draws", type=int, default=400)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    results: dict[str, object] = {}

    model = small_cnn()
    from gradient_alignment.recipes.data import digits
    from gradient_alignment.recipes.train import Config, train

    data = digits(args.seed)
    model = train(data, Config(epochs=10, seed=args.seed)).model
    x, y = data.test_x[::27], data.test_y[::27]
    print(f"{len(x)} digits, a classifier trained for 10 epochs; one draw a call, float32\n")
    rows = compare_estimators(
        model,
        x,
        y,
        sigmas=(0.1, 0.01, 0.001),
        draws=args.draws,
        repeats=args.repeats,
        seed=args.seed,
    )
    published = next(r for r in rows if (r.method, r.sigma) == ("taylor", 0.01))
    columns = [
        "estimator",
        "directions",
        "σ",
        "bias",
        "std of a draw",
        "variance: published / this",
    ]
    columns += ["ms, with θ-gradient", "s to 1 % error", "time: published / this"]
    lines: list[list[object]] = []
    for row in rows:
        sigma = "–" if math.isnan(row.sigma) else f"{row.sigma:g}"
        lines.append(
            [
                row.method,
                row.distribution,
                sigma,
                row.bias,
                row.variance**0.5,
                published.variance / row.variance,
                row.milliseconds,
                row.seconds_to_error,
                published.seconds_to_error / row.seconds_to_error,
            ]
        )
    table(columns, lines)
    results["estimators"] = [row.summary() for row in rows]

    print("more draws at σ = 0.01: standard deviation of the estimate over 60 repeats\n")
    fn, lines = ga.class_logit(model, y), []
    exact = ga.hessian_trace(fn, x, method="exact", create_graph=False)
    for method in ("taylor", "taylor-cv", "hutchinson", "hutch++", "xtrace"):
        for count in (3, 12, 48):
            found = torch.stack(
                [
                    ga.hessian_trace(fn, x, method=method, num_samples=count, create_graph=False)
                    for _ in range(60)
                ]
            )
            spread = float(found.var(0).mean().sqrt())
            lines.append([method, str(count), float((found.mean(0) - exact).mean()), spread])
    table(["estimator", "K", "bias", "std"], lines)
    results["draws"] = lines

    times = speed(args, 64, 8)
    print("batch 64, 8x8 pixels, one draw, value and gradient in the parameters\n")
    hand = times["double backward by hand"]
    table(
        ["estimator", "ms", "/ double backward by hand"],
        [[name, value, value / hand] for name, value in times.items()],
    )
    results["speed"] = times
    finish(args, results)


if __name__ == "__main__":
    main()
