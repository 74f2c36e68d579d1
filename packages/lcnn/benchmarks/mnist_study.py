"""Eight rows of the comparison at equal processor time, on MNIST's test images (8,000 train, 2,000 test).

python benchmarks/mnist_study.py --data-dir DIR --seconds 60 --json FILE

The folder holds MNIST's two files t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch

from lcnn.recipes import data
from lcnn.recipes.methods import METHODS
from lcnn.recipes.models import small_cnn
from lcnn.recipes.train import Recipe, betas, measure, train

# weights of the batch size and the images at hand, one choice for all seeds, not searched
OVERRIDES = {
    "gradreg": {"gradnorm": 0.05},
    "lcnn+gradreg": {"gradnorm": 0.05},
    "minimal": {"gradnorm": 0.05},
    "cure": {"cure": 0.02},
}
ROWS = ["standard", "lcnn", "gradreg", "lcnn+gradreg", "cure", "softplus", "minimal", "adversarial"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", nargs="*", default=ROWS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(args.seeds):
        d = data.load("mnist-test", args.data_dir, seed)
        for method in args.methods:
            recipe = Recipe(
                method,
                epochs=1000,
                batch_size=64,
                lr=0.05,
                seed=seed,
                seconds=args.seconds,
                overrides=OVERRIDES.get(method),
                radius=1.0 if method == "adversarial" else None,
            )
            run = train(small_cnn, d.x, d.y, recipe)
            found = measure(run.model, d.test_x[:500], d.test_y[:500], iters=10)
            robust = measure(run.model, d.test_x[:500], d.test_y[:500], [0.5, 1.0, 1.5], iters=1)
            with torch.no_grad():
                right = run.model(d.test_x).argmax(1) == d.test_y
            found |= {
                "method": METHODS[method].title,
                "seed": seed,
                "accuracy": right.float().mean().item(),
                "robust": robust["robust"],
                "epochs": run.epochs,
                "seconds": run.seconds,
                "betas": betas(run.model),
            }
            rows.append(found)
            print(json.dumps(found), flush=True)
    if args.json:
        environment = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": 1,
        }
        args.json.write_text(json.dumps({"rows": rows, "environment": environment}, indent=1))


if __name__ == "__main__":
    main()
