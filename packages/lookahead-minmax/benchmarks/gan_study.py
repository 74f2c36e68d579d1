"""Paired GAN runs with and without lookahead: digits or MNIST, several seeds, one table and one JSON.

python benchmarks/gan_study.py digits --seeds 5 --rounds 8000
python benchmarks/gan_study.py mnist --seeds 2 --rounds 400 --evaluations 4 --data-dir DIR

The distance is Fréchet's between penultimate features of a classifier trained on the same images. "late" is the
last quarter of the evaluations; differences are paired by seed, with a bootstrap interval over seeds.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from lookahead_minmax.gan import data
from lookahead_minmax.gan.train import Recipe, feature_extractor, train

VARIANTS = {
    "digits": {"AltGAN": {}, "LA k=5": {"k": (5,)}, "LA k=100": {"k": (100,)}},
    "mnist": {"AltGAN": {}, "LA k=5": {"k": (5,)}},
}
SETTINGS = {
    "digits": {"ema": 0.999, "batch_size": 50},
    "mnist": {"ema": 0.999, "batch_size": 50, "betas": (0.05, 0.999)},
}
KINDS = ("live", "ema", "ema_slow")


def interval(differences: list[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a mean over seeds."""
    values, rng = np.array(differences), np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(10_000, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", choices=("digits", "mnist"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=8000)
    parser.add_argument("--evaluations", type=int, default=24)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.data == "digits":
        images, labels = data.digits()
    else:
        images, labels = data.mnist(arguments.data_dir)
        images, labels = images[:8000], labels[:8000]
    features = feature_extractor(images, labels)

    runs: dict[str, list[dict[str, dict[str, float]]]] = {}
    seconds: dict[str, list[float]] = {}
    for name, change in VARIANTS[arguments.data].items():
        for seed in range(arguments.seeds):
            recipe = Recipe(
                data=arguments.data,
                rounds=arguments.rounds,
                evaluations=arguments.evaluations,
                seed=seed,
                **{**SETTINGS[arguments.data], **change},
            )
            start = time.perf_counter()
            curve = train(recipe, images, features)
            seconds.setdefault(name, []).append(time.perf_counter() - start)
            kinds = KINDS if change else KINDS[:2]
            runs.setdefault(name, []).append({kind: curve.summary(kind) for kind in kinds})
            print(f"{name} seed {seed}: {curve.live[-1]:.2f}", file=sys.stderr, flush=True)

    print(
        "| variant | weights | best | last | late mean | late deviation | late mean minus AltGAN's live |"
    )
    print("|---|---|---|---|---|---|---|")
    base = [run["live"]["mean"] for run in runs["AltGAN"]]
    for name, rows in runs.items():
        for kind in rows[0]:
            cells = [f"{mean(row[kind][key] for row in rows):.2f}" for key in rows[0][kind]]
            gaps = [row[kind]["mean"] - b for row, b in zip(rows, base, strict=True)]
            low, high = interval(gaps)
            gap = f"{mean(gaps):+.2f} [{low:+.2f}, {high:+.2f}]"
            print(f"| {name} | {kind} | {' | '.join(cells)} | {gap} |")
    if arguments.out is not None:
        result = {
            "command": " ".join(["python", "benchmarks/gan_study.py", *sys.argv[1:]]),
            "environment": {"python": platform.python_version(), "torch": torch.__version__},
            "images": len(images),
            "seconds": seconds,
            "runs": runs,
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
