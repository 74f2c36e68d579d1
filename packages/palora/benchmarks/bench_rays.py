"""M preferences: one tiled training step against M passes of palora and of the naive loop."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from common import finish, naive, options, set_naive, timed
from torch import Tensor

import palora
from palora.examples.models import LeNet, TaskMLP


class Outputs(TaskMLP):
    """The heads' outputs as one tensor ``(n, T)``, so that one call computes all losses."""

    def forward(self, x: Tensor) -> Any:
        return torch.cat(super().forward(x), 1)


def mlp_case(n: int, rays: int, tasks: int, rank: int, args: Any) -> dict[str, Any]:
    model = palora.inject(Outputs(21, [256, 256, 256], [1] * tasks), tasks, rank=rank)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("palora_B"):
                p.normal_(std=0.1)
    loop = naive(model)
    x, y = torch.randn(n, 21), torch.randn(n, tasks)
    lams = torch.distributions.Dirichlet(torch.ones(tasks)).sample((rays,))

    def losses(out: Tensor, target: Tensor) -> Tensor:
        return (out - target).square().mean(0)

    def clear(m: Any) -> None:
        for p in m.parameters():
            p.grad = None

    def tiled() -> None:
        clear(model)
        palora.step_loss(model, losses, (x, y), lams).loss.backward()

    def passes() -> None:
        clear(model)
        palora.step_loss(model, losses, (x, y), lams, chunk=1).loss.backward()

    def naive_loop() -> None:
        clear(loop)
        total = torch.zeros(())
        for lam in lams:
            set_naive(loop, lam)
            total = total + (losses(loop(x), y) * lam).sum()
        total.backward()

    found = timed({"tiled": tiled, "passes": passes, "naive": naive_loop}, args.repeats, inner=3)
    return {
        "case": f"MLP 21-256x3, T={tasks}, r={rank}",
        "n": n,
        "M": rays,
        **{f"{k}_ms": v for k, v in found.items()},
        "naive/tiled": found["naive"] / found["tiled"],
        "passes/tiled": found["passes"] / found["tiled"],
    }


def lenet_case(n: int, rays: int, args: Any) -> dict[str, Any]:
    model = palora.inject(LeNet(), 2, rank=1)
    x, a, b = torch.randn(n, 1, 28, 28), torch.randint(10, (n,)), torch.randint(10, (n,))
    lams = palora.simplex_grid(2, rays - 1)

    def losses(out: list[Tensor], *targets: Tensor) -> list[Tensor]:
        return [F.cross_entropy(o, t) for o, t in zip(out, targets, strict=True)]

    def run(chunk: int | None) -> None:
        for p in model.parameters():
            p.grad = None
        palora.step_loss(model, losses, (x, a, b), lams, chunk=chunk).loss.backward()

    found = timed({"tiled": lambda: run(None), "passes": lambda: run(1)}, args.repeats)
    row = {f"{k}_ms": v for k, v in found.items()}
    ratio = found["passes"] / found["tiled"]
    return {"case": "LeNet, T=2, r=1", "n": n, "M": rays, **row, "passes/tiled": ratio}


def main() -> None:
    args = options(__doc__ or "")
    rows = [
        mlp_case(64, 5, 7, 4, args),
        mlp_case(64, 25, 7, 4, args),
        mlp_case(512, 5, 7, 4, args),
        lenet_case(64, 5, args),
    ]
    finish(args, rows)


if __name__ == "__main__":
    main()
