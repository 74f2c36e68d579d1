"""Constrained optimisation by a Lagrangian: the smallest x with A x = b, as a game of x against the multipliers.

min_x max_m  c |x|^2 / 2 + m'(A x - b) has the solution x = A'(A A')^-1 b. With little curvature c the two
rotate: gradient descent-ascent moves away, and stepping back together every k rounds converges.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

from lookahead_minmax import LookaheadMinmax, spectral

CURVATURE, LR, ROUNDS = 0.001, 0.1, 3000


def solve(a: torch.Tensor, b: torch.Tensor, k: int | None) -> torch.Tensor:
    """Return x after descent-ascent, with lookahead every k rounds or without."""
    x = torch.zeros(a.shape[1], dtype=a.dtype, requires_grad=True)
    multipliers = torch.zeros(a.shape[0], dtype=a.dtype, requires_grad=True)
    players = {
        "x": torch.optim.SGD([x], lr=LR),
        "multipliers": torch.optim.SGD([multipliers], lr=LR, maximize=True),
    }
    la = None if k is None else LookaheadMinmax(players, k=k)
    for _ in range(ROUNDS):
        for optimizer in players.values():
            optimizer.zero_grad()
        (CURVATURE * x.square().sum() / 2 + multipliers @ (a @ x - b)).backward()
        for optimizer in players.values():
            optimizer.step()
        if la is not None:
            la.step()
    return x.detach()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of A and b")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    generator = torch.Generator().manual_seed(args.seed)
    a, b = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((3, 6), (3,)))
    solution = a.T @ torch.linalg.solve(a @ a.T, b)
    sigma = torch.linalg.svdvals(a)
    k = spectral.suggest_k(LR, float(sigma.min()), float(sigma.max())).k
    plain, ours = (float((solve(a, b, period) - solution).norm()) for period in (None, k))
    if args.json:
        print(json.dumps({"k": k, "plain": plain, "lookahead": ours}))
    else:
        print(
            f"distance to the closed form: descent-ascent {plain:.2g}, with lookahead (k = {k}) {ours:.2g}"
        )
    return int(not ours < 1e-4 < plain)


if __name__ == "__main__":
    sys.exit(main())
