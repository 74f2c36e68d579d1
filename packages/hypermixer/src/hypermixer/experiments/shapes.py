"""Shapes: a mixer has to find, for every shape, its twin elsewhere, and to average the two heights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor, nn

from hypermixer.analysis import pseudo_attention
from hypermixer.baselines import count_parameters, make_mixer
from hypermixer.data.shapes import LENGTH, ShapeScenes, make_shapes
from hypermixer.experiments.common import (
    Batch,
    Progress,
    claim,
    result,
    silent,
    summarise,
    train,
)

MIXERS = ("none", "mlp-mixer", "attention", "hypermixer", "hypermixer-xavier")


class ShapesModel(nn.Module):
    """Conv ReLU Conv ReLU, x + mixer(x), Conv ReLU Conv, on (B, 100) signals."""

    mean: Tensor
    std: Tensor

    def __init__(self, mixer: str, signal: Tensor, channels: int = 32) -> None:
        super().__init__()
        self.before = nn.Sequential(
            nn.Conv1d(1, channels, 5, padding=2),
            nn.ReLU(),
            nn.Conv1d(channels, channels, 5, padding=2),
            nn.ReLU(),
        )
        self.mixer = make_mixer(
            mixer,
            channels,
            max_length=LENGTH,
            hidden_dim=128 if mixer == "mlp-mixer" else 64,
            token_info=None,
        )
        self.after = nn.Sequential(
            nn.Conv1d(channels, channels, 5, padding=2),
            nn.ReLU(),
            nn.Conv1d(channels, 1, 5, padding=2),
        )
        self.register_buffer("mean", signal.mean())
        self.register_buffer("std", signal.std())

    def features(self, signal: Tensor) -> Tensor:
        """Return the tokens that the mixer sees (B, 100, channels)."""
        standard = (signal - self.mean) / self.std
        return self.before(standard.unsqueeze(1)).transpose(1, 2)  # type: ignore[no-any-return]

    def forward(self, signal: Tensor) -> Tensor:
        """Return the predicted scene (B, 100)."""
        x = self.features(signal)
        x = x + self.mixer(x)
        return self.after(x.transpose(1, 2)).squeeze(1)  # type: ignore[no-any-return]


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean squared error on (signal, target), in squared units of height."""
    return F.mse_loss(model(batch[0]), batch[1])


def test_error(model: nn.Module, scenes: ShapeScenes) -> float:
    """Return the mean squared error on scenes."""
    model.eval()
    with torch.no_grad():
        return float(F.mse_loss(model(scenes.signal), scenes.target))


def twin_mass(model: ShapesModel, scenes: ShapeScenes, count: int = 10) -> float:
    """Return how much more a shape's outputs depend on its twin than uniform dependence would.

    The mass is Σ pseudo-attention over the twin's places, over Σ over all places outside the shape
    itself, divided by the twin's share of those places; 1 is uniform.
    """
    ratios = []
    for i in range(count):
        with torch.no_grad():
            tokens = model.features(scenes.signal[i : i + 1])
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            energy = pseudo_attention(model.mixer, tokens)[0]
        for shape in range(4):
            own = scenes.support[i, shape]
            twin = scenes.support[i, int(scenes.twin[i, shape])]
            rows = energy[own]
            mass = rows[:, twin].sum() / rows[:, ~own].sum()
            ratios.append(float(mass / (twin.sum() / (~own).sum())))
    return sum(ratios) / len(ratios)


def batches(scenes: ShapeScenes, size: int, seed: int) -> Iterator[Batch]:
    """Yield random batches for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(scenes.signal), generator=generator)
        for rows in torch.split(order, size):
            yield scenes.signal[rows], scenes.target[rows]


def fit(
    mixer: str,
    scenes: ShapeScenes,
    *,
    steps: int,
    seed: int,
    channels: int = 32,
    batch_size: int = 50,
) -> ShapesModel:
    """Train one model with Adam at 1e-3."""
    torch.manual_seed(seed)
    model = ShapesModel(mixer, scenes.signal, channels)
    source = batches(scenes, batch_size, seed)
    train(model, source, squared_error, steps, weight_decay=0.0, schedule=False)
    return model


def run(
    name: str = "shapes",
    *,
    seeds: int = 3,
    mixers: Sequence[str] = MIXERS,
    steps: int = 1200,
    num_train: int = 4000,
    num_test: int = 1000,
    group: str = "kind",
    looked_at: int = 10,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train every mixer on every seed and compare test errors with that of convolutions alone.

    ``looked_at`` is the number of test scenes whose pseudo-attention is taken.
    """
    started = time.perf_counter()
    runs: list[dict[str, Any]] = []
    for seed in range(seeds):
        scenes = make_shapes(num_train, seed=seed, group=group)  # type: ignore[arg-type]
        held_out = make_shapes(num_test, seed=10_000 + seed, group=group)  # type: ignore[arg-type]
        for mixer in mixers:
            begun = time.perf_counter()
            model = fit(mixer, scenes, steps=steps, seed=seed)
            row = {
                "model": mixer,
                "seed": seed,
                "parameters": count_parameters(model),
                "mse": test_error(model, held_out),
                "twin_mass": 0.0 if mixer == "none" else twin_mass(model, held_out, looked_at),
                "seconds": round(time.perf_counter() - begun, 1),
            }
            runs.append(row)
            progress(f"{name} seed {seed} {mixer}: mse {row['mse']:.3f}")
    summary = summarise(runs, ("mse", "twin_mass"))
    by_model = {row["model"]: row for row in summary}
    claims = []
    if {"none", "hypermixer"} <= set(by_model):
        floor, ours = by_model["none"]["mse"], by_model["hypermixer"]
        claims = [
            claim(
                "HyperMixer's test error is at most a quarter of that of convolutions alone",
                f"{floor:.2f}",
                f"{ours['mse']:.2f}",
                ours["mse"] <= 0.25 * floor,
            ),
            claim(
                "the pseudo-attention of a shape on its twin is at least 3x uniform",
                "1.0",
                f"{ours['twin_mass']:.1f}",
                ours["twin_mass"] >= 3.0,
            ),
        ]
    settings = {"steps": steps, "num_train": num_train, "num_test": num_test, "group": group}
    return result(name, started, settings, runs, summary, claims)
