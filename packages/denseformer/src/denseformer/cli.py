"""Command line: `denseformer train | bench | plot | inspect | suggest`. Results on stdout, progress on stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from denseformer.core.dwa import DWA

BASELINES = ("dense", "plain", "gains", "last_k", "final")


def _parser() -> argparse.ArgumentParser:
    from denseformer import __version__

    parser = argparse.ArgumentParser(prog="denseformer", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object")
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--quiet", action="store_true", help="no progress on stderr")
    geometry = argparse.ArgumentParser(add_help=False)
    geometry.add_argument("--depth", type=int, default=16)
    geometry.add_argument("--dilation", type=int, default=1)
    geometry.add_argument("--period", type=int, default=1)

    train = commands.add_parser("train", parents=[common, geometry], help="train a decoder on text")
    train.add_argument(
        "--data",
        default="pydoc",
        help="pydoc, tinyshakespeare, enwik8 or a text file, as bytes; openwebtext2 or pg19, as tokens of GPT-2",
    )
    train.add_argument(
        "--data-dir", type=Path, help="folder of downloads (default: the user's cache)"
    )
    train.add_argument("--baseline", choices=BASELINES, default="dense")
    train.add_argument(
        "--compare", type=int, metavar="SEEDS", help="plain, 1x1, 4x5 and gains, paired"
    )
    train.add_argument("--width", type=int, default=64)
    train.add_argument("--num-heads", type=int, default=4)
    train.add_argument("--context", type=int, default=64)
    train.add_argument("--batch", type=int, default=16)
    train.add_argument("--accumulate", type=int, default=1, help="parts of a batch")
    train.add_argument("--steps", type=int, default=600)
    train.add_argument("--every", type=int, default=150, help="steps between validations")
    train.add_argument("--lr", type=float, default=1e-3)
    train.add_argument("--delay", type=int, default=0, help="steps before the averages learn")
    train.add_argument(
        "--decay-dwa", action="store_true", help="weight decay on the averages, as published"
    )
    train.add_argument("--dropout", type=float, default=0.0)
    train.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    train.add_argument("--bf16", action="store_true", help="bfloat16 autocast, as published")
    train.add_argument("--compile", action="store_true", help="torch.compile, as published")
    train.add_argument("--out", type=Path, help="folder for results.json and model.safetensors")

    bench = commands.add_parser(
        "bench", parents=[common, geometry], help="time the averages on this machine"
    )
    bench.add_argument("--numel", type=int, default=131_072, help="elements of one representation")
    bench.add_argument("--repeats", type=int, default=5)
    bench.add_argument("--inference", action="store_true", help="forward only, without gradients")
    bench.add_argument(
        "--compiled", action="store_true", help="also the compiled loop (compiles for long)"
    )

    plot = commands.add_parser("plot", parents=[common], help="draw the weights of a checkpoint")
    plot.add_argument("checkpoint", type=Path)
    plot.add_argument("out", type=Path, help="picture to write")

    look = commands.add_parser(
        "inspect", parents=[common], help="geometry and largest weights of a checkpoint"
    )
    look.add_argument("checkpoint", type=Path)
    look.add_argument("--top", type=int, default=10)

    suggest = commands.add_parser(
        "suggest", parents=[common], help="dilations and periods for a depth"
    )
    suggest.add_argument("--depth", type=int, required=True)
    suggest.add_argument("--most", type=int, default=8, help="largest dilation and period")
    return parser


def _say(arguments: argparse.Namespace) -> Any:
    return (
        (lambda text: None)
        if arguments.quiet
        else (lambda text: print(text, file=sys.stderr, flush=True))
    )


def _train(arguments: argparse.Namespace) -> Any:
    from denseformer.core.geometry import check_int
    from denseformer.recipes import corpora, data
    from denseformer.recipes.compare import compare, study
    from denseformer.recipes.gpt import GPTConfig
    from denseformer.recipes.train import TrainConfig, train

    if arguments.data == "pydoc":
        corpus = data.pydoc()
    elif arguments.data in data.URLS:
        corpus = data.download(arguments.data, arguments.data_dir)
    elif arguments.data in corpora.TOKENISED:
        corpus = corpora.load(arguments.data, arguments.data_dir)
    else:
        corpus = data.text_file(arguments.data)
    vocabulary = corpora.VOCABULARY if arguments.data in corpora.TOKENISED else 256
    model = GPTConfig(
        arguments.depth, arguments.width, arguments.num_heads, vocabulary, arguments.context,
        arguments.baseline, arguments.dilation, arguments.period, arguments.dropout,
    )  # fmt: skip
    config = TrainConfig(
        model, arguments.steps, arguments.batch, arguments.lr, decay_dwa=arguments.decay_dwa,
        delay=arguments.delay, seed=arguments.seed, every=arguments.every, device=arguments.device,
        accumulate=arguments.accumulate, bf16=arguments.bf16, compile=arguments.compile,
    )  # fmt: skip
    say = _say(arguments)
    if arguments.compare is not None:
        check_int("compare", arguments.compare)
        seeds = range(arguments.seed, arguments.seed + arguments.compare)
        found = compare(config, corpus, seeds, progress=say)
        shown: Any = found["summary"]
    else:
        result = train(config, corpus.tokens, say)
        found = shown = {
            "corpus": {"bytes": corpus.size, "sha256": corpus.sha256},
            **study(result, corpus),
        }
        if arguments.out is not None:
            from safetensors.torch import save_file

            arguments.out.mkdir(parents=True, exist_ok=True)
            save_file(result.model.state_dict(), arguments.out / "model.safetensors")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        temporary = arguments.out / "results.json.tmp"
        temporary.write_text(json.dumps(found, indent=1))
        temporary.replace(arguments.out / "results.json")
    keep = ("first_loss", "validation", "train", "seconds")
    return shown if arguments.json or arguments.compare is not None else {k: shown[k] for k in keep}


def _bench(arguments: argparse.Namespace) -> Any:
    import torch

    from denseformer.recipes.bench import METHODS, measure

    torch.manual_seed(arguments.seed)
    names = [n for n in METHODS if arguments.compiled or n != "compiled loop"]
    times = measure(
        arguments.depth, arguments.dilation, arguments.period, numel=arguments.numel, methods=names,
        repeats=arguments.repeats, train=not arguments.inference,
    )  # fmt: skip
    return {f"{name} (ms)": round(value, 3) for name, value in times.items()}


def read_dwa(path: Path) -> DWA:
    """Return the averages found in a checkpoint (``.safetensors``, or what ``torch.save`` wrote).

    Raises:
        ValueError: no checkpoint; none, several, or a mask (whose pattern a checkpoint does not hold).
        TypeError: something else than a state dict.
        OSError: the file cannot be read.
    """
    from denseformer.core.dwa import DWA
    from denseformer.core.geometry import PATTERNS, describe_code

    state = _read(path)
    found = [
        k[: -len("geometry")]
        for k, v in state.items()
        if k.endswith("geometry") and v.shape == (7,) and k[: -len("geometry")] + "weight" in state
    ]
    if len(found) != 1:
        raise ValueError(
            f"{path} holds {len(found)} sets of averages (keys ending in 'geometry'), expected 1"
        )
    code = state[found[0] + "geometry"].tolist()
    if (said := describe_code(code)).startswith("unknown"):
        raise ValueError(f"{path} holds averages of an {said}")
    _, depth, k, p, groups, kind, last = code
    if PATTERNS[kind] == "mask":
        raise ValueError(
            f"{path} holds averages with a mask, which cannot be rebuilt from a checkpoint"
        )
    weight = state[found[0] + "weight"]
    dwa = DWA(depth, k, p, pattern=PATTERNS[kind], last_k=last, groups=groups, dtype=weight.dtype)
    if weight.shape != dwa.weight.shape:
        raise ValueError(f"{path} holds {tuple(weight.shape)} weights for {dwa.spec}")
    dwa.load_state_dict({"weight": weight, "geometry": state[found[0] + "geometry"]})
    return dwa


def _read(path: Path) -> dict[str, Any]:
    """Return the tensors of a checkpoint by name."""
    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ImportError):
        raise
    except (
        Exception
    ) as error:  # each reader has errors of its own for a file it cannot make sense of
        raise ValueError(f"{path} is no checkpoint that can be read: {error}") from error
    if not isinstance(state, dict):
        raise TypeError(f"{path} holds a {type(state).__name__}, expected a state dict")
    return {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and isinstance(k, str)}


def _plot(arguments: argparse.Namespace) -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from denseformer.analysis import plot_weights

    figure = plot_weights(read_dwa(arguments.checkpoint))
    figure.savefig(arguments.out, dpi=150)
    return {"written": str(arguments.out)}


def _inspect(arguments: argparse.Namespace) -> Any:
    from denseformer.analysis import off_diagonal

    if arguments.top < 0:
        raise ValueError(f"top must be at least 0, got {arguments.top}")
    dwa = read_dwa(arguments.checkpoint)
    pairs = [(i, j) for i in dwa.rows for j in dwa.sources(i)]
    values = dwa.weight.detach().tolist()
    off = [(v, i, j) for v, (i, j) in zip(values, pairs, strict=True) if i != j]
    off.sort(key=lambda entry: -abs(entry[0]))
    rest = off_diagonal(dwa)
    return {
        "geometry": str(dwa.spec),
        "weights": dwa.spec.nnz,
        "sparsity": dwa.spec.sparsity,
        "diagonal": {str(i): v for v, (i, j) in zip(values, pairs, strict=True) if i == j},
        "mean_off_diagonal": float(rest.abs().mean()) if len(rest) else 0.0,
        "largest": [{"i": i, "j": j, "weight": v} for v, i, j in off[: arguments.top]],
    }


def _suggest(arguments: argparse.Namespace) -> Any:
    from denseformer.core.suggest import suggest

    return [asdict(s) for s in suggest(arguments.depth, arguments.most)]


def _show(result: Any) -> None:
    if isinstance(result, list):
        keys = list(result[0])
        print("  ".join(f"{k:>9}" for k in keys))
        for entry in result:
            print("  ".join(f"{entry[k]:>9}" for k in keys))
        return
    for key, value in result.items():
        print(f"{key:24} {value}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, or 2 for bad input."""
    arguments = _parser().parse_args(argv)
    run = {
        "train": _train,
        "bench": _bench,
        "plot": _plot,
        "inspect": _inspect,
        "suggest": _suggest,
    }
    try:
        result = run[arguments.command](arguments)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"denseformer: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        _show(result)
    return 0
