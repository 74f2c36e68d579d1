"""Bias, spread and time of every estimator of the trace on one network, against the exact traces."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradient_alignment.core.noise import Distribution, check_count
from gradient_alignment.core.targets import class_logit
from gradient_alignment.core.trace import FINITE_DIFFERENCES, Method, hessian_trace

SINGLE_DRAWS: tuple[Method, ...] = (
    "taylor",
    "taylor-cv",
    "antithetic",
    "hutchinson",
    "forward-over-reverse",
    "forward-forward",
)


@dataclass(frozen=True)
class Row:
    """One estimator, one draw a call.

    Attributes:
        method: see `hessian_trace`.
        distribution: of the directions.
        sigma: finite step; NaN where there is none.
        bias: mean error over draws and samples.
        variance: of a draw, mean over samples.
        milliseconds: median of a call with the gradient in the parameters.
        seconds_to_error: time until the standard error of one sample's trace is 1 % of the traces' root mean
            square, variance / (0.01 rms)² calls.
    """

    method: str
    distribution: str
    sigma: float
    bias: float
    variance: float
    milliseconds: float
    seconds_to_error: float

    def summary(self) -> dict[str, str | float | None]:
        """Return the fields ready for JSON, which has no NaN."""
        fields: dict[str, str | float | None] = dict(vars(self))
        if math.isnan(self.sigma):
            fields["sigma"] = None
        return fields


def median_milliseconds(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Return the median time of every call, interleaved, after one round that is not counted."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats + 1):
        for call, found in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            found.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(found[1:]) for found in times]


def compare_estimators(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    sigmas: Sequence[float] = (0.01,),
    draws: int = 200,
    repeats: int = 10,
    seed: int = 0,
) -> list[Row]:
    """Measure every single-draw estimator.

    Args:
        model: classifier, best in evaluation mode.
        x: (B, ...).
        y: (B,) class indices.
        sigmas: finite steps.
        draws: for bias and variance, at least 2.
        repeats: for times.
        seed: of the directions.

    Raises:
        ValueError: fewer than two draws, no repeats, no images.
    """
    if draws < 2:
        raise ValueError(f"draws must be at least 2 for a variance, got {draws!r}")
    check_count("repeats", repeats)
    check_count("images", len(x))
    fn = class_logit(model, y)
    # the draws are compared with the exact traces in float64, where finite steps do not round
    wide = class_logit(_double(model), y)
    exact = hessian_trace(wide, x.double(), method="exact", create_graph=False)
    wanted = float(exact.square().mean().sqrt())
    parameters = [p for p in model.parameters() if p.requires_grad]
    cases: list[tuple[Method, Distribution, float]] = []
    for method in SINGLE_DRAWS:
        kinds: tuple[Distribution, ...] = ("gaussian",)
        if method != "taylor":
            kinds = ("gaussian", "rademacher")
        for kind in kinds:
            steps = sigmas if method in FINITE_DIFFERENCES else (float("nan"),)
            cases += [(method, kind, sigma) for sigma in steps]

    def call(case: tuple[Method, Distribution, float]) -> Callable[[], object]:
        method, kind, sigma = case
        step = sigma if method in FINITE_DIFFERENCES else 1.0

        def run() -> object:
            trace = hessian_trace(fn, x, method=method, distribution=kind, sigma=step)
            return torch.autograd.grad(trace.mean(), parameters, allow_unused=True)

        return run

    times = median_milliseconds([call(case) for case in cases], repeats)
    rows = []
    for (method, kind, sigma), milliseconds in zip(cases, times, strict=True):
        generator = torch.Generator().manual_seed(seed)
        found = torch.stack(
            [
                hessian_trace(
                    fn,
                    x,
                    method=method,
                    distribution=kind,
                    sigma=sigma if method in FINITE_DIFFERENCES else 1.0,
                    generator=generator,
                    create_graph=False,
                )
                for _ in range(draws)
            ]
        ).double()
        variance = float(found.var(0).mean())
        calls = variance / (0.01 * wanted) ** 2
        rows.append(
            Row(
                method,
                kind,
                sigma,
                float((found.mean(0) - exact).mean()),
                variance,
                milliseconds,
                calls * milliseconds / 1e3,
            )
        )
    return rows


def _double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()
