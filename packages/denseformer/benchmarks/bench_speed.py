"""Time of the averages, forward and backward, beside the formulations: benchmarks/RESULTS.md.

python benchmarks/bench_speed.py [--depths 24 48 96 192] [--repeats 5] [--compile-to 48] [--json FILE]

The block is sin, whose time is measured alone ("plain") and taken off. All in one process, interleaved; the least
of the repeats counts. The compiled loop is timed up to --compile-to (0: never); compiling takes minutes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from common import finish, options

from denseformer.recipes.bench import measure

GEOMETRIES = ((1, 1), (4, 1), (4, 5))


def main() -> None:
    arguments = options(__doc__)
    rows: list[dict[str, Any]] = []
    for k, p in GEOMETRIES:
        for depth in arguments.depths:
            numel = 131_072 if depth < 150 else 65_536
            names = ["plain", "ours", "naive loop", "preallocated slab"]
            if depth <= arguments.compile_to:
                names.append("compiled loop")
            times = measure(depth, k, p, numel=numel, methods=names, repeats=arguments.repeats)
            plain = times.pop("plain")
            own = {name: t - plain for name, t in times.items()}
            row: dict[str, Any] = {
                "geometry": f"{k}x{p}",
                "depth": depth,
                "N": numel,
                "plain ms": plain,
            }
            row.update({f"{name} ms": t for name, t in own.items()})
            row.update(
                {f"{name} / ours": t / own["ours"] for name, t in own.items() if name != "ours"}
            )
            rows.append(row)
            print(row, flush=True)
    full = [r for r in rows if r["geometry"] == "1x1"]
    if len(full) > 1:
        for name in ("ours", "naive loop", "preallocated slab"):
            points = [(math.log(r["depth"]), math.log(r[f"{name} ms"] / r["N"])) for r in full]
            mx = sum(x for x, _ in points) / len(points)
            my = sum(y for _, y in points) / len(points)
            slope = sum((x - mx) * (y - my) for x, y in points) / sum(
                (x - mx) ** 2 for x, _ in points
            )
            rows.append({"geometry": "1x1", "depth": f"exponent of {name}", "plain ms": slope})
    for k, p in GEOMETRIES:  # tiny tensors: the calls decide
        for train in (True, False):
            times = measure(48, k, p, numel=64, repeats=60, train=train)
            plain = times.pop("plain")
            own = {name: t - plain for name, t in times.items()}
            count = len([i for i in range(1, 49) if i % p == 0])
            rows.append(
                {
                    "geometry": f"{k}x{p}",
                    "depth": 48,
                    "N": 64 if train else "64, decode",
                    "plain ms": plain,
                    **{f"{name} ms": t for name, t in own.items()},
                    **{
                        f"{name} / ours": t / own["ours"]
                        for name, t in own.items()
                        if name != "ours"
                    },
                    "us per row": own["ours"] * 1e3 / count,
                }
            )
    finish(arguments, rows)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
