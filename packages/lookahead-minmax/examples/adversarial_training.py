"""Adversarial training as a game: a network against one perturbation for every training image.

min_w max_d  mean_i loss(w, x_i + d_i) with |d_i| <= radius in every pixel. The perturbations are a player that persists
over the run, moved by signed gradients and clipped to their box in each round; the box is convex, so stepping back
with lookahead stays inside it. Judged on unseen digits, clean and under projected gradient attacks.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lookahead_minmax import LookaheadMinmax
from lookahead_minmax.gan import data
from lookahead_minmax.gan.models import mlp

TRAINED = 1200


def attack(network: nn.Module, x: Tensor, y: Tensor, radius: float, steps: int = 20) -> Tensor:
    """Return x moved by signed gradient steps within the box of the radius and of the pixels."""
    moved = x.clone()
    for _ in range(steps):
        moved.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(moved), y), moved)
        moved = moved.detach() + 2.5 * radius / steps * gradient.sign()
        moved = torch.clamp(moved, x - radius, x + radius).clamp(-1, 1)
    return moved


def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((network(x).argmax(1) == y).double().mean())


def train(x: Tensor, y: Tensor, args: argparse.Namespace, k: int) -> nn.Module:
    """Play the game in minibatches, with lookahead every k rounds or (k = 0) without."""
    torch.manual_seed(args.seed)
    network = mlp(x.shape[1], 128, 128, 10)
    perturbations = nn.Parameter(torch.zeros_like(x))
    players: dict[str, torch.optim.Optimizer] = {
        "network": torch.optim.Adam(network.parameters(), lr=1e-3),
        "perturbations": torch.optim.SGD([perturbations], lr=args.radius / 4, maximize=True),
    }
    la = LookaheadMinmax(players, k=k) if k else None
    for step in range(args.rounds):
        rows = torch.randint(len(x), (args.batch_size,))
        for optimizer in players.values():
            optimizer.zero_grad()
        F.cross_entropy(network(x[rows] + perturbations[rows]), y[rows]).backward()
        assert perturbations.grad is not None
        perturbations.grad.sign_()  # images outside the batch have gradient 0 and stay
        for optimizer in players.values():
            optimizer.step()
        with torch.no_grad():
            perturbations.clamp_(-args.radius, args.radius)
        if la is not None:
            la.step()
        if not args.quiet and (step + 1) % max(1, args.rounds // 4) == 0:
            print(f"k={k}: round {step + 1}/{args.rounds}", file=sys.stderr, flush=True)
    return network


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST's .gz files")
    parser.add_argument("--rounds", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--radius", type=float, default=0.3, help="pixels are in [-1, 1]")
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for result.json")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    args = parser.parse_args(argv)
    if args.data_dir is None:
        images, labels = data.digits()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        kept, unseen = order[:TRAINED], order[TRAINED:]
        x, y, test_x, test_y = images[kept], labels[kept], images[unseen], labels[unseen]
    else:
        x, y = data.mnist(args.data_dir, train=True)
        test_x, test_y = data.mnist(args.data_dir)
        x, test_x = x.flatten(1), test_x.flatten(1)
    result: dict[str, Any] = {}
    plain = argparse.Namespace(**{**vars(args), "radius": 0.0})
    runs = {"no perturbations": (plain, 0), "without lookahead": (args, 0)}
    runs[f"lookahead, k = {args.k}"] = (args, args.k)
    for name, (settings, k) in runs.items():
        network = train(x, y, settings, k)
        attacked = attack(network, test_x, test_y, args.radius)
        result[name] = {
            "clean": accuracy(network, test_x, test_y),
            "attacked": accuracy(network, attacked, test_y),
        }
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    if args.json:
        print(json.dumps(result))
    else:
        for name, row in result.items():
            print(f"{name:20} clean {row['clean']:.1%}, attacked {row['attacked']:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
