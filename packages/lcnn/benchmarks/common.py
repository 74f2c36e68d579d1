"""Shared by the benchmarks: interleaved timing and the record of the environment."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch


def options(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=128, help="of bench_step.py")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return args


def timed(cases: dict[str, Callable[[], Any]], repeats: int, warm: int = 2) -> dict[str, float]:
    """Milliseconds of processor time a call: the median over interleaved repeats, after a warm-up.

    Processor time, not wall time: the machine is shared.
    """
    for run in cases.values():
        for _ in range(warm):
            run()
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, run in cases.items():
            start = time.process_time()
            run()
            found[name].append((time.process_time() - start) * 1e3)
    return {name: median(values) for name, values in found.items()}


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def report(title: str, times: dict[str, float], base: str, args: argparse.Namespace) -> None:
    print(f"\n{title} (medians of {args.repeats}, {args.threads} thread)", flush=True)
    for name, value in times.items():
        print(f"  {name:32} {value:9.2f} ms   {value / times[base]:6.2f} x", flush=True)


def save(args: argparse.Namespace, data: dict[str, Any]) -> None:
    data["environment"] = {
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": args.threads,
    }
    print(json.dumps(data["environment"]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(data, indent=1))
