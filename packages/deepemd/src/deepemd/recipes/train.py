"""The training loop: plain, resumable after a kill, logged line by line (2.4, 2.9)."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from deepemd import losses
from deepemd.core.distance import cost_matrix
from deepemd.core.model import DeepEMD
from deepemd.data.pairs import DEFAULT_WEIGHTS, PairSpec
from deepemd.recipes.stream import BatchStream

TARGETS = ("matching", "distance", "both", "dual")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on; two runs of one config on one machine give the same weights.

    Args:
        out: folder of the checkpoint, the log and the result.
        model: keyword arguments of :class:`~deepemd.DeepEMD`.
        steps, lr, warmup, weight_decay, grad_clip, ema: AdamW under a cosine with linear warm-up.
        sizes, first, last, points: see :class:`~deepemd.recipes.stream.BatchStream`.
        target: ``"matching"`` (paper), ``"distance"``, ``"both"`` or ``"dual"``.
        directions: of the matching loss.
        weights, planar, decoder: the mixture of pairs.
        seed: of weights and data.
        workers: processes that make and label batches ahead of time.
        amp: bfloat16 autocast.
        compile: pass the network through ``torch.compile``.
        device: where to train.
        checkpoint_seconds, log_every: how often to save and to write a line of the log.
    """

    out: str
    model: dict[str, Any] = field(default_factory=dict)
    steps: int = 1000
    lr: float = 1.5e-3
    warmup: int = 200
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema: float = 0.999
    sizes: tuple[int, ...] = (64, 128, 256)
    first: tuple[float, ...] = (1.0, 0.0, 0.0)
    last: tuple[float, ...] = (0.2, 0.4, 0.4)
    points: int = 1024
    target: str = "matching"
    directions: str = "both"
    weights: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_WEIGHTS))
    planar: float = 0.2
    decoder: float = 0.0
    seed: int = 0
    workers: int = 0
    amp: bool = False
    compile: bool = False
    device: str = "cpu"
    checkpoint_seconds: float = 120.0
    log_every: int = 50

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {self.target!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    @classmethod
    def load(cls, path: str | Path) -> TrainConfig:
        """Read a JSON file; unknown keys are refused."""
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"{path}: unknown keys {unknown}; there are {', '.join(sorted(known))}"
            )
        lists: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**lists)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine to 1 % of the peak."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    share = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))


def objective(model: Any, batch: dict[str, Tensor], config: TrainConfig) -> Tensor:
    """Return the loss of one batch under the configured target."""
    x, y = batch["x"], batch["y"]
    loss = x.new_zeros(())
    if config.target in ("matching", "both", "dual"):
        logits = model(x, y)
        if config.target != "dual":
            loss = loss + losses.matching_loss(logits, batch["index"], directions=config.directions)
    if config.target == "dual":
        _, g = model.potentials(x, y)
        loss = loss + losses.dual_loss(g, cost_matrix(x, y))
    if config.target in ("distance", "both"):
        predicted = model.distance(x, y)
        loss = loss + losses.distance_loss(predicted, batch["distance"])
    return loss


def save_atomically(state: Any, path: Path) -> None:
    """Write with ``torch.save`` to a temporary name, then rename: a kill leaves the old file whole."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def draw_bar(done: int, total: int, note: str, width: int = 30) -> None:
    """Draw a progress bar over the last one on stderr; a full one ends its line."""
    filled = "#" * (width * done // total)
    end = "\n" if done >= total else ""
    text = f"\r[{filled:.<{width}}] {done}/{total}  {note}\033[K"
    print(text, end=end, file=sys.stderr, flush=True)


def _ranks() -> tuple[int, int]:
    """Return this process's rank and their number: (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _average_gradients(parameters: list[Tensor], world: int) -> None:
    """Replace every gradient by its mean over all processes, in one reduction."""
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for grad, mean in zip(grads, flat.div_(world).split([g.numel() for g in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def _batches(config: TrainConfig, start: int) -> Iterator[dict[str, Tensor]]:
    rank, world = _ranks()
    stream = BatchStream(
        config.steps,
        sizes=config.sizes,
        first=config.first,
        last=config.last,
        points=config.points,
        seed=config.seed,
        spec=PairSpec(config.weights, planar=config.planar),
        decoder=config.decoder,
        rank=rank,
        world=world,
    )
    loader: DataLoader[dict[str, Tensor]] = DataLoader(
        stream,
        batch_size=None,
        sampler=range(start, config.steps),
        num_workers=config.workers,
        prefetch_factor=4 if config.workers else None,
    )
    return iter(loader)


def train(config: TrainConfig, *, progress: bool = False) -> DeepEMD:
    """Train a network, or go on with the run that ``config.out`` holds.

    Inside an initialised process group each process takes its share of every batch, gradients are averaged, and
    the first process writes: the same run as one process's, up to the order of sums.

    Writes ``checkpoint.pt`` (for resuming), ``log.jsonl``, ``config.json`` and, at the end, the averaged
    weights as ``model.safetensors`` beside it.

    Args:
        config: the run.
        progress: redraw a progress bar on stderr with every line of the log.

    Returns:
        The network with the exponential average of its weights, in evaluation mode.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    model = DeepEMD(**config.model).to(config.device)
    average = DeepEMD(**config.model).to(config.device)
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.98)
    )
    start, spent = 0, 0.0
    saved = out / "checkpoint.pt"
    if saved.exists():
        state = torch.load(saved, map_location=config.device, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start, spent = int(state["step"]), float(state["seconds"])
    rank, world = _ranks()
    forward: Any = torch.compile(model) if config.compile else model
    parameters: list[Tensor] = list(model.parameters())
    averages: list[Tensor] = list(average.parameters())

    def checkpoint(step: int, seconds: float) -> None:
        state = {
            "model": model.state_dict(), "average": average.state_dict(),
            "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds,
        }  # fmt: skip
        save_atomically(state, saved)

    began = last_save = time.perf_counter()
    running: list[Tensor] = []
    pairs = 0
    with open(out / "log.jsonl" if rank == 0 else os.devnull, "a", encoding="utf-8") as log:
        for step, batch in enumerate(_batches(config, start), start=start):
            batch = {key: value.to(config.device) for key, value in batch.items()}
            rate = learning_rate(config, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(config.device.split(":")[0], torch.bfloat16, enabled=config.amp):
                loss = objective(forward, batch, config)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if world > 1:
                _average_gradients(parameters, world)
            norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip)
            optimizer.step()
            decay = min(config.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(averages, parameters, 1 - decay)
            running.append(loss.detach())
            pairs += len(batch["x"])
            now = time.perf_counter()
            done = step + 1
            if rank == 0 and (done % config.log_every == 0 or done == config.steps):
                line = {
                    "step": done, "loss": round(float(torch.stack(running).mean()), 5),
                    "n": batch["x"].shape[1], "lr": round(rate, 7), "norm": round(float(norm), 4),
                    "seconds": round(spent + now - began, 1), "pairs_per_s": round(pairs / (now - began), 1),
                }  # fmt: skip
                running.clear()
                log.write(json.dumps(line) + "\n")
                log.flush()
                if progress:
                    left = (now - began) / (done - start) * (config.steps - done)
                    draw_bar(done, config.steps, f"loss {line['loss']:.4f}, {left:.0f} s left")
            if rank == 0 and (now - last_save > config.checkpoint_seconds or done == config.steps):
                checkpoint(done, spent + now - began)
                last_save = now
    if rank == 0:
        (out / "run.json").write_text(json.dumps(asdict(config), indent=1), encoding="utf-8")
    return average.eval()
