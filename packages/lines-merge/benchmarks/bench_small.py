"""The small costs: importing, reading the depth of 100,000 names, a grid point of the tuning loop."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from checkpoints import environment

import lines_merge as lm


def seconds(code: str) -> float:
    """Return the median over five processes of the seconds that `code` prints."""
    command = [sys.executable, "-c", code]
    return median(float(subprocess.check_output(command, text=True)) for _ in range(5))


IMPORT = """
import time, torch, numpy
start = time.perf_counter()
import lines_merge
print(time.perf_counter() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = {"import beyond torch, s (target 0.3)": seconds(IMPORT)}

    names = [f"model.layers.{i}.block.{j}.weight" for i in range(1000) for j in range(100)]
    times = []
    for _ in range(5):
        start = time.perf_counter()
        lm.DepthMap.from_names(names)
        times.append(time.perf_counter() - start)
    rows["DepthMap of 100,000 names, s (target 0.5)"] = median(times)

    base = {f"blocks.{i}.weight": torch.randn(1024, 1024) for i in range(24)}
    tuned = {name: value + 0.01 * torch.randn_like(value) for name, value in base.items()}
    model = torch.nn.ParameterDict({name.replace(".", "_"): v.clone() for name, v in base.items()})
    live = list(model.parameters())
    copies = [value.detach().clone() for value in live]
    tuner = lm.Tuner(base, lm.TaskVector(base, tuned), dict(zip(base, live, strict=True)))
    grid_point, floor = [], []
    for index in range(21):
        start = time.perf_counter()
        tuner.set(alpha=0.1, beta=index / 20)
        grid_point.append(time.perf_counter() - start)
        start = time.perf_counter()
        with torch.no_grad():
            torch._foreach_copy_(live, copies)
        floor.append(time.perf_counter() - start)
    rows["grid point over one read and write (target 1.2)"] = median(grid_point) / median(floor)

    for name, value in rows.items():
        print(f"{name:50} {value:.3f}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"rows": rows, "environment": environment()}, indent=1)
        )


if __name__ == "__main__":
    main()
