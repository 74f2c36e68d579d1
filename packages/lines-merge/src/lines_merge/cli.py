"""Command line: edit, merge, soup, wise-ft, sweep and inspect checkpoints on disk."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

OK, USAGE, MISMATCH, IO = 0, 2, 3, 4
_METHOD_OPTIONS = ("density", "scope", "compat", "merge", "k", "lambdas", "p", "seed", "weights")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    from . import __version__

    parser = argparse.ArgumentParser(
        prog="lines-merge",
        description="LiNeS: scale the update of fine-tuned or merged checkpoints by depth.",
        epilog="exit status: 0 done, 2 bad usage, 3 inputs that do not fit together, 4 input or output",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    edit = commands.add_parser("edit", help="restore what fine-tuning forgot")
    _inputs(edit, several=False)
    edit.add_argument("--gamma", type=float, help="alpha = gamma, beta = 1 - gamma; in [0, 1]")
    edit.add_argument("--alpha", type=float, help="factor of the first block")
    edit.add_argument("--beta", type=float, help="increase to the last block")

    merge = commands.add_parser("merge", help="merge fine-tuned models")
    _inputs(merge, several=True, optional=True)
    merge.add_argument("--recipe", help="lines_merge.json, or a YAML with merge_method and models")
    merge.add_argument("--beta", type=float, help="increase to the last block (default 0.5)")
    _merging(merge)

    sweep = commands.add_parser("sweep", help="merge once for each beta, reading the inputs once")
    _inputs(sweep, several=True)
    sweep.add_argument("--betas", type=float, nargs="+", required=True)
    _merging(sweep)

    soup = commands.add_parser("soup", help="average models of the same task")
    _inputs(soup, several=True)
    soup.add_argument("--alpha", type=float, default=1.0, help="default 1: the plain average")
    soup.add_argument("--beta", type=float, default=0.0)

    wise = commands.add_parser("wise-ft", help="interpolate between base and fine-tuned model")
    _inputs(wise, several=False)
    wise.add_argument("--gamma", type=float, required=True, help="in [0, 1]")
    wise.add_argument("--alpha", type=float, default=0.5)
    wise.add_argument("--beta", type=float, default=0.5)

    for command in (edit, merge, sweep, soup, wise):
        _depth(command)
        _output(command)

    inspect = commands.add_parser("inspect", help="print depth, factors and update norms")
    inspect.add_argument("base")
    inspect.add_argument("finetuned", nargs="?")
    inspect.add_argument("--alpha", type=float, default=0.0)
    inspect.add_argument("--beta", type=float, default=1.0)
    _depth(inspect)
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return parser


def _inputs(parser: argparse.ArgumentParser, *, several: bool, optional: bool = False) -> None:
    base = "?" if optional else None
    parser.add_argument("base", nargs=base, help="folder, .safetensors, index.json or .bin")
    if several:
        parser.add_argument("models", nargs="*" if optional else "+", help="fine-tuned models")
    else:
        parser.add_argument("finetuned", help="fine-tuned model")
    parser.add_argument("-o", "--out", required=True, help="folder of the result, new or empty")


def _merging(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", help="default task_arithmetic")
    parser.add_argument("--alpha", help="a number or auto (default): the norm ratio of Eq. 2")
    parser.add_argument("--no-lines", action="store_true", help="plain merge, alpha everywhere")
    parser.add_argument("--norm", type=int, choices=[1, 2], help="of alpha=auto (default 1)")
    parser.add_argument("--density", type=float, help="fraction that TIES or magnitude keeps")
    parser.add_argument("--scope", choices=["global", "tensor"], help="of the trim")
    parser.add_argument("--compat", choices=["reference"], help="the authors' trim rule")
    parser.add_argument(
        "--sign-merge", dest="merge", choices=["mean", "sum", "max"], help="of TIES"
    )
    parser.add_argument("--k", type=int, help="of Consensus")
    parser.add_argument("--lambdas", type=float, nargs="+", help="of the TALL masks")
    parser.add_argument("--p", type=float, help="drop probability of DARE")
    parser.add_argument("--seed", type=int, help="of DARE")
    parser.add_argument("--weights", type=float, nargs="+", help="one for each model")


def _depth(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("depth")
    group.add_argument("--family", help="how names show depth (default: found out)")
    group.add_argument(
        "--pattern", action="append", help="where the blocks are, e.g. 'model.layers.{i}.'"
    )
    group.add_argument("--schedule", choices=["linear", "reverse"])
    group.add_argument("--outside", help="alpha (default), depth, or a number")
    group.add_argument("--towers", choices=["separate", "sequential", "shared"])
    group.add_argument("--allow-gaps", action="store_true", help="rank the blocks present")


def _output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    group.add_argument("--max-memory", help="default 1GiB")
    group.add_argument("--threads", type=int)
    group.add_argument("--shard-size", help="default 5GB")
    group.add_argument("--dtype", help="of the result (default: the base's)")
    group.add_argument(
        "--buffers", choices=["scale", "base", "finetuned"], help="batch-norm statistics"
    )
    group.add_argument("--no-strict", action="store_true", help="allow missing and extra tensors")
    group.add_argument("--vocab", choices=["base"], help="allow other numbers of embedding rows")
    group.add_argument("--allow-nonfinite", action="store_true")
    group.add_argument(
        "--overwrite", action="store_true", help="replace a folder that is not empty"
    )
    group.add_argument("--verify", action="store_true", help="read the result back and compare")
    group.add_argument("--dry-run", action="store_true", help="print passes, bytes, peak memory")
    group.add_argument("--json", action="store_true", help="print the report as JSON")
    group.add_argument("--quiet", action="store_true", help="no progress on stderr")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    arguments = build_parser().parse_args(argv)
    from .errors import (
        DepthError,
        KeyMismatchError,
        NonFiniteError,
        ShapeMismatchError,
        UnsupportedDtypeError,
        ZeroTaskVectorError,
    )

    mismatch = (
        DepthError,
        KeyMismatchError,
        NonFiniteError,
        ShapeMismatchError,
        UnsupportedDtypeError,
        ZeroTaskVectorError,
    )
    try:
        _inspect(arguments) if arguments.command == "inspect" else _run(arguments)
    except mismatch as error:
        return _fail(error, MISMATCH)
    except OSError as error:
        return _fail(error, IO)
    except (ValueError, TypeError, ImportError) as error:
        return _fail(error, USAGE)
    return OK


def _fail(error: Exception, status: int) -> int:
    print(f"lines-merge: {error}", file=sys.stderr)
    return status


def _common(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that were given, under the names of `merge_files`."""
    given = {
        name: value
        for name in [
            "alpha",
            "beta",
            "norm",
            "method",
            "schedule",
            "outside",
            "towers",
            "max_memory",
            "threads",
            "shard_size",
            "dtype",
            "buffers",
            "vocab",
        ]
        if (value := getattr(arguments, name, None)) is not None
    }
    flags = ("overwrite", "verify", "allow_nonfinite", "allow_gaps")
    given.update({name: True for name in flags if getattr(arguments, name, False)})
    if getattr(arguments, "no_strict", False):
        given["strict"] = False
    if getattr(arguments, "no_lines", False):
        given["lines"] = False
    for name in ("alpha", "outside"):
        if isinstance(given.get(name), str) and given[name] not in {"auto", "alpha", "depth"}:
            given[name] = _number(given[name], name)
    if arguments.pattern:
        from .depth import DepthMap

        given["depth"] = DepthMap.from_patterns(arguments.pattern)
    elif arguments.family:
        given["depth"] = arguments.family
    return given


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"--{name} must be a word that it knows or a number, got {text!r}"
        ) from None


def _request(arguments: argparse.Namespace) -> tuple[str, list[str], dict[str, Any]]:
    """Return base, models and keyword arguments of the merge that a subcommand stands for."""
    from .schedule import from_gamma
    from .soups import check_fraction

    given = _common(arguments)
    if arguments.command == "edit":
        alpha, beta = from_gamma(arguments.gamma, arguments.alpha, arguments.beta)
        return arguments.base, [arguments.finetuned], {**given, "alpha": alpha, "beta": beta}
    if arguments.command == "wise-ft":
        gamma = check_fraction(gamma=arguments.gamma)
        scaled = {"alpha": gamma * arguments.alpha, "beta": gamma * arguments.beta}
        return arguments.base, [arguments.finetuned], {**given, **scaled}
    if arguments.command == "soup":
        return arguments.base, arguments.models, {**given, "method": "average"}
    for name in _METHOD_OPTIONS:
        value = getattr(arguments, name)
        if value is not None:
            given[name] = value[0] if name == "lambdas" and len(value) == 1 else value
    if getattr(arguments, "recipe", None):
        if arguments.base or arguments.models:
            raise ValueError("pass BASE and models, or --recipe, not both")
        from .io.recipe import load_recipe

        recipe = {**load_recipe(arguments.recipe), **given}
        if isinstance(recipe.get("depth"), dict):
            from .depth import DepthMap

            recipe["depth"] = DepthMap.from_json(recipe["depth"]["map"])
        return recipe.pop("base"), recipe.pop("models"), recipe
    if not arguments.base or not arguments.models:
        raise ValueError("pass BASE and at least one model, or --recipe")
    return arguments.base, arguments.models, given


def _run(arguments: argparse.Namespace) -> None:
    from .io.stream import merge_files, plan_files, sweep_files

    base, models, given = _request(arguments)
    progress = not arguments.quiet
    if arguments.dry_run:
        plan = plan_files(base, models, **given)
        print(json.dumps(vars(plan)) if arguments.json else plan)
        return
    if arguments.command == "sweep":
        reports = sweep_files(
            base, models, arguments.out, arguments.betas, progress=progress, **given
        )
        if arguments.json:
            print(json.dumps([report.to_dict() for report in reports]))
        else:
            print("\n\n".join(map(str, reports)))
        return
    report = merge_files(base, models, arguments.out, progress=progress, **given)
    print(json.dumps(report.to_dict()) if arguments.json else report)


def _inspect(arguments: argparse.Namespace) -> None:
    """Print the depth table; with a second checkpoint, update norms by block and what differs."""
    from .schedule import factors, resolve_depth
    from .sources import FLOATS, open_source
    from .study import block_norms, differences

    given = _common(arguments)
    base = open_source(arguments.base)
    names = [name for name, info in base.tensors.items() if info.dtype in FLOATS]
    depth = resolve_depth(
        given.get("depth", "auto"), names, allow_gaps=given.get("allow_gaps", False)
    )
    keywords = {k: given[k] for k in ("schedule", "outside", "towers") if k in given}
    values = factors(depth, arguments.alpha, arguments.beta, **keywords)
    tuned = open_source(arguments.finetuned) if arguments.finetuned else None
    found = differences(base, tuned) if tuned else []
    norms = block_norms(base, tuned, depth) if tuned and not found else []
    if arguments.json:
        table = {
            name: {"block": depth[name], "factor": values[name], "shape": base.tensors[name].shape}
            for name in names
        }
        rows = [{"block": label, "update": update, "base": size} for label, update, size in norms]
        print(json.dumps({"tensors": table, "differences": found, "norms": rows}))
        return
    print(depth.describe(arguments.alpha, arguments.beta, **keywords))
    for line in found:
        print("differs:", line)
    if norms:
        print(f"\n{'block':32}  {'||update||':>12}  {'||base||':>12}  ratio")
    for label, update, size in norms:
        print(f"{label:32}  {update:12.5g}  {size:12.5g}  {update / size if size else 0:.5f}")


if __name__ == "__main__":
    sys.exit(main())
