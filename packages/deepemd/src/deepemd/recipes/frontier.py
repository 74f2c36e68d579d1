"""Error against time of every method, on one set of pairs: the curve, never a single ratio (spec 6)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepemd.api import emd
from deepemd.core.model import DeepEMD
from deepemd.metrics import gradient_cosine, relative_error
from deepemd.recipes.evaluate import TestSet, exact_gradient, frozen_set

Curve = dict[str, list[dict[str, Any]]]


def settings(model: DeepEMD | str | None = None) -> Curve:
    """Return the methods and, for each, its settings from coarse to fine: keywords of ``match``."""
    network = {"method": "deepemd", "model": model}
    return {
        "exact (SciPy)": [{"method": "exact"}],
        "exact, warm start counted": [{"method": "exact", "warm_start": model or "tiny"}],
        "auction": [{"method": "auction", "eps": eps} for eps in (0.1, 0.02, 0.004, 0.0008)],
        "sinkhorn": [
            {"method": "sinkhorn", "reg": reg, "n_iter": n, "tol": 1e-3}
            for reg, n in ((0.2, 25), (0.05, 50), (0.02, 100), (0.01, 300))
        ],
        "chamfer (half-sum)": [{"method": "chamfer", "mean_of_two": True}],
        "sliced": [{"method": "sliced", "n_proj": n} for n in (32, 128)],
        "approxmatch": [{"method": "approxmatch", "total": False}],
        "network, argmax": [network | {"decode": "argmax"}],
        "network, sinkhorn": [network | {"decode": "sinkhorn"}],
        "network, round": [network | {"decode": "round"}],
        "network, refine": [network | {"decode": "refine", "rtol": r} for r in (0.05, 0.01)],
    }


def _shown(options: dict[str, Any]) -> str:
    keys = ("eps", "reg", "n_iter", "n_proj", "rtol")
    return ", ".join(f"{key}={options[key]}" for key in keys if key in options)


def timed(call: Callable[[], Any], repeats: int, limit: float = 20.0) -> tuple[Any, float]:
    """Return the result of a call and the median seconds of up to ``repeats`` more, within ``limit``."""
    began = time.perf_counter()
    result = call()
    first = time.perf_counter() - began
    times: list[float] = []
    while len(times) < repeats and (not times or time.perf_counter() - began < limit):
        if not times and first > limit:
            return result, first
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return result, float(np.median(times))


def peers(test: TestSet, names: Sequence[str]) -> list[tuple[str, Callable[[], Tensor]]]:
    """Return third-party calls on the same pairs, those whose library is installed (extra ``bench``)."""
    calls: list[tuple[str, Callable[[], Tensor]]] = []
    if "pot" in names:
        import ot

        def network_simplex() -> Tensor:
            values = []
            for x, y in zip(test.x.numpy(), test.y.numpy(), strict=True):
                cost = ot.dist(x.astype(np.float64), y.astype(np.float64), metric="euclidean")
                values.append(float(ot.emd2([], [], cost, numItermax=10_000_000)))
            return torch.tensor(values)

        calls.append(("POT emd2 (exact)", network_simplex))
    if "pot-batch" in names:
        import ot

        if hasattr(ot, "batch"):
            for n_iter in (20, 200):

                def batched(n_iter: int = n_iter) -> Tensor:
                    cost = torch.cdist(test.x, test.y)
                    n = cost.shape[1]
                    even = torch.full((len(cost), n), 1 / n)
                    found = ot.batch.solve_batch(
                        cost, 0.02 * float(cost.mean()), even, even, max_iter=n_iter, tol=1e-4
                    )
                    sharp: Tensor = (found.plan * cost).sum((1, 2))
                    return sharp

                calls.append((f"POT solve_batch ({n_iter})", batched))
    if "lapx" in names:
        import lap

        def jonker() -> Tensor:
            values = []
            for cost in torch.cdist(test.x.double(), test.y.double()).numpy():
                values.append(lap.lapjv(cost)[0] / len(cost))
            return torch.tensor(values)

        calls.append(("lapx lapjv (exact)", jonker))
    if "geomloss" in names:
        import geomloss

        for blur, scaling in ((0.05, 0.5), (0.01, 0.9)):
            loss = geomloss.SamplesLoss(
                "sinkhorn", p=1, blur=blur, scaling=scaling, debias=False, backend="tensorized"
            )
            name = f"geomloss (blur {blur}, scaling {scaling})"
            calls.append((name, partial(loss, test.x, test.y)))
    return calls


def frontier(
    sizes: Sequence[int] = (128, 256, 512, 1024),
    *,
    pairs: int = 8,
    repeats: int = 5,
    limit: float = 20.0,
    model: DeepEMD | str | None = None,
    methods: Sequence[str] | None = None,
    third_party: Sequence[str] = (),
    device: str = "cpu",
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Measure every method and setting on frozen pairs of each size.

    Args:
        sizes: values of N.
        pairs: pairs per size, fewer beyond N = 512.
        repeats: calls per figure, whose median counts; slow ones are called once.
        limit: seconds after which no further call is made.
        model: the network (default the bundled one).
        methods: only those whose name starts with one of these.
        third_party: of ``"pot"``, ``"pot-batch"``, ``"lapx"``, ``"geomloss"``.
        device: where to run.
        progress: a line per figure on stderr.

    Returns:
        One row per size, method and setting: ``ms_per_pair``, ``rel_err``, ``gradient_cosine``.
    """
    rows: list[dict[str, Any]] = []
    for n in sizes:
        count = max(min(pairs, 4096 // n), 1)
        test = frozen_set(n, count)
        x, y = test.x.to(device), test.y.to(device)
        gradient = exact_gradient(test)
        jobs: list[tuple[str, dict[str, Any] | None, Callable[[], Tensor]]] = []
        for name, choices in settings(model).items():
            if methods is None or name.startswith(tuple(methods)):
                jobs += [(name, options, partial(emd, x, y, **options)) for options in choices]
        jobs += [(name, None, call) for name, call in peers(test, third_party)]
        for name, options, call in jobs:
            value, seconds = timed(call, repeats, limit)
            error = relative_error(value.detach().cpu().double(), test.distance).mean()
            row = {
                "n": n, "pairs": count, "method": name, "setting": _shown(options or {}),
                "ms_per_pair": 1e3 * seconds / count, "rel_err": float(error),
                "gradient_cosine": None,
            }  # fmt: skip
            if options is not None:
                leaf = x.clone().requires_grad_()
                (found,) = torch.autograd.grad(emd(leaf, y, **options).sum(), leaf)
                row["gradient_cosine"] = float(gradient_cosine(found.cpu(), gradient).mean())
            rows.append(row)
            if progress:
                told = f"{row['ms_per_pair']:.2f} ms, {100 * float(error):.2f} %"
                print(f"N={n} {name} {row['setting']}: {told}", file=sys.stderr)
    return rows


def plot_frontier(rows: Sequence[dict[str, Any]], n: int, ax: Any = None) -> Any:
    """Draw error against time for one N on the given axes (matplotlib's current ones); returns them."""
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.gca()
    names = dict.fromkeys(row["method"] for row in rows if row["n"] == n)
    for k, name in enumerate(names):
        chosen = [row for row in rows if row["n"] == n and row["method"] == name]
        times = [row["ms_per_pair"] for row in chosen]
        errors = [max(100 * row["rel_err"], 1e-2) for row in chosen]
        ax.plot(times, errors, "osD^v<>"[k % 7] + "-", color=f"C{k % 10}", label=name, ms=4)
    ax.set(
        xscale="log", yscale="log", xlabel="ms per pair", ylabel="relative error, % (floor 0.01)"
    )
    ax.set_title(f"N = {n}")
    return ax
