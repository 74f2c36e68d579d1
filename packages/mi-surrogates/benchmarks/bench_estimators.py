"""KSG against scikit-learn and the definition; batched critics against a loop; overhead; the calorimeter.

`python benchmarks/bench_estimators.py [--json] [--repeats 7]`, one thread, medians of processor time; what the
loop waits for the checkpoint's files is measured by the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.special import digamma
from sklearn.feature_selection import mutual_info_regression

from mi_surrogates import DesignSpace, MIObjective, Optimizer, Parameter, optimize
from mi_surrogates.information import ksg
from mi_surrogates.information.networks import JointCritic
from mi_surrogates.loop.history import Iteration
from mi_surrogates.loop.store import Store
from mi_surrogates.simulators import SamplingCalorimeter


def medians(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Interleaved medians in seconds of processor time."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            times[name].append(time.process_time() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def brute(x: np.ndarray, y: np.ndarray, k: int = 3) -> float:
    """The definition with all N x N distances."""
    x, y = ((v - v.mean(0)) / v.std(0) for v in (x, y))
    dx, dy = (np.abs(v[:, None] - v[None]).max(-1) for v in (x, y))
    joint = np.maximum(dx, dy)
    radius = np.sort(joint, 1)[:, k]
    nx, ny = ((d < radius[:, None]).sum(1) - 1 for d in (dx, dy))
    return float(digamma(k) + digamma(len(x)) - (digamma(nx + 1) + digamma(ny + 1)).mean())


def data(n: int, dy: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, generator=g, dtype=torch.float64)
    return x, x + 0.5 * torch.randn(n, dy, generator=g, dtype=torch.float64)


def critic_steps(groups: int, *, batched: bool) -> Callable[[], None]:
    """One DV training step of M critics, hidden 64, batch 256, as one network or one after the other."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(groups, 256, 1, generator=g), torch.randn(groups, 256, 3, generator=g)
    nets = [
        JointCritic(1, 3, groups=groups if batched else 1) for _ in range(1 if batched else groups)
    ]
    adams = [torch.optim.Adam(net.parameters(), 1e-3, fused=True) for net in nets]

    def run() -> None:
        for i, (net, adam) in enumerate(zip(nets, adams, strict=True)):
            a, b = (x, y) if batched else (x[i : i + 1], y[i : i + 1])
            neg = net(a, b.roll(1, 1))
            loss = (torch.logsumexp(neg, 1) - net(a, b).mean(1)).sum()
            adam.zero_grad()
            loss.backward()
            adam.step()

    return run


class Spent:
    """Seconds inside a method, summed."""

    def __init__(self, owner: type, names: tuple[str, ...], clock: Callable[[], float]) -> None:
        self.calls: list[float] = []
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name), clock))

    def _timed(self, method: Callable[..., Any], clock: Callable[[], float]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begin = clock()
            found = method(*args)
            self.calls.append(clock() - begin)
            return found

        return timed


def checkpoint_share(calo: SamplingCalorimeter) -> dict[str, float]:
    """What the loop waits for its store in an iteration with learning, and its share."""
    waits, marks = Spent(Store, ("save_events", "save_state"), time.perf_counter), []
    rows: list[tuple[float, float]] = []

    def mark(record: Iteration) -> None:
        marks.append(time.perf_counter())
        if record.index:
            rows.append((sum(waits.calls), marks[-1] - marks[-2]))
        waits.calls.clear()

    for _ in range(3):
        space = DesignSpace({n: Parameter(20, 0.05, 100, sigma=3) for n in calo.names})
        with tempfile.TemporaryDirectory() as folder:
            options: dict[str, Any] = {"surrogate": "quadratic", "progress": False}
            optimize(
                calo, space, "mi", iterations=8, checkpoint=folder, callbacks=[mark], **options
            )
    wait, whole = np.median(rows, 0)
    return {
        "waits, seconds": float(wait),
        "iteration, seconds": float(whole),
        "share": wait / whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out: dict[str, Any] = {}

    x1, y1 = data(4000, 1)
    x3, y3 = data(4000, 3)
    out["ksg seconds, N = 4000"] = medians(
        {
            "ours, 1-D": lambda: ksg(x1, y1),
            "scikit-learn, 1-D": lambda: mutual_info_regression(x1.numpy(), y1[:, 0].numpy()),
            "ours, 3-D": lambda: ksg(x3, y3),
            "definition in NumPy, 3-D": lambda: brute(x3.numpy(), y3.numpy()),
        },
        arguments.repeats,
    )
    out["ksg minus definition"] = abs(ksg(x3, y3).item() - brute(x3.numpy(), y3.numpy()))

    steps = {}
    for m in (20, 100):
        steps[f"batched, M = {m}"] = critic_steps(m, batched=True)
        steps[f"loop, M = {m}"] = critic_steps(m, batched=False)
    out["critic step seconds"] = medians(steps, arguments.repeats)

    calo = SamplingCalorimeter(["Pb", "PbWO4"] * 3)
    theta = np.array([10.0, 20.0] * 3)
    both = medians(
        {
            "NumPy": lambda: calo(theta, 100_000, 0),
            "torch": lambda: calo.torch_events(theta, 100_000),
        },
        arguments.repeats,
    )
    out["calorimeter events per second"] = {k: 100_000 / v for k, v in both.items()}

    overhead, steps_taken = {}, Spent(Optimizer, ("step",), time.process_time)
    for objective in ("mi", "reco", "ksg"):
        for surrogate in ("quadratic", "ensemble"):
            space = DesignSpace({n: Parameter(20, 0.05, 100, sigma=3) for n in calo.names})
            chosen = MIObjective("ksg") if objective == "ksg" else objective
            steps_taken.calls.clear()
            optimize(calo, space, chosen, surrogate=surrogate, iterations=8, progress=False)
            overhead[f"{objective}, {surrogate}"] = statistics.median(steps_taken.calls[1:])
    out["iteration overhead seconds, M = 20, N = 400"] = overhead

    out["checkpoint"] = checkpoint_share(calo)

    out["environment"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": 1,
        "cores": os.cpu_count(),
        "command": "python benchmarks/bench_estimators.py " + " ".join(sys.argv[1:]),
    }
    if arguments.json:
        print(json.dumps(out, indent=1))
        return
    for name, value in out.items():
        if isinstance(value, dict):
            print(name)
            for key, each in value.items():
                print(
                    f"    {key:28} {each:.4g}" if isinstance(each, float) else f"    {key}: {each}"
                )
        else:
            print(f"{name}: {value:.3g}")


if __name__ == "__main__":
    main()
