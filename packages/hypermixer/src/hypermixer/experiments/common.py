"""What the experiments share: the training loop, summaries over seeds, the environment, JSON files."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Progress = Callable[[str], None]
Batch = tuple[Tensor, ...]


def silent(line: str) -> None:
    """Say nothing."""


def train(
    model: nn.Module,
    batches: Iterator[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    steps: int,
    *,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    schedule: bool = True,
) -> None:
    """Train with AdamW; ``schedule`` adds a linear warm-up over a tenth and a linear decay to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
    model.train()
    for step in range(steps):
        if schedule:
            factor = min(10 * (step + 1) / steps, (steps - step) / (0.9 * steps), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * factor
        optimizer.zero_grad(set_to_none=True)
        loss(model, next(batches)).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def sample_batches(data: Sequence[Tensor], size: int, seed: int) -> Iterator[Batch]:
    """Yield random batches for ever; token ids are cut to the longest text of the batch.

    Batches are made from pools of 32 whose texts are sorted by length, so that little is padding.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = not data[0].dtype.is_floating_point
    lengths = (data[0] != 0).sum(1) if texts else None
    while True:
        order = torch.randperm(len(data[0]), generator=generator)
        for pool in torch.split(order, 32 * size):
            pieces = pool if lengths is None else pool[lengths[pool].argsort()]
            groups = torch.split(pieces, size)
            for number in torch.randperm(len(groups), generator=generator).tolist():
                yield trim(tuple(t[groups[number]] for t in data))


def trim(batch: Batch) -> Batch:
    """Cut the padding that all texts of a batch share."""
    if batch[0].dtype.is_floating_point:
        return batch
    longest = max(1, int((batch[0] != 0).sum(1).max()))
    return tuple(t[:, :longest] if t.dim() == 2 else t for t in batch)


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of a classifier on (inputs..., labels)."""
    return F.cross_entropy(model(*batch[:-1]), batch[-1])


def accuracy(model: nn.Module, data: Batch, size: int = 250) -> float:
    """Return the accuracy in percent."""
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(data[-1]), size):
            *inputs, labels = trim(tuple(t[start : start + size] for t in data))
            right += int((model(*inputs).argmax(-1) == labels).sum())
    return 100.0 * right / len(data[-1])


def summarise(runs: list[dict[str, Any]], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Return mean and deviation over seeds, a row for each model in the order of the runs."""
    rows = []
    for model in dict.fromkeys(run["model"] for run in runs):
        own = [run for run in runs if run["model"] == model]
        row: dict[str, Any] = {"model": model, "parameters": own[0]["parameters"]}
        for metric in metrics:
            values = [run[metric] for run in own]
            row[metric] = statistics.fmean(values)
            row[f"{metric}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
        rows.append(row)
    return rows


def environment() -> dict[str, Any]:
    """Return versions, processor, threads and command."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def processor() -> str:
    """Return the processor's name."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return platform.processor() or platform.machine()


def result(
    name: str,
    started: float,
    settings: dict[str, Any],
    runs: list[dict[str, Any]],
    summary: list[dict[str, Any]],
    claims: list[dict[str, Any]],
) -> dict[str, Any]:
    """Put an experiment's result together; ``started`` is a ``time.perf_counter()``."""
    return {
        "experiment": name,
        "settings": settings,
        "summary": summary,
        "claims": claims,
        "runs": runs,
        "environment": environment(),
        "seconds": round(time.perf_counter() - started, 1),
    }


def claim(text: str, baseline: str, ours: str, holds: bool) -> dict[str, Any]:
    """Return a claim's row."""
    return {"claim": text, "baseline": baseline, "ours": ours, "holds": bool(holds)}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file under a temporary name and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
