"""Error against time of every method and peer, at N = 128 .. 4096, in one process; writes JSON and figures.

Rows that an earlier run left in the folder are kept unless they are measured again (``--methods``).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from deepemd.recipes.frontier import frontier, plot_frontier
from deepemd.solvers._exact import installed


def environment() -> dict[str, object]:
    names = {}
    for name in ("torch", "numpy", "scipy", "POT", "lapx", "geomloss"):
        try:
            names[name] = version(name)
        except PackageNotFoundError:
            names[name] = "absent"
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), cpu)
    return {
        "python": platform.python_version(), **names, "processor": cpu,
        "threads": torch.get_num_threads(), "command": " ".join(["python", *sys.argv]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=20.0, help="seconds per figure")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--peers", nargs="*", help="of pot, pot-batch, lapx, geomloss (all)")
    parser.add_argument("--out", default="build/frontier")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    libraries = {"pot": "ot", "pot-batch": "ot", "lapx": "lap", "geomloss": "geomloss"}
    peers = [
        name
        for name in (libraries if args.peers is None else args.peers)
        if installed(libraries[name])
    ]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    found = out / "frontier.json"
    rows = json.loads(found.read_text(encoding="utf-8"))["rows"] if found.exists() else []
    for n in args.sizes:
        new = frontier(
            (n,), pairs=args.pairs, repeats=args.repeats, limit=args.limit, methods=args.methods, third_party=peers,
            progress=True,
        )  # fmt: skip
        keys = {(row["n"], row["method"], row["setting"]) for row in new}
        rows = [r for r in rows if (r["n"], r["method"], r["setting"]) not in keys] + new
        data = {"rows": rows, "environment": environment()}
        found.write_text(json.dumps(data, indent=1), encoding="utf-8")
    for row in sorted(rows, key=lambda row: row["n"]):
        cosine = row["gradient_cosine"]
        print(
            f"| {row['n']} | {row['method']} | {row['setting']} | {row['ms_per_pair']:.2f} | "
            f"{100 * row['rel_err']:.2f} % | {'–' if cosine is None else f'{cosine:.3f}'} |"
        )
    if installed("matplotlib"):
        from matplotlib.figure import Figure

        shown = [n for n in (128, 1024) if n in args.sizes] or args.sizes[:1]
        figure = Figure(figsize=(5.2 * len(shown), 4.4), layout="constrained")
        axes = figure.subplots(1, len(shown), squeeze=False)[0]
        for ax, n in zip(axes, shown, strict=True):
            plot_frontier(rows, n, ax)
        axes[-1].legend(fontsize="xx-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(out / "frontier.png", dpi=130)


if __name__ == "__main__":
    main()
