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
        counts: dict[str, int] = {}
        for name in ("power", "lanczos"):
            for iters in [*range(1, 20), *range(20, 64, 4), *range(64, 400, 16)]:
                found = lcnn.curvature(run.model, x, y, method=name, iters=iters).hessian_norm
                error = (found - exact).abs() / exact
                if error.mean() <= 0.01:
                    counts.setdefault(f"{name}, mean", iters)
                if error.max() <= 0.01:
                    counts[f"{name}, every sample"] = iters
                    break
        rows[method] = counts
        print(f"{method}: products for an error of 1 %: {counts}", flush=True)
    torch.manual_seed(0)
    save(args, {"products": rows})


if __name__ == "__main__":
    main()
