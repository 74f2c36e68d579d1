"""The command line: ``palora`` or ``python -m palora.cli``."""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["main"]

SWEEPS: dict[str, list[Any]] = {
    "rank": [1, 2, 4, 8],
    "alpha": [1.0, 4.0, 16.0],
    "temperature": [1.0, 2.0, 5.0, 10.0],
    "rays": [2, 3, 5, 11],
    "schedule": ["anneal", "fixed", "dirichlet", "anneal-dirichlet"],
}


class _Usage(Exception):
    """Bad input, told in one line."""


class _Parser(argparse.ArgumentParser):
    """Tells bad usage in one line too; the usage itself is what --help shows."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"not numbers separated by commas: {text!r}") from None


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(text, file=sys.stderr, flush=True)


def _answer(args: argparse.Namespace, data: Any, lines: Sequence[str]) -> None:
    text = json.dumps(data, indent=1)
    if args.out is not None and args.command not in ("merge", "export-peft", "digits", "front"):
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    print(text if args.json else "\n".join(lines))


def _model(name: str) -> Any:
    """A built-in network by name, or the result of ``module:callable``."""
    from palora.examples.models import MODELS

    if name in MODELS:
        return MODELS[name]()
    module, colon, attribute = name.partition(":")
    if not colon:
        raise _Usage(f"unknown model {name!r}: one of {', '.join(MODELS)}, or module:callable")
    from torch import nn

    try:
        made = getattr(importlib.import_module(module), attribute)()
    except Exception as error:  # whatever the user's own code raises
        raise _Usage(f"cannot make {name!r}: {error}") from error
    if not isinstance(made, nn.Module):
        raise _Usage(f"{name!r} made a {type(made).__name__}, not an nn.Module")
    return made


def _overhead(args: argparse.Namespace) -> int:
    import torch

    import palora

    with torch.device("meta"):
        model = _model(args.model)
    found = palora.overhead(palora.inject(model, args.tasks, rank=args.rank, conv=args.conv))
    data = {**vars(found), "total": found.base + found.adapters}
    lines = [
        f"plain model      {found.base:>14,}",
        f"adapters         {found.adapters:>14,}   +{100 * found.ratio:.3f} %",
        (
            f"{args.tasks} weight copies  {args.tasks * found.base:>14,}   "
            f"+{100 * (args.tasks - 1):.0f} %: {found.vs_pamal:.2f} times more is added"
        ),
    ]
    _answer(args, data, lines)
    return 0


def _merge(args: argparse.Namespace) -> int:
    import torch

    from palora.core import functional as PF
    from palora.core.checkpoint import (
        WEIGHTS,
        is_adapter_key,
        read_config,
        read_tensors,
        write_tensors,
    )
    from palora.core.preference import as_preference

    config, tensors = read_config(args.checkpoint), read_tensors(Path(args.checkpoint) / WEIGHTS)
    lam = as_preference(args.preference, config["tasks"]).double()
    merged = {k: v for k, v in tensors.items() if not is_adapter_key(k)}
    for name, layer in config["layers"].items():
        prefix = name + "." if name else ""
        key = prefix + ("in_proj_weight" if layer["kind"] == "attention" else "weight")
        if key not in merged:
            raise _Usage(f"{args.checkpoint} holds adapters alone: save it with base=True to merge")
        A, B = tensors[prefix + "palora_A"].double(), tensors[prefix + "palora_B"].double()
        own = lam.pow(layer["exponent"])
        own = own / own.sum() if layer["exponent"] != 1.0 else lam
        parts = 3 if layer["mode"] == "split" else 1
        blocks = zip(A.chunk(parts, 1), B.chunk(parts, 1), strict=True)
        delta = torch.cat([PF.delta_weight(a, b, own, layer["scale"]) for a, b in blocks])
        if layer["kind"] in ("conv1d-hf", "embedding"):
            delta = delta.t()
        weight = merged[key]
        merged[key] = (weight.double() + delta.reshape(weight.shape)).to(weight.dtype)
    write_tensors(Path(args.out), merged, {"format": "pt"})
    data = {"out": str(args.out), "tensors": len(merged), "preference": args.preference}
    _answer(args, data, [f"wrote {len(merged)} tensors to {args.out}"])
    return 0


def _export(args: argparse.Namespace) -> int:
    import palora
    from palora.core.checkpoint import read_config

    config = read_config(args.checkpoint)
    from palora.interop.peft import to_peft

    model = palora.load(_model(args.model or config.get("model", "")), args.checkpoint)
    to_peft(model, args.out, args.preference)
    what = "one LoRA" if args.preference else f"{len(config['tasks'])} LoRAs"
    _answer(
        args, {"out": str(args.out), "preference": args.preference}, [f"wrote {what} to {args.out}"]
    )
    return 0


def _hypervolume(args: argparse.Namespace) -> int:
    from palora.front import hypervolume, nondominated

    text = sys.stdin.read() if args.file == "-" else Path(args.file).read_text(encoding="utf-8")
    points = _points(text, args.file)
    value, kept = hypervolume(points, args.ref), int(nondominated(points).sum())
    data = {"hypervolume": value, "points": len(points), "nondominated": kept}
    _answer(args, data, [f"{value:.10g}   ({kept} of {len(points)} points are not dominated)"])
    return 0


def _points(text: str, name: str) -> list[list[float]]:
    """Points from a front's JSON, a JSON list of lists, or CSV (with or without a header)."""
    try:
        if text.lstrip().startswith(("{", "[")):
            data = json.loads(text)
            rows = data["losses"] if isinstance(data, dict) else data
            found = [[float(v) for v in row] for row in rows]
        else:
            table = [row for row in csv.reader(text.splitlines()) if row]
            header = [i for i, cell in enumerate(table[0]) if cell.strip().startswith("loss_")]
            if header:
                found = [[float(row[i]) for i in header] for row in table[1:]]
            else:
                found = [[float(v) for v in row] for row in table]
    except KeyError as error:
        raise _Usage(f"{name} holds no table of points: it has no entry {error}") from error
    except (ValueError, IndexError, TypeError) as error:
        raise _Usage(f"{name} holds no table of points: {error}") from error
    if len({len(row) for row in found}) != 1:
        raise _Usage(
            f"{name} holds no table of points: its rows differ in length, or none is there"
        )
    return found


def _front(args: argparse.Namespace) -> int:
    from palora.core.checkpoint import read_config
    from palora.front import Front, evaluate

    path = Path(args.checkpoint)
    if path.is_dir():
        import palora
        from palora.examples.digits import task

        config = read_config(path)
        if config.get("model") != "digits":
            raise _Usage(
                f"{path} is not a checkpoint of `palora digits --out`: the command knows only "
                "that model and its data; call palora.front.evaluate for your own"
            )
        problem = task(seed=config["seed"])
        model = palora.load(_model("digits"), path)
        grid = palora.simplex_grid(2, args.grid - 1)
        front = evaluate(model, [problem.test], problem.scores, grid)
    else:
        front = Front.from_json(path.read_text(encoding="utf-8"))
    if args.png:
        axes = front.plot()
        axes.figure.savefig(args.png, dpi=120, bbox_inches="tight")  # type: ignore[union-attr]
    if args.out:
        front.to_json(args.out)
    data = json.loads(front.to_json())
    data["nondominated"] = int(front.nondominated().sum())
    data["spearman"] = front.spearman().tolist()
    lines = [front.to_csv().rstrip()]
    _answer(args, data, lines)
    return 0


def _sweep_grid(text: str | None) -> list[dict[str, Any]]:
    if not text:
        return [{}]
    settings = []
    for key in text.split(","):
        if key not in SWEEPS:
            raise _Usage(f"cannot sweep {key!r}: one of {', '.join(SWEEPS)}")
        settings += [{key: value} for value in SWEEPS[key]]
    return settings


def _digits(args: argparse.Namespace) -> int:
    import palora
    from palora.core.checkpoint import read_config, write_json
    from palora.examples.digits import HV_REFERENCE, task
    from palora.examples.training import TrainConfig, train

    common = {"rank": args.rank, "rays": args.rays, "schedule": args.schedule}
    runs: list[dict[str, Any]] = [{**common, **s} for s in _sweep_grid(args.sweep)]
    if args.baselines:
        runs += [
            {"method": m, "schedule": "dirichlet", "rays": args.rays}
            for m in ("pamal", "cosmos", "phn", "linear")
        ]
    rows, model = [], None
    for run in runs:
        for seed in range(args.seed, args.seed + args.seeds):
            start = time.perf_counter()
            config = TrainConfig(**run, epochs=args.epochs, every=args.epochs, seed=seed)
            result = train(task(seed=seed), config)
            front = result.fronts[-1]
            single = len(front) < 2
            rows.append(
                {
                    **run,
                    "seed": seed,
                    "parameters": result.parameters,
                    "hypervolume": front.hypervolume(HV_REFERENCE),
                    "nondominated": int(front.nondominated().sum()),
                    "spearman": None if single else float(front.spearman().mean()),
                    "train_seconds": round(result.seconds[-1], 3),
                }
            )
            _say(args, f"{run} seed {seed}: {time.perf_counter() - start:.1f} s")
            if model is None:
                model = result.model
                if args.out:
                    palora.save(model, args.out)
                    kept = {**read_config(args.out), "model": "digits", "seed": seed}
                    write_json(Path(args.out) / "palora_config.json", kept)
    keys = list(dict.fromkeys(k for row in rows for k in row))
    lines = ["\t".join(keys)]
    for row in rows:
        cells = (row.get(k, "") for k in keys)
        lines.append("\t".join(f"{v:.4f}" if isinstance(v, float) else str(v) for v in cells))
    _answer(args, rows, lines)
    return 0


def _recipe(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from palora.examples.recipes import RECIPES, summary
    from palora.examples.training import train

    if args.name not in RECIPES:
        raise _Usage(f"unknown recipe {args.name!r}: one of {', '.join(RECIPES)}")
    recipe = RECIPES[args.name]
    changes: dict[str, Any] = {"seed": args.seed, "method": args.method}
    if args.epochs:
        changes |= {"epochs": args.epochs, "every": min(args.epochs, recipe.config.every)}
    config = replace(recipe.config, **changes)
    result = train(
        recipe.task(args.data_dir),
        config,
        lambda epoch, r: _say(args, f"epoch {epoch}: {r.seconds[-1]:.1f} s of training"),
    )
    data = {"recipe": args.name, **vars(config), **summary(recipe, result)}
    lines = [f"{k}: {v}" for k, v in data.items() if k not in ("losses", "prefs")]
    _answer(args, data, lines)
    return 0


def _parser() -> argparse.ArgumentParser:
    from palora import __version__

    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON")
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--data-dir", help="where data files lie or are downloaded to")
    common.add_argument("-o", "--out", help="where to write")
    common.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser = _Parser(prog="palora", description="Pareto low-rank adapters")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Any:
        command = commands.add_parser(name, help=text, description=text, parents=[common])
        command.set_defaults(run=run)
        return command

    p = add("overhead", _overhead, "count the parameters that adapters add")
    p.add_argument("model", help="a built-in network, or module:callable")
    p.add_argument("--tasks", type=int, default=2)
    p.add_argument("--rank", type=int, default=4)
    p.add_argument("--conv", choices=("folded", "spatial"), default="folded")

    p = add("merge", _merge, "write the plain weights of one preference")
    p.add_argument("checkpoint", help="folder written by palora.save")
    p.add_argument("--preference", type=_numbers, required=True)

    p = add("front", _front, "evaluate a digits checkpoint, or show a front's JSON")
    p.add_argument("checkpoint", help="folder of `palora digits --out`, or a JSON file")
    p.add_argument("--grid", type=int, default=11, help="number of preferences")
    p.add_argument("--png", help="draw the front to this file")

    p = add("hypervolume", _hypervolume, "hypervolume of points to minimise")
    p.add_argument("file", help="CSV or JSON; - for standard input")
    p.add_argument("--ref", type=_numbers, required=True, help="reference point, such as 2,2")

    p = add("digits", _digits, "train on the two-digit composites")
    p.add_argument("--schedule", choices=SWEEPS["schedule"], default="anneal")
    p.add_argument("--rays", type=int, default=5)
    p.add_argument("--rank", type=int, default=4)
    p.add_argument("--seeds", type=_count, default=1, help="number of seeds, from --seed on")
    p.add_argument("--epochs", type=_count, default=10)
    p.add_argument("--baselines", action="store_true", help="PaMaL, COSMOS, PHN, linear as well")
    p.add_argument("--sweep", help="comma-separated: " + ", ".join(SWEEPS))

    p = add("recipe", _recipe, "run one of the paper's configurations")
    p.add_argument("name")
    p.add_argument("--epochs", type=_count)
    p.add_argument(
        "--method", choices=("palora", "pamal", "cosmos", "phn", "linear"), default="palora"
    )

    p = add("export-peft", _export, "write LoRA folders that PEFT reads")
    p.add_argument("checkpoint", help="folder written by palora.save")
    p.add_argument("--model", help="a built-in network, or module:callable")
    p.add_argument("--preference", type=_numbers, help="one LoRA of rank T·r for this preference")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 success, 2 bad usage or input."""
    args = _parser().parse_args(argv)
    if args.command in ("merge", "export-peft") and args.out is None:
        print(f"palora {args.command}: --out is required", file=sys.stderr)
        return 2
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="rank exceeds")
            status: int = args.run(args)
            return status
    except (_Usage, ValueError, KeyError, OSError, ImportError, RuntimeError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"palora {args.command}: {' '.join(str(text).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
