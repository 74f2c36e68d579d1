"""Tuning: how good is the best of n random configurations (Dodge et al. 2019)?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from hypermixer.baselines import count_parameters
from hypermixer.experiments import classification
from hypermixer.experiments.common import (
    Progress,
    accuracy,
    claim,
    cross_entropy,
    result,
    sample_batches,
    silent,
    train,
)

MIXERS = ("hypermixer", "attention", "mlp-mixer")


def expected_best(scores: Sequence[float]) -> list[float]:
    """Return E[max of n draws with replacement from the scores] for n = 1 … len(scores).

    With the scores sorted, v_1 ≤ … ≤ v_V, and F their empirical distribution function,
    E = Σ_i v_i (F(v_i)^n − F(v_{i−1})^n) = Σ_i v_i ((i/V)^n − ((i−1)/V)^n).

    Example:
        >>> expected_best([0.0, 1.0])
        [0.5, 0.75]
    """
    ordered, size = sorted(scores), len(scores)
    return [
        sum(v * ((i / size) ** n - ((i - 1) / size) ** n) for i, v in enumerate(ordered, start=1))
        for n in range(1, size + 1)
    ]


def run(
    name: str = "tuning",
    *,
    seeds: int = 1,
    mixers: Sequence[str] = MIXERS,
    steps: int = 250,
    num_samples: int = 20,
    task: str = "listops",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train random configurations: learning rate 10^U(−4, −2), dropout U(0, 0.3), 1 or 2 layers.

    ``seeds`` is ignored: the configurations are the repetitions. Every mixer gets the same ones.
    """
    started = time.perf_counter()
    train_part, test_part, options = classification.LOADERS[task](0, None)
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(num_samples, 3, generator=generator).tolist()
    runs: list[dict[str, Any]] = []
    for mixer in mixers:
        for number, (u_rate, u_dropout, u_layers) in enumerate(draws):
            rate, layers = 10 ** (-4 + 2 * u_rate), 1 + (u_layers > 0.5)
            chosen = {**options, "dropout": 0.3 * u_dropout}
            torch.manual_seed(number)
            model = classification.build(mixer, chosen, num_layers=layers)
            source = sample_batches(train_part, 32, number)
            train(model, source, cross_entropy, steps, learning_rate=rate)
            row = {
                "model": mixer,
                "parameters": count_parameters(model),
                "learning_rate": rate,
                "dropout": chosen["dropout"],
                "num_layers": layers,
                "accuracy": accuracy(model, test_part),
            }
            runs.append(row)
            progress(f"{mixer} {number}: lr {rate:.1e}, {row['accuracy']:.2f} %")
    summary: list[dict[str, Any]] = []
    for mixer in mixers:
        curve = expected_best([run["accuracy"] for run in runs if run["model"] == mixer])
        points = {n: curve[n - 1] for n in (1, 2, 4, 8, 16, 20) if n <= len(curve)}
        summary.append({"model": mixer, **{f"best_of_{n}": v for n, v in points.items()}})
    few = {row["model"]: row.get("best_of_4", row["best_of_1"]) for row in summary}
    claims = [
        claim(
            f"with 4 trials HyperMixer does at least as well as {rival}",
            f"{score:.1f} %",
            f"{few['hypermixer']:.1f} %",
            few["hypermixer"] >= score,
        )
        for rival, score in few.items()
        if rival != "hypermixer" and "hypermixer" in few
    ]
    settings = {"task": task, "steps": steps, "num_samples": num_samples}
    return result(name, started, settings, runs, summary, claims)
