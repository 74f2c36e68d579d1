"""The demo's calorimeter (Pb/PbWO4) over many seeds: how often the loss falls to 0.0015, and what warm start saves.

`python benchmarks/bench_calorimeter.py [--seeds 10] [--first 20]`, one thread; rows are printed as they come.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import demo

from mi_surrogates.simulators import SamplingCalorimeter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=20, help="first seed; the demo has 10 and 11")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    calo = SamplingCalorimeter(["Pb", "PbWO4"] * 3)
    losses: dict[str, list[float]] = {}
    spent: dict[str, list[float]] = {}
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        for name in ("MI-OPT", "RECO-OPT", "MI-OPT short, warm", "MI-OPT short, cold", "CMA-ES"):
            begin = time.process_time()
            if name == "CMA-ES":
                demo.BUDGET, whole = demo.BUDGET // 2, demo.BUDGET
                theta = demo.cma_ksg(calo, seed)
                demo.BUDGET = whole
            else:
                theta = demo.METHODS[name](calo, seed)
            losses.setdefault(name, []).append(calo.judge(theta)[0])
            spent.setdefault(name, []).append(time.process_time() - begin)
            print(f"{seed} {name:20} {losses[name][-1]:.4f} {spent[name][-1]:.1f} s", flush=True)
    print("| method | loss at most 0.0015 | median | largest | CPU s a run |")
    print("|---|---|---|---|---|")
    for name, found in losses.items():
        good = sum(loss <= 0.0015 for loss in found)
        label = f"{name}, half of the events" if name == "CMA-ES" else name
        middle, most, seconds = np.median(found), max(found), np.median(spent[name])
        print(f"| {label} | {good} of {len(found)} | {middle:.4f} | {most:.4f} | {seconds:.1f} |")
    both = zip(losses["MI-OPT short, warm"], losses["MI-OPT short, cold"], strict=True)
    ahead = sum(warm < cold for warm, cold in both)
    print(f"warm ahead of cold on {ahead} of {len(losses['MI-OPT'])} seeds")


if __name__ == "__main__":
    main()
