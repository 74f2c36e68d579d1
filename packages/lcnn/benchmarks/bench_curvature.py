"""Hessian-vector products for 1 % error: Lanczos against power iteration, on trained networks."""

from __future__ import annotations

import torch
from common import options, save

import lcnn
from lcnn.recipes import data, models
from lcnn.recipes.train import Recipe, train


def main() -> None:
    args = options(__doc__ or "")
    d = data.digits(0)
    x, y = d.test_x[:100], d.test_y[:100]
    rows = {}
    for method in ("standard", "lcnn"):
        run = train(models.digits_net, d.x, d.y, Recipe(method, epochs=5, batch_size=64))
        exact = lcnn.curvature(run.model, x, y, method="exact").hessian_norm
        counts: dict[str, int | None] = {}
        for name in ("power", "lanczos"):
            counts[name] = None
            for iters in [*range(1, 20), *range(20, 64, 4), *range(64, 400, 16)]:
                found = lcnn.curvature(run.model, x, y, method=name, iters=iters).hessian_norm
                mean_error = ((found - exact).abs() / exact).mean().item()
                if mean_error <= 0.01:
                    counts[name] = iters
                    break
        rows[method] = counts
        print(f"{method}: products for a mean error of 1 %: {counts}", flush=True)
    torch.manual_seed(0)
    save(args, {"products": rows})


if __name__ == "__main__":
    main()
