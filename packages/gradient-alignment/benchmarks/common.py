"""What the benchmarks share: the machine's description, timing, the published formulation made again."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import gradient_alignment


def options(text: str, repeats: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write the figures to this file")
    return parser


def environment() -> dict[str, str]:
    processor = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":")[1].strip() if names else processor
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gradient-alignment": gradient_alignment.__version__,
        "processor": processor,
        "threads": str(torch.get_num_threads()),
        "command": " ".join(["python", *sys.argv]),
    }


def finish(args: argparse.Namespace, figures: dict[str, object]) -> None:
    print("; ".join(f"{k} {v}" for k, v in environment().items()))
    if args.json:
        data = {"environment": environment(), **figures}
        Path(args.json).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


class Published:
    """The published step, written from its equations: a pass and a gradient for each term that asks for them.

    A clean pass with an input gradient; K noisy passes one by one, in training mode; the difference of all
    logits, of which the label's is picked.
    """

    def __init__(
        self, model: nn.Module, weight: float, stability: float, sigma: float, draws: int
    ) -> None:
        self.model, self.weight, self.stability = model, weight, stability
        self.sigma, self.draws = sigma, draws

    def __call__(self, x: Tensor, y: Tensor, noise: Tensor | None = None) -> Tensor:
        x = x.detach().requires_grad_()
        logits = self.model(x)
        chosen = logits.gather(1, y[:, None]).sum()
        (slope,) = torch.autograd.grad(chosen, x, create_graph=True)
        trace: Tensor | float = 0.0
        for k in range(self.draws):
            v = torch.randn_like(x) if noise is None else noise[k]
            change = self.model(x + self.sigma * v) - logits
            trace = trace + 2 / self.sigma**2 * change.gather(1, y[:, None])[:, 0] / self.draws
        assert isinstance(trace, Tensor)
        size = slope.pow(2).sum() / len(x)
        penalty = trace.mean() + 0.5 * size + self.stability * trace.square().mean()
        return nn.functional.cross_entropy(logits, y) + self.weight * penalty


def milliseconds(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Return the fastest of interleaved repeats of every call; other work on the machine only adds."""
    best = [float("inf")] * len(calls)
    for repeat in range(repeats + 1):
        for index, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if repeat:  # the first round warms up
                best[index] = min(best[index], 1e3 * (time.perf_counter() - start))
    return best


def step(loss: Callable[[], Tensor], model: nn.Module) -> Callable[[], object]:
    """Return a call that takes a training step's loss and gradients."""

    def run() -> object:
        model.zero_grad(set_to_none=True)
        loss().backward()
        return None

    return run
