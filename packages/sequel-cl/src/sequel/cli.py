"""The command ``sequel``: run, resume, report, sweep, list, repro, parity, download."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sequel import _check

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sequel", description="Continual learning runs.")
    parser.add_argument("--version", action="store_true", help="print the version")
    sub = parser.add_subparsers(dest="command", metavar="command")

    def settings(p: argparse.ArgumentParser) -> None:
        p.add_argument(
            "--config", help="TOML file, or a name of `sequel list configs`; options override it"
        )
        p.add_argument("--scenario", help="kind-data, e.g. permuted-digits, class-mnist")
        p.add_argument("--algo", help="see `sequel list algos`")
        p.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                       help="a parameter of the algorithm or a setting of the run")  # fmt: skip
        p.add_argument("--lam", help="short for --set lam=...")
        p.add_argument("--backend", default=None, help="torch, jax or torch,jax")
        p.add_argument("--seeds", default=None, help="0:5 or 0,3,4")
        p.add_argument("--seed", type=int, default=None)
        p.add_argument("--epochs", type=int)
        p.add_argument("--tasks", type=int)
        p.add_argument("--data-dir")
        p.add_argument("--out", default="runs", help="folder of the runs")
        p.add_argument("--json", action="store_true")
        p.add_argument("--quiet", action="store_true")

    p = sub.add_parser("run", help="run an algorithm on a scenario")
    settings(p)
    p = sub.add_parser("sweep", help="run a grid of settings")
    settings(p)
    p.add_argument("--grid", action="append", default=[], metavar="NAME=A,B,...", required=True)
    p.add_argument("--jobs", type=int, default=1)
    p = sub.add_parser("resume", help="go on with a run's folder")
    p.add_argument("folder")
    p.add_argument("--quiet", action="store_true")
    p = sub.add_parser("report", help="tabulate the runs below a folder")
    p.add_argument("folder")
    p.add_argument("--md", action="store_true")
    p.add_argument("--csv", action="store_true")
    p.add_argument("--json", action="store_true")
    p.add_argument("--plot", metavar="FILE", help="curves of the runs' mean accuracy")
    p = sub.add_parser("list", help="what there is")
    p.add_argument("what", choices=["algos", "scenarios", "configs", "repro"])
    p = sub.add_parser("repro", help="a configuration with a published target")
    settings(p)
    p.add_argument("name")
    p = sub.add_parser("parity", help="run both backends and print the largest difference")
    p.add_argument("--algo", default="er")
    p.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    p.add_argument("--network", choices=["mlp", "cnn"], default="mlp")
    p.add_argument("--json", action="store_true")
    p = sub.add_parser("download", help="fetch a data set")
    p.add_argument("name")
    p.add_argument("--data-dir")
    return parser


def _seeds(text: str) -> list[int]:
    try:
        if ":" in text:
            low, _, high = text.partition(":")
            found = list(range(int(low or 0), int(high)))
        else:
            found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found:
        raise ValueError(f"--seeds must be like 0:5 or 0,3,4, got {text!r}")
    return found


def _pairs(items: Sequence[str]) -> dict[str, str]:
    for item in items:
        if "=" not in item:
            raise ValueError(f"expected NAME=VALUE, got {item!r}")
    return dict(item.split("=", 1) for item in items)


def _config(args: argparse.Namespace, base: dict[str, Any] | None = None) -> dict[str, Any]:
    from sequel.recipes import DEFAULTS, configs, read

    config = {**DEFAULTS, **(base or {})}
    if args.config in (shipped := configs()):
        config |= {k: v for k, v in shipped[args.config].items() if k != "expected"}
    elif args.config:
        path = Path(args.config)
        if not path.exists():
            raise ValueError(
                f"--config {args.config!r} is neither a file nor one of {', '.join(shipped)}"
            )
        config |= read(path)
    if args.algo not in (None, config["algo"]):
        config["params"] = {}  # they are those of another algorithm
    for name in ("scenario", "algo", "backend", "epochs", "tasks", "data_dir", "seed"):
        if getattr(args, name) is not None:
            config[name] = getattr(args, name)
    given = _pairs(args.set) | ({"lam": args.lam} if args.lam is not None else {})
    return _override(config, given)


def _override(config: dict[str, Any], given: dict[str, str]) -> dict[str, Any]:
    """Return the configuration with settings of the run, or parameters of the algorithm, replaced."""
    from sequel.recipes import DEFAULTS, _value

    config = {**config, "params": dict(config["params"])}
    for name, value in given.items():
        if name in DEFAULTS and name != "params":
            config[name] = _value(value)
        else:
            config["params"][name] = _value(value)
    return config


def _run_one(config: dict[str, Any], folder: str, quiet: bool) -> dict[str, Any]:
    import torch

    from sequel.callbacks import Progress
    from sequel.recipes import run

    torch.set_num_threads(1)
    callbacks = () if quiet else (Progress(),)
    result = run(config, folder, callbacks)
    return {"folder": folder, **result.summary()}


def _many(config: dict[str, Any], args: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    seeds = _seeds(args.seeds) if args.seeds else [int(config["seed"])]
    jobs = []
    for backend, seed in itertools.product(str(config["backend"]).split(","), seeds):
        folder = Path(args.out) / f"{name}-{backend}-seed{seed}"
        jobs.append(({**config, "backend": backend, "seed": seed}, str(folder), args.quiet))
    return _pool(jobs, getattr(args, "jobs", 1))


def _pool(jobs: list[tuple[Any, ...]], workers: int) -> list[dict[str, Any]]:
    if workers <= 1:
        return [_run_one(*job) for job in jobs]
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_run_one, *zip(*jobs, strict=True)))


def _show(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        parts = [f"{k} {v:.4f}" for k, v in row.items() if isinstance(v, float)]
        print(f"{row['folder']}: {'  '.join(parts)}")


def _report(args: argparse.Namespace) -> int:
    from sequel.metrics import confidence

    groups: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(Path(args.folder).rglob("result.json")):
        name = file.parent.name.rpartition("-seed")[0] or file.parent.name
        groups.setdefault(name, []).append(json.loads(file.read_text()))
    if not groups:
        raise ValueError(f"no result.json below {args.folder}")
    rows = []
    for name, results in groups.items():
        row: dict[str, Any] = {"run": name, "seeds": len(results)}
        for metric in ("acc", "forgetting", "bwt", "fwt"):
            found = confidence([r[metric] for r in results])
            row |= {f"{metric}": found["mean"], f"{metric}_std": found["std"]}
            row |= {f"{metric}_low": found["low"], f"{metric}_high": found["high"]}
        rows.append(row)
    if args.plot:
        import numpy as np

        from sequel.plot import plot_curves

        plot_curves(
            {n: [np.array(r["matrix"], dtype=float) for r in rs] for n, rs in groups.items()},
            path=args.plot,
        )
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    short = ["run", "seeds", "acc", "acc_std", "forgetting", "forgetting_std"]
    names = list(rows[0]) if args.csv else short
    cells = [names, *([_cell(row[n]) for n in names] for row in rows)]
    if args.csv:
        print("\n".join(",".join(line) for line in cells))
    elif args.md:
        cells.insert(1, ["---"] * len(names))
        print("\n".join("| " + " | ".join(line) + " |" for line in cells))
    else:
        widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
        for line in cells:
            print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())
    return 0


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _parity(args: argparse.Namespace) -> int:
    from sequel.recipes import _value, make_algorithm
    from sequel.testing import compare_backends

    small: dict[str, Any] = {"er": {"memory": 30}, "der": {"memory": 30}, "derpp": {"memory": 30}}
    small |= {"agem": {"per_task": 10, "replay_batch": 16}, "gem": {"per_task": 10}}
    small |= {"mcsgd": {"per_task": 10}, "icarl": {"memory": 30}}
    small |= {"lamaml": {"memory": 30, "glances": 2, "inner_batch": 4}}
    small |= {"kcl": {"coreset": 6, "features": 32}}
    params = small.get(args.algo, {}) | {k: _value(v) for k, v in _pairs(args.set).items()}
    found = compare_backends(make_algorithm(args.algo, params), network=args.network)
    keys = ("params", "state", "matrix", "losses", "traces")
    out = {k: found[k] for k in keys}
    print(json.dumps(out) if args.json else "  ".join(f"{k} {v:.3g}" for k, v in out.items()))
    return 0 if max(out["params"], out["state"]) <= 1e-10 else 1


def _repro(args: argparse.Namespace) -> int:
    from sequel.recipes import REPRO

    if args.name not in REPRO:
        raise ValueError(f"unknown configuration {args.name!r}; there are {', '.join(REPRO)}")
    config = _config(args, REPRO[args.name])
    expected = config.pop("expected")
    rows = _many(config, args, args.name)
    _show(rows, args.json)
    print(f"published: acc {expected / 100:.4f}", file=sys.stderr)
    return 0


def _list(what: str) -> int:
    from sequel.algorithms import ALGORITHMS
    from sequel.recipes import DATA, KINDS, configs

    if what == "algos":
        for name, kind in ALGORITHMS.items():
            print(f"{name:10} {(kind.__doc__ or '').splitlines()[0]}")
    elif what == "scenarios":
        print(f"kind-data, kind one of {', '.join(KINDS)}; data one of {', '.join(DATA)}")
    else:
        for name, config in configs().items():
            if "expected" in config:
                print(f"{name:22} published acc {config['expected']:.1f} %")
            elif what == "configs":
                print(f"{name:22} {config['scenario']}, {config['tasks']} tasks, {config['algo']}")
    return 0


def _dispatch(args: argparse.Namespace) -> int:
    if args.command == "list":
        return _list(args.what)
    if args.command == "report":
        return _report(args)
    if args.command == "parity":
        return _parity(args)
    if args.command == "repro":
        return _repro(args)
    if args.command == "download":
        from sequel.recipes import make_dataset

        data = make_dataset(args.name, args.data_dir, flat=True)
        print(f"{args.name}: {len(data.y_train)} training, {len(data.y_test)} test samples")
        return 0
    if args.command == "resume":
        path = Path(args.folder) / "run.json"
        if not path.exists():
            raise ValueError(f"{args.folder} has no run.json: it is not the folder of a run")
        _show([_run_one(json.loads(path.read_text()), args.folder, args.quiet)], False)
        return 0
    config = _config(args)
    if args.command == "run":
        _show(_many(config, args, f"{config['scenario']}-{config['algo']}"), args.json)
        return 0
    grid = {name: values.split(",") for name, values in _pairs(args.grid).items()}
    seeds = _seeds(args.seeds) if args.seeds else [int(config["seed"])]
    jobs: list[tuple[Any, ...]] = []
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        one = _override(config, point)
        label = ",".join(f"{k}={v}" for k, v in point.items())
        for backend, seed in itertools.product(str(one["backend"]).split(","), seeds):
            folder = (
                Path(args.out) / f"{one['scenario']}-{one['algo']}-{label}-{backend}-seed{seed}"
            )
            jobs.append(({**one, "backend": backend, "seed": seed}, str(folder), args.quiet))
    _check.count("--jobs", args.jobs)
    _show(_pool(jobs, args.jobs), args.json)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 for success, 1 for a failed claim, 2 for bad usage or input."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.version:
        from sequel import __version__

        print(f"sequel {__version__}")
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    try:
        return _dispatch(args)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, ArithmeticError) as error:
        print(f"sequel: {error}", file=sys.stderr)
        return 2
