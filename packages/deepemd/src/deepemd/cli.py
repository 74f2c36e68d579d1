"""The command line: distance, train, eval, bench, data, info."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def _parser() -> argparse.ArgumentParser:
    from deepemd import __version__

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON")
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--quiet", action="store_true", help="no progress on stderr")
    common.add_argument("--out", help="folder or file to write to")
    common.add_argument("--data-dir", help="folder of data sets")
    parser = argparse.ArgumentParser(
        prog="deepemd", description="Earth Mover's Distance of point clouds"
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    one = commands.add_parser("distance", parents=[common], help="the EMD of two files of points")
    one.add_argument("a")
    one.add_argument("b")
    one.add_argument("--method", default="auto")
    one.add_argument("--points", type=int, help="sample so many points of each")
    one.add_argument("--p", type=int, default=1, choices=(1, 2))

    one = commands.add_parser("train", parents=[common], help="train, or go on with a run")
    one.add_argument("config", help="JSON file, see deepemd.recipes.TrainConfig")
    one.add_argument("--steps", type=int, help="overrides the file's")
    one.add_argument("--decoder-pairs", type=float, help="share of auto-encoder pairs (0.05)")
    one.add_argument("--half", action="store_true", help="store the result in half precision")

    one = commands.add_parser(
        "eval", parents=[common], help="measure a checkpoint on the frozen sets"
    )
    one.add_argument("checkpoint", help="a bundled name or a folder")
    one.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024])
    one.add_argument("--pairs", type=int, default=64)

    one = commands.add_parser("bench", parents=[common], help="error against time of every method")
    one.add_argument("--device", default="cpu")
    one.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512])
    one.add_argument("--methods", nargs="+")
    one.add_argument("--pairs", type=int, default=8)

    one = commands.add_parser(
        "data", parents=[common], help="make pairs, fetch or verify data sets"
    )
    one.add_argument("action", choices=("make", "fetch", "verify"))
    one.add_argument("name", nargs="?", help="data set, for fetch and verify")
    one.add_argument("--points", type=int, default=256)
    one.add_argument("--pairs", type=int, default=1024)
    one.add_argument("--accept-terms", action="store_true")

    commands.add_parser("info", parents=[common], help="versions, checkpoints, solvers at hand")
    return parser


def _distance(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from deepemd.api import match
    from deepemd.data.files import read_points

    x = read_points(args.a, points=args.points, seed=args.seed)
    y = read_points(args.b, points=args.points, seed=args.seed + 1)
    out = match(x, y, method=args.method, p=args.p)
    values = out.distance.reshape(-1).tolist()
    bounds = [None if v is None else v.reshape(-1).tolist() for v in (out.lower, out.upper)]
    result = {
        "distance": values, "lower": bounds[0], "upper": bounds[1], "method": out.method,
        "converged": out.converged.reshape(-1).tolist(),
    }  # fmt: skip
    return result, "\n".join(f"{value:.6g}" for value in values)


def _train(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    import dataclasses
    import os

    import torch

    from deepemd.core.hub import save_pretrained
    from deepemd.recipes.train import TrainConfig, train

    changes: dict[str, Any] = {}
    for name, value in (
        ("steps", args.steps), ("out", args.out), ("decoder", args.decoder_pairs),
    ):  # fmt: skip
        if value is not None:
            changes[name] = value
    config = dataclasses.replace(TrainConfig.load(args.config), **changes)
    rank = int(os.environ.get("RANK", "0"))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # started by torchrun or accelerate launch
        cuda = config.device == "cuda"
        if cuda:
            config = dataclasses.replace(config, device=f"cuda:{os.environ['LOCAL_RANK']}")
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
    model = train(config, progress=not args.quiet and rank == 0)
    dtype = torch.float16 if args.half else None
    folder = Path(config.out) / "pretrained"
    if rank == 0:
        save_pretrained(model, folder, dtype=dtype)
    return {"checkpoint": str(folder), "steps": config.steps}, f"wrote {folder}"


def _eval(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from deepemd.core.hub import from_pretrained
    from deepemd.recipes.evaluate import evaluate, frozen_set, markdown, scatter
    from deepemd.solvers._exact import installed

    model = from_pretrained(args.checkpoint)
    report = evaluate(model, args.sizes, pairs=args.pairs, progress=not args.quiet)
    text = markdown(report)
    if args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.md").write_text(text + "\n", encoding="utf-8")
        (out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        if installed("matplotlib"):
            test = frozen_set(args.sizes[0], args.pairs)
            scatter(test, model, out / "scatter.png")
            _draw_frontier(model, args.sizes[0], out / "frontier.png", quiet=args.quiet)
    return report, text


def _draw_frontier(model: Any, n: int, path: Path, *, quiet: bool) -> None:
    from matplotlib.figure import Figure

    from deepemd.recipes.frontier import frontier, plot_frontier

    rows = frontier((n,), model=model, repeats=3, progress=not quiet)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = plot_frontier(rows, n, figure.add_subplot())
    axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=150)


def _bench(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from deepemd.recipes.frontier import frontier

    rows = frontier(
        args.sizes, pairs=args.pairs, methods=args.methods, device=args.device,
        progress=not args.quiet,
    )  # fmt: skip
    result = {"rows": rows, "environment": _versions()}
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1), encoding="utf-8")
    lines = ["| N | method | setting | ms/pair | relative error |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['n']} | {r['method']} | {r['setting']} | {r['ms_per_pair']:.2f} | "
        f"{100 * r['rel_err']:.2f} % |"
        for r in rows
    ]
    return result, "\n".join(lines)


def _data(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if args.action == "make":
        from deepemd.data.shards import write_shards

        if not args.out:
            raise ValueError("data make needs --out DIR")
        paths = write_shards(args.out, n_points=args.points, pairs=args.pairs, seed=args.seed)
        return {"shards": [str(path) for path in paths]}, f"{len(paths)} shards in {args.out}"
    from deepemd.data.sets import fetch_set, verify_set

    if not args.name:
        raise ValueError(f"data {args.action} needs the name of a data set")
    if args.action == "verify":
        checked = verify_set(args.name, args.data_dir)
        return {"checked": checked}, f"{len(checked)} files as published"
    folder = fetch_set(
        args.name, args.data_dir, accept_terms=args.accept_terms, progress=not args.quiet
    )
    return {"folder": str(folder)}, str(folder)


def _versions() -> dict[str, Any]:
    import numpy
    import scipy
    import torch

    import deepemd

    return {
        "deepemd": deepemd.__version__, "python": platform.python_version(),
        "torch": torch.__version__, "numpy": numpy.__version__, "scipy": scipy.__version__,
        "processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
    }  # fmt: skip


def _info(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from deepemd.core.hub import bundled, from_pretrained
    from deepemd.core.methods import METHODS
    from deepemd.solvers._exact import installed

    extras = {"lapx": "lap", "POT": "ot", "h5py": "h5py", "trimesh": "trimesh"}
    checkpoints = {
        name: sum(p.numel() for p in from_pretrained(name).parameters()) for name in bundled()
    }
    result = {
        **_versions(), "checkpoints": checkpoints, "methods": list(METHODS),
        "extras": {name: installed(module) for name, module in extras.items()},
    }  # fmt: skip
    return result, "\n".join(f"{key}: {value}" for key, value in result.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 for bad usage or input."""
    args = _parser().parse_args(argv)
    action = {
        "distance": _distance, "train": _train, "eval": _eval, "bench": _bench, "data": _data,
        "info": _info,
    }[args.command]  # fmt: skip
    try:
        result, text = action(args)
    except (ValueError, TypeError, KeyError, OSError, RuntimeError, ImportError) as error:
        told = error.args[0] if isinstance(error, KeyError) else error
        print(f"deepemd {args.command}: {told}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=1) if args.json else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
