"""Command line: `mi-surrogates run | resume | report | estimate | problems`. Results on stdout."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mi_surrogates.design import DesignSpace

NUMBERS = ("iterations", "workers", "timeout")  # of a run that may change when it goes on
METHODS = ("mine", "nwj", "infonce", "js", "smile", "ba", "ksg", "gaussian")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mi-surrogates", description=__doc__)
    from mi_surrogates import __version__

    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object")
    common.add_argument("--quiet", action="store_true", help="no progress")

    loop = argparse.ArgumentParser(add_help=False)
    loop.add_argument("--workers", type=int, help="processes for the simulator (1)")
    loop.add_argument("--iterations", type=int, help="at most (30)")
    loop.add_argument("--timeout", type=float, help="seconds for one call (with --workers > 1)")

    run = commands.add_parser("run", parents=[common, loop], help="optimise a simulator's design")
    run.add_argument("simulator", help="package.module:name of a callable (theta, n, seed) -> x, y")
    run.add_argument("--space", type=Path, required=True, help="TOML file with the parameters")
    run.add_argument("--objective", choices=("mi", "reco"), default="mi")
    run.add_argument(
        "--method", choices=METHODS, default="mine", help="estimator of --objective mi"
    )
    run.add_argument(
        "--surrogate", choices=("ensemble", "mlp", "quadratic", "gp"), default="ensemble"
    )
    run.add_argument(
        "--designs",
        type=lambda text: text if text == "auto" else int(text),
        default=20,
        help="of an iteration, or auto (20)",
    )
    run.add_argument("--events", type=int, default=400)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--checkpoint", type=Path, help="folder of the run")
    run.add_argument("--out", type=Path, help="file for the result (.pt)")

    resume = commands.add_parser(
        "resume", parents=[common, loop], help="go on with a run, with its own numbers by default"
    )
    resume.add_argument("checkpoint", type=Path)
    resume.add_argument("--out", type=Path, help="file for the result (.pt)")

    report = commands.add_parser("report", parents=[common], help="table or figure of a run")
    report.add_argument("checkpoint", type=Path)
    report.add_argument("--out", type=Path, help="a picture of objective and parameters")

    estimate = commands.add_parser("estimate", parents=[common], help="information in a data set")
    estimate.add_argument("data", type=Path, help="npz file with arrays x and y")
    estimate.add_argument("--method", default="ksg,ba,mine", help="comma-separated")
    estimate.add_argument("--units", choices=("nats", "bits"), default="nats")
    estimate.add_argument("--null", type=int, default=0, help="permutations for a p-value")
    estimate.add_argument("--seed", type=int, default=0)

    commands.add_parser("problems", parents=[common], help="the problems with known optimum")
    return parser


def load_space(path: Path) -> DesignSpace:
    """Read a design space from TOML.

    `[parameters.NAME]` has initial, lower, upper and optionally sigma, or for a `Choice` options and optionally
    initial; every `[[linear]]` has a (one number
    for each parameter), upper and optionally equal; every `[[soft]]` has function ("package.module:name" of
    a differentiable, batched function (B, F) to (B,)) and upper.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    from mi_surrogates.design import Choice, DesignSpace, Parameter

    with path.open("rb") as file:
        table: dict[str, Any] = tomllib.load(file)
    if not table.get("parameters"):
        raise ValueError(f"{path} has no [parameters.NAME] tables")
    if unknown := sorted(set(table) - {"parameters", "linear", "soft"}):
        raise ValueError(f"{path}: unknown tables {', '.join(unknown)}")
    try:
        space = DesignSpace(
            {
                name: Choice(**row) if "options" in row else Parameter(**row)
                for name, row in table["parameters"].items()
            }
        )
    except TypeError as error:
        raise ValueError(
            f"{path}: a parameter has initial, lower, upper, sigma, or options, initial; {error}"
        ) from None
    for row in table.get("linear", []):
        if not {"a", "upper"} <= set(row):
            raise ValueError(f"{path}: [[linear]] needs a and upper, got {sorted(row)}")
        space.add_linear(row["a"], row["upper"], equal=bool(row.get("equal", False)))
    for row in table.get("soft", []):
        if set(row) != {"function", "upper"}:
            raise ValueError(f"{path}: [[soft]] needs function and upper, got {sorted(row)}")
        function = load_callable(row["function"], "soft constraint")
        try:
            space.add_constraint(function, row["upper"])
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}: soft constraint {row['function']!r}: {reason}") from error
    return space


def load_callable(name: str, what: str = "simulator") -> Any:
    """Import `package.module:name`; the present folder is searched, too."""
    module, _, attribute = str(name).partition(":")
    if not attribute:
        raise ValueError(f"the {what} must be package.module:name, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"no module {error.name!r} for the {what} {name!r}") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"module {module!r} cannot be imported: {reason}") from error
    if not callable(getattr(found, attribute, None)):
        raise ValueError(f"{module} has no callable {attribute!r}")  # noqa: TRY004 (bad input)
    return getattr(found, attribute)


def _run(arguments: argparse.Namespace) -> int:
    spec = {
        key: getattr(arguments, key)
        for key in (
            "simulator",
            "objective",
            "method",
            "surrogate",
            "designs",
            "events",
            "seed",
        )
    }
    spec["space"] = str(arguments.space.resolve())
    spec.update(iterations=30, workers=1, timeout=None)
    return _optimize(spec, arguments)


def _resume(arguments: argparse.Namespace) -> int:
    file = arguments.checkpoint / "command.json"
    if not file.exists():
        raise ValueError(f"{arguments.checkpoint} is no run of this command line")
    return _optimize(json.loads(file.read_text(encoding="utf-8")), arguments)


def _remember(folder: Path, spec: dict[str, Any]) -> None:
    """Write down what `resume` goes on with; once a run has begun, only its numbers can change."""
    from mi_surrogates.loop.store import write_atomically

    file = folder / "command.json"
    if file.exists() and (folder / "config.json").exists():
        numbers = {key: spec[key] for key in NUMBERS}
        spec = {**json.loads(file.read_text(encoding="utf-8")), **numbers}
    write_atomically(file, json.dumps(spec, indent=1).encode())


def _optimize(spec: dict[str, Any], arguments: argparse.Namespace) -> int:
    from concurrent.futures import ProcessPoolExecutor

    from mi_surrogates.loop import MIObjective, optimize
    from mi_surrogates.loop.history import valid_json

    for key in NUMBERS:
        if getattr(arguments, key) is not None:
            spec[key] = getattr(arguments, key)
    workers = spec["workers"]
    if workers < 1:
        raise ValueError(f"--workers must be at least 1, got {workers}")
    simulator, space = load_callable(spec["simulator"]), load_space(Path(spec["space"]))
    if arguments.checkpoint is not None:
        _remember(arguments.checkpoint, spec)
    pool = ProcessPoolExecutor(workers) if workers > 1 else None
    try:
        result = optimize(
            simulator,
            space,
            MIObjective(spec["method"]) if spec["objective"] == "mi" else spec["objective"],
            surrogate=spec["surrogate"],
            designs=spec["designs"],
            events=spec["events"],
            seed=spec["seed"],
            iterations=spec["iterations"],
            executor=pool,
            timeout=spec["timeout"],
            checkpoint=arguments.checkpoint,
            progress=not arguments.quiet,
        )
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    if arguments.out is not None:
        result.save(arguments.out)
    summary = {
        "theta": result.theta_dict,
        "value": result.value,
        "stderr": result.stderr,
        "iterations": len(result.history),
        "events": result.events,
        "violation": result.constraint_violation,
        "status": result.status,
        "seconds": round(result.seconds, 2),
    }
    if arguments.json:
        print(json.dumps(valid_json(summary), allow_nan=False))
    else:
        for name, value in result.theta_dict.items():
            print(f"{name:20} {value}" if isinstance(value, str) else f"{name:20} {value:.6g}")
        print(f"{'objective':20} {result.value:.4g} ± {result.stderr:.2g}")
        print(f"{result.events} events, ended by {result.status} in {result.seconds:.1f} s")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from mi_surrogates.loop.history import History, Iteration, valid_json

    file = arguments.checkpoint / "history.jsonl"
    if not file.exists():
        raise ValueError(f"{arguments.checkpoint} has no finished iteration")
    # older runs have NaN in their lines
    rows = [valid_json(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    iterations = [Iteration.from_json(row) for row in rows]
    config = json.loads((arguments.checkpoint / "config.json").read_text(encoding="utf-8"))
    names = config["space"]["names"]
    if arguments.json:
        print(json.dumps({"names": names, "history": rows}, allow_nan=False))
    else:
        print(f"{'it':>4} {'events':>9} {'value':>9} {'±':>8}  step      " + "  ".join(names))
        for each in iterations:
            verdict = "accepted" if each.accepted else "rejected"
            design = "  ".join(f"{value:.4g}" for value in each.theta)
            print(
                f"{each.index:4} {each.events:9} {each.value:9.4f} {each.stderr:8.4f}  "
                f"{verdict}  {design}"
            )
    if arguments.out is not None:
        _picture(History(iterations, names), arguments.out)
    return 0


def _picture(history: Any, out: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        from mi_surrogates.errors import missing

        raise missing("matplotlib", "plot") from error
    import numpy as np

    from mi_surrogates.loop.history import OptimizeResult
    from mi_surrogates.plot import plot_result

    last = history[-1]
    nothing = np.zeros(0)
    result = OptimizeResult(
        np.array(last.theta),
        last.value,
        last.stderr,
        history.names,
        history,
        nothing,
        nothing,
        nothing,
        last.events,
        0.0,
        last.violation,
        "",
    )
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_result(result, "objective", left)
    plot_result(result, "parameters", right)
    figure.savefig(out)


def _estimate(arguments: argparse.Namespace) -> int:
    import numpy as np
    import torch

    from mi_surrogates.information import mutual_information
    from mi_surrogates.loop.history import valid_json

    if arguments.data.exists() and not zipfile.is_zipfile(arguments.data):
        raise ValueError(f"{arguments.data} is no npz file")
    with np.load(arguments.data) as data:
        if not {"x", "y"} <= set(data.files):
            raise ValueError(f"{arguments.data} must have arrays x and y, has {data.files}")
        x, y = data["x"], data["y"]
    batch = max(1, min(256, len(x) // 2))  # half of the events are trained on
    rows = []
    for method in arguments.method.split(","):
        if not arguments.quiet:
            print(f"{method} ...", file=sys.stderr)
        generator = torch.Generator().manual_seed(arguments.seed)
        est = mutual_information(
            x, y, method, units=arguments.units, generator=generator, batch_size=batch
        )
        row: dict[str, Any] = {
            "method": method,
            "value": est.value,
            "stderr": est.stderr,
            "bound": est.bound,
            "saturated": est.saturated,
        }
        if arguments.null:
            null = est.null(arguments.null)
            row.update(bias=null.bias, p_value=null.p_value)
        rows.append(row)
    if arguments.json:
        out = {"units": arguments.units, "events": len(x), "estimates": rows}
        print(json.dumps(valid_json(out), allow_nan=False))
        return 0
    print(f"{'method':10} {arguments.units:>9} {'±':>8}  bound")
    for row in rows:
        note = "  saturated" if row["saturated"] else ""
        extra = f"  p = {row['p_value']:.3g}" if arguments.null else ""
        print(
            f"{row['method']:10} {row['value']:9.4f} {row['stderr']:8.4f}  {row['bound']}{extra}{note}"
        )
    return 0


def _problems(arguments: argparse.Namespace) -> int:
    from mi_surrogates.problems import PROBLEMS

    rows = [
        {"name": p.name, "best": p.best, "theta": list(p.theta), "method": p.method}
        for p in PROBLEMS.values()
    ]
    if arguments.json:
        print(json.dumps(rows))
        return 0
    print(f"{'problem':20} {'nats':>9}  {'method':9} optimum")
    for row in rows:
        print(f"{row['name']:20} {row['best']:9.6f}  {row['method']:9} {row['theta']}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 for success, 1 for a failed run, 2 for bad input."""
    arguments = _parser().parse_args(argv)
    command = {
        "run": _run,
        "resume": _resume,
        "report": _report,
        "estimate": _estimate,
        "problems": _problems,
    }[arguments.command]
    try:
        return command(arguments)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"mi-surrogates: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"mi-surrogates: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
