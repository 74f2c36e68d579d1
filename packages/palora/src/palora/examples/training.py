"""One training loop for PaLoRA and its baselines: same batches, steps and numbers of rays."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import palora
from palora.baselines import COSMOS, PHN, LinearScalarization, PaMaL, cosmos_loss
from palora.front import Front, evaluate, evaluation_grid

__all__ = ["METHODS", "Task", "TrainConfig", "TrainResult", "overlay", "train"]

METHODS = ("palora", "pamal", "cosmos", "phn", "linear")


@dataclass
class Task:
    """A multi-task problem: data on the training device, a model and losses.

    Attributes:
        train: inputs and targets of the training part.
        test: of the test part.
        build: makes a fresh plain model, given the number of extra inputs.
        losses: ``losses(output, *targets)``: T scalars.
        scores: ``scores(output, *targets)``: losses and metrics for :func:`palora.front.evaluate`.
        names: the tasks.
    """

    train: tuple[Tensor, ...]
    test: tuple[Tensor, ...]
    build: Callable[[int], nn.Module]
    losses: Callable[..., Any]
    scores: Callable[..., Any]
    names: list[str]


@dataclass
class TrainConfig:
    """How to train.

    Attributes:
        method: one of :data:`METHODS`.
        schedule: mode of :class:`palora.Schedule`.
        rays: M.
        rank: r.
        alpha: α.
        temperature: Q.
        lr: Adam's learning rate.
        batch: batch size.
        epochs: passes over the training part.
        seed: of weights, batches and random preferences.
        every: evaluate after each so many epochs.
        points: preferences of the evaluation, resolution of :func:`palora.front.evaluation_grid`.
    """

    method: str = "palora"
    schedule: str = "anneal"
    rays: int = 5
    rank: int = 4
    alpha: float = 1.0
    temperature: float = 5.0
    lr: float = 1e-3
    batch: int = 256
    epochs: int = 10
    seed: int = 0
    every: int = 1
    points: int = 10


@dataclass
class TrainResult:
    """Fronts after each evaluated epoch, with the training time spent until then."""

    model: nn.Module
    parameters: int
    epochs: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    fronts: list[Front] = field(default_factory=list)

    def at_time(self, seconds: float, measure: Callable[[Front], float]) -> float:
        """A measure of the last front reached within so much training time (NaN if none)."""
        within = [f for s, f in zip(self.seconds, self.fronts, strict=True) if s <= seconds]
        return measure(within[-1]) if within else float("nan")


def _prepare(task: Task, config: TrainConfig) -> tuple[nn.Module, list[dict[str, Any]]]:
    tasks = len(task.names)
    if config.method == "palora":
        model = palora.inject(task.build(0), task.names, rank=config.rank, alpha=config.alpha)
        return model, palora.param_groups(model, config.lr)
    if config.method == "pamal":
        model = PaMaL([task.build(0) for _ in range(tasks)])
    elif config.method == "cosmos":
        model = COSMOS(task.build(tasks))
    elif config.method == "phn":
        model = PHN(task.build(0), tasks)
    elif config.method == "linear":
        model = LinearScalarization(task.build(0))
    else:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {config.method!r}")
    return model, [{"params": list(model.parameters()), "lr": config.lr}]


def _objective(
    model: nn.Module, task: Task, method: str, inputs: Tensor, targets: list[Tensor], rays: Tensor
) -> Tensor:
    if method == "palora":
        return palora.step_loss(model, task.losses, (inputs, *targets), rays).loss
    terms = []
    for lam in rays:
        losses = torch.stack(list(task.losses(model(lam, inputs), *targets)))
        combine = cosmos_loss if method == "cosmos" else palora.scalarize
        terms.append(combine(losses, lam))
    return torch.stack(terms).sum()


def train(
    task: Task, config: TrainConfig, report: Callable[[int, TrainResult], None] | None = None
) -> TrainResult:
    """Train one model and evaluate it along the way; evaluation is not counted in the seconds."""
    torch.manual_seed(config.seed)
    model, groups = _prepare(task, config)
    tasks, linear = len(task.names), config.method == "linear"
    optimizer = torch.optim.Adam(groups)
    schedule = palora.Schedule(
        tasks,
        num=config.rays,
        mode=config.schedule,  # type: ignore[arg-type]
        temperature=config.temperature,
        seed=config.seed,
    )
    centre = torch.full((1, tasks), 1 / tasks)
    prefs = centre if linear else evaluation_grid(tasks, config.points)
    inputs, *targets = task.train
    count = len(inputs) // config.batch * config.batch
    total = config.epochs * (count // config.batch)
    order = torch.Generator().manual_seed(config.seed)
    result = TrainResult(model, sum(p.numel() for p in model.parameters()))
    step, spent = 0, 0.0
    for epoch in range(1, config.epochs + 1):
        start = time.perf_counter()
        model.train()
        for rows in torch.randperm(len(inputs), generator=order)[:count].split(config.batch):
            step += 1
            rays = centre if linear else schedule(step / total)
            loss = _objective(
                model, task, config.method, inputs[rows], [t[rows] for t in targets], rays
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        spent += time.perf_counter() - start
        if epoch % config.every == 0 or epoch == config.epochs:
            front = evaluate(model, [task.test], task.scores, prefs, tasks=task.names)
            result.epochs.append(epoch)
            result.seconds.append(spent)
            result.fronts.append(front)
            if report is not None:
                report(epoch, result)
    return result


def overlay(a: Tensor, b: Tensor, shift: int) -> Tensor:
    """Place images ``a`` top-left and ``b`` bottom-right on a larger canvas, by pixel-wise maximum.

    Args:
        a: ``(n, h, w)``.
        b: ``(n, h, w)``.
        shift: how far ``b`` is moved down and right; the canvas is that much larger.
    """
    n, h, w = a.shape
    canvas = a.new_zeros(n, h + shift, w + shift)
    canvas[:, :h, :w] = a
    canvas[:, shift:, shift:] = torch.maximum(canvas[:, shift:, shift:], b)
    return canvas
