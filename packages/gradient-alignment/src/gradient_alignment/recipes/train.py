"""Training of a classifier with or without a regulariser: small images in minutes, CIFAR by the paper's schedule."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradient_alignment.core.loss import RegularizedLoss
from gradient_alignment.core.noise import check_count
from gradient_alignment.core.regularizers import (
    AntiScoreMatching,
    GradientNorm,
    Regularizer,
    ScoreMatching,
)
from gradient_alignment.interpret.saliency import evaluation_mode
from gradient_alignment.recipes.data import Split
from gradient_alignment.recipes.models import accuracy, make

REGULARIZERS: dict[str, Any] = {
    "none": None,
    "score": ScoreMatching,
    "anti": AntiScoreMatching,
    "gradient-norm": GradientNorm,
}


@dataclass
class Config:
    """What to train and how.

    Attributes:
        model: a name of `recipes.models.MODELS`.
        regularizer: "none", "score", "anti" or "gradient-norm".
        options: arguments of the regulariser.
        preset: "paper" or "code" takes the published settings first.
        schedule: "one-cycle" (digits), or "steps": a tenth at half and at three quarters of the epochs.
        epochs: passes over the data.
        lr: the largest learning rate; momentum is 0.9.
        batch_size: images in a step.
        weight_decay: of SGD.
        clip: bound of the gradient's norm; None is none.
        augment: crop after padding by 4, and flip (CIFAR).
        seed: of weights, order and directions.
    """

    model: str = "small-cnn"
    regularizer: str = "none"
    options: dict[str, Any] = field(default_factory=dict)
    preset: str | None = None
    schedule: str = "one-cycle"
    epochs: int = 20
    lr: float = 0.05
    batch_size: int = 64
    weight_decay: float = 0.0
    clip: float | None = 5.0
    augment: bool = False
    seed: int = 0


CIFAR_SCHEDULE: dict[str, Any] = {
    "model": "resnet18",
    "schedule": "steps",
    "epochs": 200,
    "lr": 0.1,
    "batch_size": 128,
    "weight_decay": 5e-4,
    "clip": None,
    "augment": True,
}
"""The paper's settings: the learning rate falls at epochs 100 and 150 of 200."""


@dataclass
class Trained:
    """Result of `train`."""

    model: nn.Module
    config: Config
    accuracy: float
    seconds: float
    losses: list[float]
    terms: dict[str, float]


def make_regularizer(config: Config) -> Regularizer | None:
    """Return the regulariser of a configuration.

    Raises:
        ValueError: an unknown name or preset, an argument that does not fit.
    """
    if config.regularizer not in REGULARIZERS:
        raise ValueError(
            f"regularizer must be one of {', '.join(REGULARIZERS)}; got {config.regularizer!r}"
        )
    kind = REGULARIZERS[config.regularizer]
    if kind is None:
        if config.preset or config.options:
            given = ", ".join(["preset"] * bool(config.preset) + list(config.options))
            raise ValueError(f"regularizer 'none' takes no {given}")
        return None
    made: Regularizer = (
        kind.preset(config.preset, **config.options) if config.preset else kind(**config.options)
    )
    return made


def augment(x: Tensor) -> Tensor:
    """Return the images padded by 4, cut at random to their size, and flipped or not."""
    count, _, height, width = x.shape
    padded = F.pad(x, (4, 4, 4, 4))
    rows = torch.randint(9, (count, 1, 1)) + torch.arange(height).view(1, -1, 1)
    columns = torch.randint(9, (count, 1, 1)) + torch.arange(width).view(1, 1, -1)
    flipped = torch.where(torch.rand(count, 1, 1) < 0.5, columns.flip(2), columns)
    image = torch.arange(count).view(-1, 1, 1)
    return padded[image, :, rows.to(image.device), flipped].permute(0, 3, 1, 2).contiguous()


def train(
    data: Split, config: Config, report: Callable[[int, float], None] | None = None
) -> Trained:
    """Train a network and return it in evaluation mode, on the device of the data.

    Args:
        data: see `recipes.data.load`.
        config: what and how.
        report: called after every epoch with its number, from 1, and the mean loss.

    Raises:
        ValueError: a configuration that does not fit.
    """
    check_count("epochs", config.epochs)
    check_count("batch_size", config.batch_size)
    start = time.perf_counter()
    torch.manual_seed(config.seed)
    device = data.train_x.device
    model = make(config.model, data.num_classes, tuple(data.train_x.shape[1:])).to(device)
    regularizer = make_regularizer(config)
    loss_fn = RegularizedLoss(model, *([regularizer] if regularizer else []))
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, momentum=0.9, weight_decay=config.weight_decay
    )
    count = len(data.train_x)
    steps = -(-count // config.batch_size)
    scheduler = _schedule(optimizer, config, steps)
    losses = []
    for epoch in range(config.epochs):
        total = 0.0
        for rows in torch.split(torch.randperm(count), config.batch_size):
            x, y = data.train_x[rows], data.train_y[rows]
            loss = loss_fn(augment(x) if config.augment else x, y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if config.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            scheduler.step()
            total += float(loss.detach()) * len(rows) / count
        losses.append(total)
        if report:
            report(epoch + 1, total)
    with evaluation_mode(model):
        share = accuracy(model, data.test_x, data.test_y)
    terms = {name: float(value) for name, value in loss_fn.terms.items()}
    return Trained(model.eval(), config, share, time.perf_counter() - start, losses, terms)


def _schedule(optimizer: torch.optim.SGD, config: Config, steps: int) -> Any:
    total = config.epochs * steps
    if config.schedule == "one-cycle":
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, config.lr, total_steps=total, cycle_momentum=False
        )
    if config.schedule == "steps":
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, [total // 2, 3 * total // 4])
    raise ValueError(f"schedule must be 'one-cycle' or 'steps', got {config.schedule!r}")


def save(trained: Trained, path: Path, data: Split) -> None:
    """Write weights and configuration, so that `load_checkpoint` makes the network again."""
    state = {
        "state": trained.model.state_dict(),
        "config": asdict(trained.config),
        "accuracy": trained.accuracy,
        "num_classes": data.num_classes,
        "shape": list(data.train_x.shape[1:]),
    }
    torch.save(state, path)


def load_checkpoint(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network in evaluation mode, and what was saved beside its weights.

    Raises:
        OSError: the file is missing.
        ValueError: it is no checkpoint of `save`.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model = make(state["config"]["model"], state["num_classes"], tuple(state["shape"]))
        model.load_state_dict(state["state"])
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is no checkpoint of `gradient-alignment train`: {error}"
        ) from error
    return model.eval(), {k: v for k, v in state.items() if k != "state"}
