"""Fused centered softplus against F.softplus, ReLU and the composed formula, forward and backward."""

from __future__ import annotations

import torch
from common import options, report, save, timed
from torch import Tensor, nn
from torch.nn import functional as F

import lcnn


def composed(x: Tensor, beta: Tensor) -> Tensor:
    """The definition as it is written, by autograd."""
    return (
        torch.log1p(torch.exp(-(beta * x).abs())) + (beta * x).clamp_min(0) - 0.6931471805599453
    ) / beta


def saved(run: object) -> int:
    sizes: list[int] = []
    seen: set[int] = set()

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in seen:
            seen.add(t.data_ptr())
            sizes.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()  # type: ignore[operator]
    return sum(sizes)


def main() -> None:
    args = options(__doc__ or "")
    x = torch.randn(32, 64, 32, 32, requires_grad=True)
    g = torch.randn_like(x)
    act, fixed = lcnn.CenteredSoftplus(), lcnn.CenteredSoftplus(learnable=False)
    beta = nn.Parameter(torch.tensor(5.0))
    forwards = {
        "F.softplus, fixed beta": lambda: F.softplus(x, 5.0),
        "F.relu": lambda: F.relu(x),
        "centered softplus, fixed beta": lambda: fixed(x),
        "centered softplus, learnt beta": lambda: act(x),
        "composed formula, learnt beta": lambda: composed(x, beta),
    }

    def both(run: object) -> object:
        def step() -> None:
            x.grad = beta.grad = act.log_beta.grad = None
            run().backward(g)  # type: ignore[operator]

        return step

    times = timed({name: both(run) for name, run in forwards.items()}, args.repeats)  # type: ignore[misc]
    report("(32, 64, 32, 32) float32, forward and backward", times, "F.softplus, fixed beta", args)
    memory = {name: saved(run) / x.numel() / 4 for name, run in forwards.items()}
    for name, value in memory.items():
        print(f"  {name:32} saves {value:.2f} activation-sized tensors")
    save(args, {"times_ms": times, "saved": memory})


if __name__ == "__main__":
    main()
