"""Command line: bench, experiment, train, convert-checkpoint, info.

Results go to stdout, progress to stderr. Exit status: 0 done, 1 the work ran and a claim of it failed,
2 bad usage or input.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hypermixer import __version__

Rows = list[list[str]]


def table(columns: Sequence[str], rows: Rows) -> str:
    """Lay a table out in plain text."""
    widths = [max(len(row[i]) for row in [list(columns), *rows]) for i in range(len(columns))]
    lines = [list(columns), ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _progress(args: argparse.Namespace) -> Callable[[str], None]:
    def say(line: str) -> None:
        if not args.quiet:
            print(line, file=sys.stderr, flush=True)

    return say


def _show(args: argparse.Namespace, content: dict[str, Any], text: str) -> None:
    if args.out is not None:
        from hypermixer.experiments.common import write_json

        write_json(args.out, content)
    print(json.dumps(content, indent=2) if args.json else text)


def _claims(content: dict[str, Any]) -> tuple[str, int]:
    claims = content["claims"]
    rows = [
        [c["claim"], c["baseline"], c["ours"], "holds" if c["holds"] else "FAILS"] for c in claims
    ]
    text = "\n\n" + table(["claim", "baseline", "ours", "verdict"], rows) if rows else ""
    return text, 0 if all(c["holds"] for c in claims) else 1


def _experiment(args: argparse.Namespace) -> int:
    from hypermixer.experiments import run_experiment

    options: dict[str, Any] = {"seeds": args.seeds, "progress": _progress(args)}
    for name in ("steps", "fraction", "data_dir", "mixers"):
        value = getattr(args, name)
        if value is not None:
            options[name] = value.split(",") if name == "mixers" else value
    try:
        content = run_experiment(args.name, **options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ValueError(f"the experiment {args.name} does not take that option: {error}") from None
    columns = list(content["summary"][0])
    rows = [
        [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()]
        for row in content["summary"]
    ]
    text, status = _claims(content)
    _show(args, content, table(columns, rows) + text)
    return status


def _train(args: argparse.Namespace) -> int:
    import torch

    from hypermixer.baselines import count_parameters
    from hypermixer.experiments import classification as task
    from hypermixer.experiments.common import (
        accuracy,
        cross_entropy,
        environment,
        sample_batches,
        train,
    )

    say = _progress(args)
    train_part, test_part, options = task.LOADERS[args.task](args.seed, args.data_dir)
    torch.manual_seed(args.seed)
    name = {"transformer": "attention", "linear-transformer": "linear-attention"}.get(
        args.model, args.model
    )
    model = task.build(name, options, embed_dim=args.embed_dim, num_layers=args.num_layers)
    steps = task.STEPS[args.task] if args.steps is None else args.steps
    say(f"training {args.model} on {args.task}: {steps} steps")
    source = sample_batches(train_part, 32, args.seed)
    train(model, source, cross_entropy, steps, learning_rate=args.learning_rate)
    content = {
        "task": args.task,
        "model": args.model,
        "parameters": count_parameters(model),
        "steps": steps,
        "seed": args.seed,
        "accuracy": accuracy(model, test_part),
        "environment": environment(),
    }
    if args.save is not None:
        torch.save(model.state_dict(), args.save)
    text = f"{args.task}  {args.model}  {content['accuracy']:.2f} % of the test part"
    _show(args, content, text)
    return 0


def _bench(args: argparse.Namespace) -> int:
    from hypermixer.experiments.cost import measure_lengths

    content = measure_lengths(
        lengths=args.lengths,
        embed_dim=args.embed_dim,
        hidden_dim=args.hidden_dim,
        num_heads=args.num_heads,
        repeats=args.repeats,
        backward=args.backward,
        progress=_progress(args),
    )
    columns = ["N", *content["forms"]]
    rows = [
        [
            str(row["length"]),
            *(f"{row[form]:.2f} ms" if form in row else "-" for form in content["forms"]),
        ]
        for row in content["rows"]
    ]
    _show(args, content, table(columns, rows))
    return 0


def _convert(args: argparse.Namespace) -> int:
    from hypermixer.adapters.checkpoints import convert_checkpoint

    content = convert_checkpoint(args.input, args.output)
    lines = [f"{layer}: num_heads={heads}" for layer, heads in content["layers"].items()]
    _show(args, content, "\n".join([f"wrote {args.output}", *lines]))
    return 0


def _info(args: argparse.Namespace) -> int:
    from hypermixer.adapters.checkpoints import layer_sizes
    from hypermixer.analysis import layer_cost
    from hypermixer.mixing import HyperMixing

    if Path(args.model).exists():
        layers = layer_sizes(args.model)
    else:
        try:
            d, hidden, heads = (int(part) for part in args.model.split(","))
        except ValueError:
            raise ValueError(
                f"MODEL must be a checkpoint file or d,d',H such as 512,2048,8; got {args.model!r}"
            ) from None
        layers = {"layer": {"embed_dim": d, "hidden_dim": hidden, "num_heads": heads}}
    content: dict[str, Any] = {"length": args.length, "layers": {}}
    rows = []
    for name, sizes in layers.items():
        layer = HyperMixing(**sizes, token_info=None, device="meta")
        cost = layer_cost(layer, args.length)
        # JSON has no infinity: null says that the direct form is always the cheaper one.
        crossover = cost.crossover if math.isfinite(cost.crossover) else None
        content["layers"][name] = {**sizes, **vars(cost), "crossover": crossover}
        rows.append(
            [
                name,
                str(layer.embed_dim),
                str(layer.hidden_dim),
                str(layer.num_heads),
                f"{cost.parameters:,}",
                f"{cost.direct / 1e6:,.1f}",
                f"{cost.factored / 1e6:,.1f}",
                f"{cost.crossover:.1f}",
            ]
        )
    columns = ["layer", "d", "d'", "H", "parameters", "direct MFLOP", "factored MFLOP", "N*"]
    _show(args, content, f"N = {args.length}\n" + table(columns, rows))
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _fraction(text: str) -> float:
    number = float(text)
    if not 0.0 < number <= 1.0:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {number}")
    return number


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON instead of a table")
    common.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON there")
    common.add_argument("--quiet", action="store_true", help="no progress on stderr")
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--data-dir", type=Path, help="folder of sst2/, agnews/, trec/")
    parser = argparse.ArgumentParser(prog="hypermixer", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"hypermixer {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str,
        function: Callable[[argparse.Namespace], int],
        text: str,
        *more: argparse.ArgumentParser,
    ) -> argparse.ArgumentParser:
        # Without abbreviations: --seed must not pass for --seeds.
        command = commands.add_parser(
            name, help=text, description=text, parents=[common, *more], allow_abbrev=False
        )
        command.set_defaults(function=function)
        return command

    bench = add("bench", _bench, "time HyperMixing and attention against the length")
    bench.add_argument("--lengths", type=_positive, nargs="+", default=[64, 256, 1024, 4096])
    bench.add_argument("--embed-dim", type=_positive, default=256)
    bench.add_argument("--hidden-dim", type=_positive, default=512)
    bench.add_argument("--num-heads", type=_positive, default=8)
    bench.add_argument("--repeats", type=_positive, default=7)
    bench.add_argument("--backward", action="store_true", help="forward and backward")

    experiment = add("experiment", _experiment, "run an experiment over several seeds", data)
    experiment.add_argument("name", help="shapes, listops, digits, topics-pair, sst2, agnews, ...")
    experiment.add_argument("--seeds", type=_positive, default=3, help="how many: 0, 1, ...")
    experiment.add_argument("--steps", type=_positive)
    experiment.add_argument("--fraction", type=_fraction, help="of the training data")
    experiment.add_argument("--mixers", help="comma-separated names")

    train = add("train", _train, "train one classifier", data)
    train.add_argument(
        "--task",
        required=True,
        choices=["digits", "listops", "topics-pair", "sst2", "agnews", "trec"],
    )
    train.add_argument("--model", default="hypermixer", help="hypermixer, transformer, fnet, ...")
    train.add_argument("--steps", type=_positive)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--embed-dim", type=_positive, default=64)
    train.add_argument("--num-layers", type=_positive, default=2)
    train.add_argument("--learning-rate", type=float, default=2e-3)
    train.add_argument("--save", type=Path, help="write the state dict there")

    convert = add(
        "convert-checkpoint",
        _convert,
        "rename the authors' or SpeechBrain's HyperMixing parameters in a checkpoint",
    )
    convert.add_argument("input", type=Path)
    convert.add_argument("output", type=Path, help="*.safetensors or *.pt")

    info = add("info", _info, "parameters, FLOPs and the crossover length of layers")
    info.add_argument("model", help="a checkpoint file, or d,d',H")
    info.add_argument("--length", type=_positive, default=1024, help="N")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = build_parser().parse_args(argv)
    try:
        status: int = args.function(args)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"hypermixer: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
