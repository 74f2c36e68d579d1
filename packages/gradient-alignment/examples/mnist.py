"""The longer example: MNIST's test images, 8,000 to train and 2,000 to test, four models, one seed.

    python examples/mnist.py --data-dir DIR [--epochs 5] [--out FILE.json]

The files are looked for in DIR, DIR/mnist-test and DIR/mnist, and downloaded if they are not there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gradient_alignment.recipes.data import load
from gradient_alignment.recipes.evaluate import evaluate, svm_judge
from gradient_alignment.recipes.train import Config, train

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "baseline": ("none", {}),
    "gradient norm": ("gradient-norm", {"weight": 1e-2}),
    "score matching, published estimator": ("score", {"weight": 1e-3, "estimator": "taylor"}),
    "score matching, control variate": ("score", {"weight": 1e-3}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = load("mnist-test", args.data_dir)
    judge = svm_judge(data)
    verdict = judge(data.test_x) == data.test_y
    print(f"accuracy of the judge: {verdict.double().mean():.4f}", flush=True)
    rows: dict[str, Any] = {}
    for name in args.only:
        start = time.perf_counter()
        regularizer, options = MODELS[name]
        config = Config(
            regularizer=regularizer, options=options, epochs=args.epochs, seed=args.seed
        )
        trained = train(
            data, config, lambda epoch, loss: print(f"  epoch {epoch}: {loss:.3f}", file=sys.stderr)
        )
        found = evaluate(
            trained.model, data, judge, num_samples=100, steps=300, num_images=100, seed=args.seed
        )
        rows[name] = {**found.summary(), "train_seconds": round(trained.seconds, 1)}
        print(
            f"{name}: accuracy {found.accuracy:.4f}, GAN-test {found.gan_test:.2f}, nearest "
            f"{found.distance:.2f}, cosine {found.alignment:.2f}, trace {found.trace:.0f}, "
            f"gradient {found.gradient:.2f}, lerf {found.lerf.auc:.3f}; "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
