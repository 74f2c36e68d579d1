"""A timm network, converted in one call and trained beside the plain one: resnet18d on digits of 16x16 pixels."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import timm
import torch
from torch import nn
from torch.nn import functional as F

import lcnn
from lcnn.recipes import data
from lcnn.recipes.train import Recipe, measure, train


def network() -> nn.Module:
    model: nn.Module = timm.create_model("resnet18d", num_classes=10, in_chans=1)
    return model


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--samples", type=int, default=1797, help="of the digits, at most")
    parser.add_argument("--probes", type=int, default=100, help="test digits that are probed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for result.json")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    args = parser.parse_args(argv)

    def say(text: str) -> None:
        if not args.quiet:
            print(text, file=sys.stderr, flush=True)

    split = data.digits(seed=0)
    x, test_x = (F.interpolate(part, size=16, mode="bilinear") for part in (split.x, split.test_x))
    x, y = x[: args.samples], split.y[: args.samples]
    test_x, test_y = test_x[: args.probes], split.test_y[: args.probes]
    result = {}
    for method in ("standard", "lcnn"):
        recipe = Recipe(method, epochs=args.epochs, batch_size=64, lr=0.1, seed=args.seed)
        run = train(network, x, y, recipe, say)
        result[method] = measure(run.model, test_x, test_y, [0.5])
        if method == "lcnn":
            say(str(run.model.lcnn_report))  # the stem's max-pooling stays, and is named
            same = lcnn.restore(run.model)  # an ordinary timm network again
            gap = (same(test_x) - run.model(test_x)).abs().max().item()
            say(f"restored network: outputs differ by {gap:.1e}")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    if args.json:
        print(json.dumps(result))
    else:
        for method, row in result.items():
            print(
                f"{method:9} accuracy {row['accuracy']:.3f}, curvature {row['curvature']:.1f}, Hessian norm "
                f"{row['hessian_norm']:.2f}, gradient norm {row['grad_norm']:.2f}, under attack {row['robust'][0.5]:.3f}"
            )
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # as the figures in the README were made
    sys.exit(main())
