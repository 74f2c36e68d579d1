"""Continual learning on scikit-learn's digits: class-, task-incremental, permuted and rotated streams.

All main algorithms, three seeds; the table of accuracies and forgetting, heat maps, and the largest
difference between the PyTorch and the JAX backend. ``--data-dir`` adds MNIST's test images as a longer example.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sequel
from sequel import metrics, scenarios

KINDS = {
    "class-IL": {"epochs": 5, "lr": 0.1, "lam": (100.0, 0.3)},
    "task-IL": {"epochs": 5, "lr": 0.1, "lam": (100.0, 10.0)},
    "permuted": {"epochs": 3, "lr": 0.05, "lam": (5.0, 0.3)},
    "rotated": {"epochs": 3, "lr": 0.05, "lam": (20.0, 0.3)},
}
NAMES = ("naive", "EWC", "SI", "A-GEM", "ER", "DER++", "joint")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="build/demo/sequel-cl")
    parser.add_argument("--seed", type=int, default=0, help="first of the seeds")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--data-dir", help="a folder with MNIST's t10k files: the longer example")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument("--json", action="store_true", help="print demo.json instead of the table")
    return parser.parse_args()


def stream(kind: str, data: Any, seed: int) -> Any:
    if kind == "class-IL":
        return scenarios.class_incremental(data, 5)
    if kind == "task-IL":
        # The pairs are drawn by the seed: in numerical order, regularisation has little to keep.
        order = np.random.default_rng(seed).permutation(10).tolist()
        return scenarios.task_incremental(data, 5, class_order=order)
    if kind == "permuted":
        return scenarios.permuted(data, 5, seed=seed)
    return scenarios.rotated(data, 5, step=36.0)


def algorithm(name: str, lam: tuple[float, float]) -> sequel.Algorithm:
    made: dict[str, sequel.Algorithm] = {
        "naive": sequel.Naive(),
        "EWC": sequel.EWC(lam=lam[0], apply="prox"),
        "SI": sequel.SI(lam=lam[1]),
        "A-GEM": sequel.AGEM(per_task=20, replay_batch=100),
        "ER": sequel.ER(memory=100, policy="reservoir"),
        "DER++": sequel.DERpp(memory=100, alpha=0.5, beta=0.5),
        "joint": sequel.Joint(),
    }
    return made[name]


def run(kind: str, name: str, seed: int, data: Any, **over: Any) -> sequel.Result:
    config: dict[str, Any] = {**KINDS[kind], **over}
    scenario = stream(kind, data, seed)
    torch.manual_seed(seed)
    inputs = int(np.prod(scenario[0].train.x.shape[1:]))
    model = sequel.nn.MLP(inputs, config.get("hidden", (64, 64)), 10)
    learner = sequel.Learner(
        model,
        torch.optim.SGD(model.parameters(), config["lr"]),
        algorithm(name, config["lam"]),
        batch_size=16,
        seed=seed,
    )
    return learner.fit(scenario, epochs=config["epochs"])


def claim(text: str, baseline: str, ours: str, holds: bool) -> dict[str, Any]:
    return {"claim": text, "baseline": baseline, "ours": ours, "holds": bool(holds)}


def claims(
    mean: dict[tuple[str, str], float],
    forgot: dict[tuple[str, str], float],
    parity: dict[str, float] | None,
) -> list[dict[str, Any]]:
    def at(kind: str, name: str) -> float:
        return 100 * mean[kind, name]

    rows = []
    naive, er, der = (at("class-IL", n) for n in ("naive", "ER", "DER++"))
    rows.append(
        claim(
            "class-IL: replay remembers (at least 50 points over fine-tuning)",
            f"naive {naive:.1f} %",
            f"ER {er:.1f} %, DER++ {der:.1f} %",
            min(er, der) >= naive + 50,
        )
    )
    reg = max(at("class-IL", n) for n in ("EWC", "SI"))
    rows.append(
        claim(
            "class-IL: regularisation alone fails (at most 5 points over fine-tuning)",
            f"naive {naive:.1f} %",
            f"best of EWC, SI {reg:.1f} %",
            reg <= naive + 5,
        )
    )
    base = at("task-IL", "naive")
    others = {n: at("task-IL", n) for n in ("EWC", "SI", "A-GEM", "ER", "DER++")}
    worst = min(others, key=lambda n: others[n])
    rows.append(
        claim(
            "task-IL: every method is at least 3 points over fine-tuning",
            f"naive {base:.1f} %",
            f"worst, {worst}: {others[worst]:.1f} %",
            others[worst] >= base + 3,
        )
    )
    fell = {n: 100 * forgot["task-IL", n] for n in ("naive", "EWC", "SI")}
    rows.append(
        claim(
            "task-IL: EWC and SI forget at most half of what fine-tuning forgets",
            f"naive forgets {fell['naive']:.1f} points",
            f"EWC {fell['EWC']:.1f}, SI {fell['SI']:.1f}",
            max(fell["EWC"], fell["SI"]) <= 0.5 * fell["naive"],
        )
    )
    for kind in ("permuted", "rotated"):
        base, er, joint = (at(kind, n) for n in ("naive", "ER", "joint"))
        rows.append(
            claim(
                f"{kind}: replay is at least 15 points over fine-tuning, and below joint training",
                f"naive {base:.1f} %",
                f"ER {er:.1f} %, joint {joint:.1f} %",
                base + 15 <= er < joint,
            )
        )
    if parity is not None:
        worst_name = max(parity, key=lambda n: parity[n])
        rows.append(
            claim(
                "PyTorch and JAX compute the same parameters (float64, 3 tasks x 3 epochs)",
                "at most 1e-10",
                f"largest difference {parity[worst_name]:.1e} ({worst_name})",
                parity[worst_name] <= 1e-10,
            )
        )
    return rows


def measure_parity() -> dict[str, float] | None:
    try:
        import jax  # noqa: F401
    except ImportError:
        return None
    from sequel.testing import compare_backends

    cases = {
        "EWC": sequel.EWC(lam=2.0),
        "SI": sequel.SI(lam=0.05),
        "A-GEM": sequel.AGEM(per_task=10, replay_batch=16),
        "DER++": sequel.DERpp(memory=30),
    }
    return {name: compare_backends(a)["params"] for name, a in cases.items()}


def table(results: dict[tuple[str, str], list[sequel.Result]], kinds: Any) -> dict[str, Any]:
    rows = []
    for kind in kinds:
        row = [kind]
        for name in NAMES:
            found = results[kind, name]
            acc = metrics.confidence([100 * r.acc for r in found])
            forgot = 100 * np.mean([r.forgetting for r in found])
            row.append(f"{acc['mean']:.1f} ± {acc['std']:.1f} / {forgot:.1f}")
        rows.append(row)
    return {"title": "ACC ± std / forgetting, %", "columns": ["stream", *NAMES], "rows": rows}


def findings(results: dict[tuple[str, str], list[sequel.Result]]) -> list[str]:
    def acc(kind: str, name: str) -> float:
        return float(100 * np.mean([r.acc for r in results[kind, name]]))

    def wins(kind: str, a: str, b: str) -> str:
        pairs = zip(results[kind, a], results[kind, b], strict=True)
        return f"{sum(x.acc > y.acc for x, y in pairs)} of {len(results[kind, a])} seeds"

    return [
        (
            f"A-GEM does not help in class-IL ({acc('class-IL', 'A-GEM'):.1f} % against naive's "
            f"{acc('class-IL', 'naive'):.1f} %): a projection that only forbids first-order harm is too weak there."
        ),
        (
            f"On permuted digits A-GEM beats EWC in {wins('permuted', 'A-GEM', 'EWC')} and SI in "
            f"{wins('permuted', 'A-GEM', 'SI')}; on rotated digits it beats EWC in "
            f"{wins('rotated', 'A-GEM', 'EWC')}."
        ),
        (
            f"DER++ is ahead of ER in {wins('class-IL', 'DER++', 'ER')} of class-IL, in "
            f"{wins('permuted', 'DER++', 'ER')} of permuted digits."
        ),
        (
            f"On permuted and rotated digits EWC has {acc('permuted', 'EWC'):.1f} and "
            f"{acc('rotated', 'EWC'):.1f} %, SI {acc('permuted', 'SI'):.1f} and "
            f"{acc('rotated', 'SI'):.1f} %, naive {acc('permuted', 'naive'):.1f} and "
            f"{acc('rotated', 'naive'):.1f} %: a small gain that single seeds reverse."
        ),
        (
            f"All methods stay below joint training; the smallest gap in permuted is "
            f"{acc('permuted', 'joint') - max(acc('permuted', n) for n in NAMES[:-1]):.1f} points."
        ),
    ]


def draw(results: dict[tuple[str, str], list[sequel.Result]], out: Path) -> list[dict[str, str]]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from sequel.plot import plot_curves, plot_matrix

    figure, axes = plt.subplots(2, 4, figsize=(13, 6.6), layout="constrained")
    for row, kind in zip(axes, ("task-IL", "permuted"), strict=True):
        for ax, name in zip(row, ("naive", "EWC", "ER", "DER++"), strict=True):
            mean = np.mean([r.matrix for r in results[kind, name]], axis=0)
            plot_matrix(mean, ax=ax, title=f"{kind}: {name}")
    figure.savefig(out / "matrices.png", dpi=90)
    plt.close(figure)
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.8), layout="constrained")
    for ax, kind in zip(axes, KINDS, strict=True):
        curves = {name: [r.matrix for r in results[kind, name]] for name in NAMES}
        plot_curves(curves, ax=ax, title=kind)
    figure.savefig(out / "curves.png", dpi=90)
    plt.close(figure)
    return [
        {
            "file": "curves.png",
            "caption": "Mean accuracy over the tasks seen so far; bands span the seeds.",
        },
        {"file": "matrices.png", "caption": "Accuracy matrices, mean over seeds, in %."},
    ]


def say(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(text, file=sys.stderr, flush=True)


def mnist(args: argparse.Namespace, seeds: list[int]) -> dict[str, Any]:
    results = {}
    small = {"hidden": (256, 256), "epochs": 1, "lr": 0.05}
    for kind in ("class-IL", "permuted"):
        for name in NAMES:
            say(args, f"MNIST {kind}: {name}")
            results[kind, name] = [
                run(kind, name, seed, sequel.data.mnist_test(args.data_dir, seed=seed), **small)
                for seed in seeds
            ]
    found = table(results, ("class-IL", "permuted"))
    return {**found, "title": "MNIST's test images, 8,000 / 2,000, one epoch: " + found["title"]}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def show(data: dict[str, Any]) -> None:
    for entry in data["claims"]:
        print(f"claim     {entry['claim']}")
        print(f"baseline  {entry['baseline']}")
        print(f"ours      {entry['ours']}")
        print(f"verdict   {'holds' if entry['holds'] else 'DOES NOT HOLD'}\n")
    for found in data["tables"]:
        print(found["title"])
        cells = [found["columns"], *found["rows"]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        for row in cells:
            print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
        print()
    for note in data["findings"]:
        print(f"finding   {note}")


def main() -> int:
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # four tiny programs
    args = options()
    start = time.perf_counter()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # layers of 64 units: a second thread only waits
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    seeds = list(range(args.seed, args.seed + args.seeds))
    results: dict[tuple[str, str], list[sequel.Result]] = {}
    for kind in KINDS:
        for name in NAMES:
            begun = time.perf_counter()
            results[kind, name] = [
                run(kind, name, seed, sequel.data.digits(seed=seed)) for seed in seeds
            ]
            acc = 100 * np.mean([r.acc for r in results[kind, name]])
            took = time.perf_counter() - begun
            say(args, f"{kind:9} {name:6} acc {acc:5.1f} %  ({took:.1f} s)")
    mean = {key: float(np.mean([r.acc for r in rs])) for key, rs in results.items()}
    forgot = {key: float(np.mean([r.forgetting for r in rs])) for key, rs in results.items()}
    parity = measure_parity()
    tables = [table(results, KINDS)]
    if parity is not None:
        rows = [[name, f"{value:.1e}"] for name, value in parity.items()]
        tables.append(
            {"title": "Parity", "columns": ["algorithm", "max |torch - JAX|"], "rows": rows}
        )
    if args.data_dir:
        tables.append(mnist(args, seeds))
    data = {
        "package": "sequel-cl",
        "title": "What continual learning forgets on four streams of digits, and the same numbers in "
        "PyTorch and JAX",
        "data": f"scikit-learn load_digits, 1,400 / 397 images, 5 tasks, memory 100, {len(seeds)} seeds",
        "claims": claims(mean, forgot, parity),
        "tables": tables,
        "figures": draw(results, out),
        "findings": findings(results),
        "seconds": round(time.perf_counter() - start, 1),
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "platform": platform.platform(),
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "command": " ".join(["python", *sys.argv]),
        },
    }
    (out / "demo.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    if args.json:
        print(json.dumps(data, indent=1, ensure_ascii=False))
    else:
        show(data)
    return 0 if all(c["holds"] for c in data["claims"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
