"""How costs grow: steps with P, penalties with T, memories with M, evaluation with T, checkpoints with bytes.

Each table ends with the slope of log(cost) over log(size): 1 is linear, 0 is flat. Processor time, interleaved
repeats, medians; checkpoints in wall time, since the disk's time is no processor's.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sequel
from sequel import checkpoint, scenarios

BATCH, N, REPEATS = 32, 640, 7
Case = Callable[[], object]


def medians(cases: dict[int, Case], clock: Callable[[], float]) -> dict[int, float]:
    times: dict[int, list[float]] = {size: [] for size in cases}
    for case in cases.values():
        case()
    for _ in range(REPEATS):
        for size, case in cases.items():
            start = clock()
            case()
            times[size].append(clock() - start)
    return {size: float(np.median(values)) for size, values in times.items()}


def slope(found: dict[int, float]) -> float:
    x, y = np.log(list(found)), np.log(list(found.values()))
    return float(np.polyfit(x, y, 1)[0])


def data(features: int = 64, rows: int = N) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((rows, features), dtype=np.float32), rng.integers(0, 10, rows)
    return x, y, x[:500], y[:500]


def learner(algorithm: Any, width: int = 64, tasks: int = 2, consolidated: int = 1) -> Any:
    torch.manual_seed(0)
    net = sequel.nn.MLP(64, (width, width), 10)
    made = sequel.Learner(net, torch.optim.SGD(net.parameters(), 0.01), algorithm, batch_size=BATCH)
    made.setup(scenarios.permuted(data(), tasks))
    for _ in range(consolidated):
        made.backend.hook("on_task_end", 0, made.tools)
    return made


def epoch(made: Any) -> Case:
    made.start_task(1)
    part, count = made.scenario[1].train, [0]
    made.backend.load(part, N)

    def run() -> None:
        count[0] += 1
        made.position = {"task": 1, "epoch": 0, "step": 0}
        made._epoch(part, 1, count[0], 10**6)

    return run


def steps_over_p() -> dict[str, dict[int, float]]:
    out = {}
    for name, algorithm in (("naive", sequel.Naive()), ("EWC", sequel.EWC()), ("SI", sequel.SI())):
        cases = {}
        for width in (256, 512, 1024, 2048):
            made = learner(algorithm, width)
            size = sum(p.numel() for p in made.backend.params.values())
            cases[size] = epoch(made)
        found = medians(cases, time.process_time)
        out[f"{name}: step over parameters, us"] = {
            k: 1e6 * v * BATCH / N for k, v in found.items()
        }
    return out


def penalty_over_t() -> dict[str, dict[int, float]]:
    cases = {t: epoch(learner(sequel.EWC(), 256, consolidated=t)) for t in (1, 5, 20, 50)}
    found = medians(cases, time.process_time)
    return {"EWC: step over tasks, us": {t: 1e6 * v * BATCH / N for t, v in found.items()}}


def memory_over_m() -> dict[str, dict[int, float]]:
    x, y = torch.zeros(100, 64), torch.zeros(100, dtype=torch.int64)
    out: dict[str, dict[int, float]] = {}
    for what in ("add", "sample"):
        cases: dict[int, Case] = {}
        for m in (1_000, 10_000, 100_000):
            buffer = sequel.ReplayBuffer(m)
            for _ in range(m // 100):
                buffer.add(x=x, y=y)
            if what == "add":
                cases[m] = lambda b=buffer: [b.add(x=x, y=y) for _ in range(50)]  # type: ignore[misc]
            else:
                cases[m] = lambda b=buffer: [b.sample(32) for _ in range(50)]  # type: ignore[misc]
        found = medians(cases, time.process_time)
        out[f"memory: {what} over capacity, us"] = {m: 1e6 * v / 50 for m, v in found.items()}
    return out


def evaluation_over_t() -> dict[str, dict[int, float]]:
    cases: dict[int, Case] = {}
    for tasks in (5, 20, 80):
        made = learner(sequel.Naive(), 256, tasks, consolidated=0)
        made.evaluate()  # makes and keeps the test sets
        cases[tasks] = made.evaluate
    found = medians(cases, time.process_time)
    return {"evaluation over tasks, us": {t: 1e6 * v for t, v in found.items()}}


def checkpoints(folder: Path) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    def plain(path: Path, parts: list[bytes]) -> None:
        with path.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())

    ours: dict[int, Case] = {}
    theirs: dict[int, Case] = {}
    sizes = {}
    for width in (256, 1024, 2048):
        made = learner(sequel.EWC(), width)
        tree, header = made.state_dict()
        flat = list(checkpoint._flat(tree).values())
        size = sum(a.nbytes for a in flat)
        path = folder / f"{width}.safetensors"
        checkpoint.write(path, tree, header)
        sizes[size] = path.stat().st_size / size
        raw = path.read_bytes()
        ours[size] = lambda m=made, p=path: m.save(p)  # type: ignore[misc]
        theirs[size] = lambda p=folder / "plain", r=raw: plain(p, [r])  # type: ignore[misc]
    mine, floor = medians(ours, time.perf_counter), medians(theirs, time.perf_counter)
    last = max(mine)
    facts = {
        "bytes of the file over bytes of its tensors": max(sizes.values()),
        "write bandwidth over that of write and fsync": floor[last] / mine[last],
    }
    torch.manual_seed(0)
    made = learner(sequel.EWC(), 256, consolidated=1)
    run = epoch(made)
    run()
    start = time.perf_counter()
    for _ in range(10):
        run()
    step = (time.perf_counter() - start) / 10 * BATCH / N
    path = folder / "run.safetensors"
    start = time.perf_counter()
    for _ in range(5):
        made.save(path)
    facts["share of the run at every 200 steps"] = (time.perf_counter() - start) / 5 / (200 * step)
    return {"checkpoint over bytes, us": {b: 1e6 * s for b, s in mine.items()}}, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE", help="log-log curves")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        curves, facts = checkpoints(Path(folder))
    tables = {
        **steps_over_p(), **penalty_over_t(), **memory_over_m(), **evaluation_over_t(), **curves,
    }  # fmt: skip
    for name, found in tables.items():
        row = ", ".join(f"{size:,}: {cost:,.0f}" for size, cost in found.items())
        print(f"{name:38} slope {slope(found):5.2f}   {row}")
    for name, value in facts.items():
        print(f"{name}: {value:.3f}")
    if args.json:
        Path(args.json).write_text(json.dumps({"tables": tables, "facts": facts}, indent=1) + "\n")
    if args.plot:
        import matplotlib as mpl

        mpl.use("agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
        for name, found in tables.items():
            axes.loglog(
                list(found), list(found.values()), "o-", label=f"{name} ({slope(found):.2f})"
            )
        axes.set(xlabel="parameters, tasks, capacity or bytes", ylabel="microseconds")
        axes.legend(fontsize=7)
        figure.savefig(args.plot)


if __name__ == "__main__":
    main()
