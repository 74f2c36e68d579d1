"""Training with the published optimizer and schedule, at any size."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from denseformer.analysis import WeightHistory
from denseformer.core.dwa import DWA
from denseformer.core.geometry import check_int
from denseformer.optim import param_groups
from denseformer.recipes.corpora import tokens as ids
from denseformer.recipes.gpt import GPT, GPTConfig


@dataclass(frozen=True)
class TrainConfig:
    """One run. The published one: 40,000 steps of 400 × 256 tokens, lr 1e-3, decay 0.1 (averages too), bf16, compiled."""

    model: GPTConfig = field(default_factory=GPTConfig)
    steps: int = 600
    batch: int = 16
    lr: float = 1e-3
    weight_decay: float = 0.1
    decay_dwa: bool = False
    delay: int = 0  # steps during which the averages stay at the identity ("Delayed DWA")
    seed: int = 0
    every: int = 150  # steps between validations
    accumulate: int = 1  # parts of a batch, one after the other; their mean gradient is one step's
    device: str = "cpu"
    bf16: bool = False  # autocast; the stream and the averages keep float32
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "every"):
            check_int(name, getattr(self, name))
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} does not divide batch={self.batch}")
        if self.delay < 0:
            raise ValueError(f"delay must be at least 0 steps, got {self.delay}")


@dataclass
class TrainResult:
    """What a run measured; losses in nats per token."""

    config: TrainConfig
    first_loss: float
    validation: dict[int, float]
    train: dict[int, float]
    seconds: float
    model: GPT
    history: WeightHistory | None

    def summary(self) -> dict[str, Any]:
        """Return the numbers without the model."""
        return {
            "config": asdict(self.config),
            "first_loss": self.first_loss,
            "validation": self.validation,
            "train": self.train,
            "seconds": self.seconds,
        }


@torch.no_grad()
def evaluate(model: GPT, tokens: Tensor, batch: int = 64) -> float:
    """Return the mean loss over all whole, non-overlapping windows of ``tokens``."""
    model.eval()
    device = model.embedding.weight.device
    size = model.config.context
    count = (len(tokens) - 1) // size
    x = tokens[: count * size].view(count, size)
    y = tokens[1 : count * size + 1].view(count, size)
    total = 0.0
    for a, b in zip(x.split(batch), y.split(batch), strict=True):
        total += float(model(ids(a).to(device), ids(b).to(device))) * len(a)
    model.train()
    return total / count


def rate(step: int, steps: int) -> float:
    """Return the published schedule's factor: cosine from 1/100 to 1 in 5 % of the steps, down to 1/10."""
    top = 0.05 * steps
    start, end, part = (0.01, 1.0, step / top) if step < top else (
        1.0, 0.1, min(1.0, (step - top) / max(steps - 1 - top, 1)))  # fmt: skip
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


def train(
    config: TrainConfig,
    tokens: tuple[Tensor, Tensor],
    progress: Callable[[str], None] = lambda text: None,
) -> TrainResult:
    """Train one model on (training, validation) tokens, both 1-D: int64, or the int16 of a token file.

    Runs with the same seed draw the same initial blocks and the same batches whatever the baseline, so
    that their differences are paired.

    Raises:
        ValueError: a part of the tokens is not longer than the context, or the device cannot be used.
    """
    if (shortest := min(map(len, tokens))) <= config.model.context:
        raise ValueError(
            f"context={config.model.context} needs more tokens than that in training and validation; the "
            f"shorter has {shortest}"
        )
    device = _device(config.device)
    torch.manual_seed(config.seed)
    model = GPT(config.model).to(device)
    call = torch.compile(model) if config.compile else model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.bf16)
    groups = param_groups(model, config.weight_decay, decay_dwa=config.decay_dwa)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, config.steps))
    draws = torch.Generator().manual_seed(config.seed + 1)
    dwa = next((m for m in model.modules() if isinstance(m, DWA)), None)
    history = WeightHistory(dwa) if dwa is not None else None
    size = config.model.context
    validation, recent, seen, first = {}, {}, 0.0, float("nan")
    start = time.perf_counter()
    for step in range(1, config.steps + 1):
        if dwa is not None:
            dwa.requires_grad_(step > config.delay)
        at = torch.randint(len(tokens[0]) - size, (config.batch,), generator=draws)
        window = torch.stack([tokens[0][i : i + size + 1] for i in at.tolist()])
        window = ids(window).to(device)
        optimizer.zero_grad()
        value = 0.0
        for part in window.split(config.batch // config.accumulate):
            with autocast:
                loss = call(part[:, :-1], part[:, 1:]) / config.accumulate
            loss.backward()
            value += loss.item()
        optimizer.step()
        rates.step()
        first = value if step == 1 else first
        seen += value
        if step % config.every == 0 or step == config.steps:
            with autocast:
                validation[step] = evaluate(model, tokens[1])
            recent[step] = seen / ((step - 1) % config.every + 1)
            seen = 0.0
            if history is not None:
                history.record(step)
            progress(f"step {step}: training {recent[step]:.4f}, validation {validation[step]:.4f}")
    seconds = time.perf_counter() - start
    return TrainResult(config, first, validation, recent, seconds, model, history)


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        problem = str(error).partition("\n")[0]
        raise ValueError(f"device={name!r} cannot be used here: {problem}") from error


def variants(base: TrainConfig) -> dict[str, TrainConfig]:
    """Return the comparison of the paper's first table: plain, 1 × 1, 4 × 5, Skips With Gains."""
    made = {
        "plain": replace(base.model, baseline="plain"),
        "1x1": replace(base.model, baseline="dense", dilation=1, period=1),
        "4x5": replace(base.model, baseline="dense", dilation=4, period=5),
        "gains": replace(base.model, baseline="gains"),
    }
    return {name: replace(base, model=model) for name, model in made.items()}
