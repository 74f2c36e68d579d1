"""Classification by encoders that differ in their token mixer alone, at equal parameter counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hypermixer.baselines import MixerClassifier, count_parameters, match_parameters
from hypermixer.data import load_digits, load_text, make_listops, make_topic_pairs
from hypermixer.experiments.common import (
    Batch,
    Progress,
    accuracy,
    claim,
    cross_entropy,
    result,
    sample_batches,
    silent,
    summarise,
    train,
)

MIXERS = (
    "hypermixer",
    "hypermixer-tied",
    "hypermixer-xavier",
    "attention",
    "linear-attention",
    "mlp-mixer",
    "gmlp",
    "fnet",
    "static",
    "none",
)
Loaded = tuple[Batch, Batch, dict[str, Any]]


def _digits(seed: int, data_dir: Path | None) -> Loaded:
    train_part, test_part = load_digits(seed=seed)
    return train_part, test_part, {"num_classes": 10, "num_features": 1, "max_length": 64}


def _listops(seed: int, data_dir: Path | None) -> Loaded:
    tokens, values = make_listops(22_000, seed=seed)
    options = {"num_classes": 10, "vocab_size": 16, "max_length": tokens.shape[1]}
    return (tokens[:20_000], values[:20_000]), (tokens[20_000:], values[20_000:]), options


def _topics(seed: int, data_dir: Path | None) -> Loaded:
    data = make_topic_pairs(seed=seed)
    options = {
        "num_classes": 2,
        "vocab_size": len(data.vocabulary),
        "max_length": 96,
        "pairs": True,
        "dropout": 0.1,
    }
    return data.train, data.test, options


def _text(task: str) -> Callable[[int, Path | None], Loaded]:
    def load(seed: int, data_dir: Path | None) -> Loaded:
        if data_dir is None:
            raise ValueError(f"{task} is read from files: give --data-dir, the folder of {task}/")
        data = load_text(task, data_dir)
        options = {
            "num_classes": len(data.labels),
            "vocab_size": len(data.vocabulary),
            "max_length": data.train[0].shape[1],
            "dropout": 0.2,
        }
        return data.train, data.test, options

    return load


LOADERS = {
    "digits": _digits,
    "listops": _listops,
    "topics-pair": _topics,
    "sst2": _text("sst2"),
    "agnews": _text("agnews"),
    "trec": _text("trec"),
}
STEPS = {
    "digits": 600,
    "listops": 600,
    "topics-pair": 800,
    "sst2": 1500,
    "agnews": 900,
    "trec": 400,
}

LAYERS = {"topics-pair": 1}  # 2 elsewhere


def build(
    mixer: str, options: dict[str, Any], *, embed_dim: int = 64, num_layers: int = 2
) -> MixerClassifier:
    """Return a classifier whose feature width makes it as large as the untied HyperMixer's."""

    def make(name: str, width: int) -> MixerClassifier:
        heads = 4 if name.endswith("attention") else 1
        shape: dict[str, Any] = {
            "embed_dim": embed_dim,
            "num_layers": num_layers,
            "num_heads": heads,
        }
        return MixerClassifier(name, dim_feedforward=width, **shape, **options)

    with torch.device("meta"):
        target = count_parameters(make("hypermixer", 2 * embed_dim))
    return make(mixer, match_parameters(lambda width: make(mixer, width), target))


def part_of(data: Batch, fraction: float) -> Batch:
    """Return the first part of training data."""
    return tuple(t[: max(1, round(len(t) * fraction))] for t in data)


def run(
    name: str,
    *,
    seeds: int = 3,
    mixers: Sequence[str] = MIXERS,
    steps: int | None = None,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    fraction: float = 1.0,
    data_dir: str | Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train every mixer on every seed; report the test accuracy after the last step.

    Nothing is chosen by looking at the test part: no early stopping, one learning rate for all.
    """
    started = time.perf_counter()
    steps = STEPS[name] if steps is None else steps
    folder = None if data_dir is None else Path(data_dir)
    runs: list[dict[str, Any]] = []
    for seed in range(seeds):
        train_part, test_part, options = LOADERS[name](seed, folder)
        train_part = part_of(train_part, fraction)
        for mixer in mixers:
            begun = time.perf_counter()
            torch.manual_seed(seed)
            model = build(mixer, options, num_layers=LAYERS.get(name, 2))
            source = sample_batches(train_part, batch_size, seed)
            train(model, source, cross_entropy, steps, learning_rate=learning_rate)
            row = {
                "model": mixer,
                "seed": seed,
                "parameters": count_parameters(model),
                "accuracy": accuracy(model, test_part),
                "seconds": round(time.perf_counter() - begun, 1),
            }
            runs.append(row)
            progress(f"{name} seed {seed} {mixer}: {row['accuracy']:.2f} % in {row['seconds']} s")
    summary = summarise(runs, ("accuracy", "seconds"))
    settings = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "fraction": fraction,
        "num_layers": LAYERS.get(name, 2),
        "train": len(train_part[-1]),
        "test": len(test_part[-1]),
        **options,
    }
    return result(name, started, settings, runs, summary, _claims(name, summary))


def _claims(name: str, summary: list[dict[str, Any]]) -> list[dict[str, Any]]:
    score = {row["model"]: row["accuracy"] for row in summary}
    ours = {model: s for model, s in score.items() if model.startswith("hypermixer")}
    if not ours:
        return []
    best = max(ours, key=lambda model: ours[model])
    rows = []
    for rival in ("mlp-mixer", "fnet"):
        if rival in score:
            rows.append(
                claim(
                    f"HyperMixer is at least as good as {rival} at equal parameters",
                    f"{score[rival]:.1f} %",
                    f"{ours[best]:.1f} % ({best})",
                    ours[best] >= score[rival],
                )
            )
    if "attention" in score:
        rows.append(
            claim(
                "HyperMixer is within 2 points of attention or better",
                f"{score['attention']:.1f} %",
                f"{ours[best]:.1f} % ({best})",
                ours[best] >= score["attention"] - 2.0,
            )
        )
    if name == "digits":
        reached = f"{ours[best]:.1f} % ({best})"
        rows.append(claim("96 % of the test digits", "96 %", reached, ours[best] >= 96.0))
    return rows
