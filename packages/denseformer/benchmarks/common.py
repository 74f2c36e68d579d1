"""Shared by the benchmarks: options, and the record of where the numbers were made."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_KEEP: list[Any] = []


def mend_torchvision() -> None:
    """The registry's torchvision beside a CPU torch lacks two operators that it wants at import."""
    try:
        lib = torch.library.Library("torchvision", "DEF")
        lib.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        lib.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEEP.append(lib)
    except RuntimeError:
        pass


def options(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--depths", type=int, nargs="+", default=[24, 48, 96, 192])
    parser.add_argument("--compile-to", type=int, default=48, help="largest depth to compile")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    return arguments


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def environment() -> dict[str, Any]:
    names = ("denseformer", "torch", "numpy")
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
        "platform": platform.platform(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "load average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "command": " ".join(Path(a).name if a.endswith(".py") else a for a in sys.argv),
    }


def finish(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Print a table and write the JSON."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    print(" | ".join(keys))
    for row in rows:
        cells = (row.get(key, "") for key in keys)
        print(" | ".join(f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells))
    if arguments.json:
        found = {"rows": rows, "environment": environment()}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
