"""Warm starts, rounds of the auction, overhead of the loss, scaling and memory: the targets of the package."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

import deepemd
from deepemd.core.bounds import potentials_from_matching
from deepemd.core.distance import cost_matrix
from deepemd.core.methods import warm_potentials
from deepemd.recipes.evaluate import frozen_set, peak_memory
from deepemd.solvers._auction import solve_auction
from deepemd.solvers._exact import solve_exact


def timed(call: Callable[[], Any], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


def clouds(kind: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(n)
    x = rng.standard_normal((n, 3))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y = rng.standard_normal((n, 3))
    y = (
        y / np.linalg.norm(y, axis=1, keepdims=True)
        if kind == "sphere"
        else rng.uniform(-1, 1, (n, 3))
    )
    return torch.from_numpy(x)[None].float(), torch.from_numpy(y)[None].float()


def warm_start(sizes: list[int], repeats: int) -> None:
    print(
        "| pair | N | SciPy, ms | given optimal potentials | given the network's | network counted | gap |"
    )
    print("|---|---|---|---|---|---|---|")
    for n in sizes:
        for kind in ("sphere", "cube"):
            x, y = clouds(kind, n)
            cost = cdist(x[0].double().numpy(), y[0].double().numpy())
            index = torch.from_numpy(linear_sum_assignment(cost)[1])[None]
            dense = torch.from_numpy(cost)[None]
            best, f, g = potentials_from_matching(dense, index, n + 1)
            learned = [v[0].double().numpy() for v in warm_potentials("tiny", x, y, 1, "pair")]
            bound = learned[0].mean() + learned[1].mean()
            gap = 1 - bound / float(best[0])
            perfect = cost - f[0].numpy()[:, None] - g[0].numpy()[None]
            reduced = cost - learned[0][:, None] - learned[1][None]
            cold = timed(lambda c=cost: linear_sum_assignment(c), repeats)
            given = timed(lambda c=perfect: linear_sum_assignment(c), repeats)
            network = timed(lambda c=reduced: linear_sum_assignment(c), repeats)
            whole = timed(lambda a=x, b=y: deepemd.emd(a, b, method="exact", warm_start="tiny"), 3)
            told = " | ".join(f"{1e3 * t:.1f} ({cold / t:.2f}x)" for t in (given, network, whole))
            print(
                f"| sphere, {kind} | {n} | {1e3 * cold:.1f} | {told} | {100 * gap:.1f} % |",
                flush=True,
            )


def rounds(sizes: list[int]) -> None:
    print(
        "\n| N | ε | rounds from 0 | rounds from the network's potentials | ratio |\n|---|---|---|---|---|"
    )
    for n in sizes:
        test = frozen_set(n, 8)
        for eps in (1e-2, 1e-3):
            cold = solve_auction(test.x, test.y, eps=eps)
            _, g = warm_potentials("tiny", test.x, test.y, 1, "pair")
            warm = solve_auction(test.x, test.y, eps=eps, prices=-g, eps_start=eps)
            ratio = cold.iterations / warm.iterations
            print(
                f"| {n} | {eps} | {cold.iterations} | {warm.iterations} | {ratio:.1f} |", flush=True
            )


def overhead(repeats: int) -> None:
    test = frozen_set(256, 32)
    x = test.x.clone().requires_grad_()

    def raw() -> None:
        cost = cost_matrix(test.x.double(), test.y.double()).numpy()
        for matrix in cost:
            linear_sum_assignment(matrix)

    a = timed(raw, repeats)
    b = timed(lambda: solve_exact(test.x, test.y), repeats)
    c = timed(lambda: deepemd.emd_loss(x, test.y).backward(), repeats)
    print(f"\nN=256, batch 32: raw solver {1e3 * a:.1f} ms, ours without gradient {1e3 * b:.1f} ms, "
          f"emd_loss with backward {1e3 * c:.1f} ms ({100 * (c / a - 1):+.1f} %)")  # fmt: skip


def scaling(sizes: list[int]) -> None:
    print("\n| N | network argmax, ms per pair | peak MB of the process |\n|---|---|---|")
    times = []
    for n in sizes:
        x, y = clouds("cube", n)
        t = timed(lambda a=x, b=y: deepemd.emd(a, b, method="deepemd", decode="argmax"), 3)
        times.append(t)
        print(f"| {n} | {1e3 * t:.1f} | {peak_memory():.0f} |", flush=True)
    slope = np.polyfit(np.log(sizes), np.log(times), 1)[0]
    print(f"log-log slope {slope:.2f}")
    x, y = clouds("cube", 256)
    batch = []
    for k in (4, 16):
        a, b = x.repeat(k, 1, 1), y.repeat(k, 1, 1)
        seconds = timed(partial(deepemd.emd, a, b, method="deepemd", decode="argmax"), 5)
        batch.append(seconds / k)
    print(f"N=256, per pair: batch 4 {1e3 * batch[0]:.2f} ms, batch 16 {1e3 * batch[1]:.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warm_start(args.sizes, args.repeats)
    rounds([64, 256, 512])
    overhead(args.repeats)
    scaling([512, 1024, 2048, 4096, 8192])


if __name__ == "__main__":
    main()
