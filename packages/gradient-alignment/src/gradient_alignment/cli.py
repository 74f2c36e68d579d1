"""The command line: ``gradient-alignment`` or ``python -m gradient_alignment.cli``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(text, file=sys.stderr, flush=True)


def _answer(args: argparse.Namespace, data: Any, lines: Sequence[str]) -> None:
    print(json.dumps(data, indent=1) if args.json else "\n".join(lines))


def _data(args: argparse.Namespace) -> Any:
    from gradient_alignment.recipes.data import load

    folder = Path(args.data_dir) if args.data_dir else None
    return load(args.dataset, folder, args.seed)


def _network(path: str, data: Any) -> Any:
    """Return the network of a checkpoint, or raise ValueError where it takes other images or has other classes."""
    from gradient_alignment.recipes.train import load_checkpoint

    model, saved = load_checkpoint(Path(path))
    own = (*saved["shape"], saved["num_classes"])
    wanted = (*data.train_x.shape[1:], data.num_classes)
    if own != wanted:
        raise ValueError(
            f"{path} was trained on images {own[:-1]} of {own[-1]} classes, the data set has {wanted[:-1]} of {wanted[-1]}"
        )
    return model


def _train(args: argparse.Namespace) -> int:
    from gradient_alignment.recipes.train import CIFAR_SCHEDULE, Config, save, train

    given: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("weight", "stability", "threshold", "estimator", "sigma", "num_samples", "bn")
        if getattr(args, name) is not None
    }
    settings: dict[str, Any] = dict(CIFAR_SCHEDULE) if args.dataset.startswith("cifar") else {}
    for name in ("model", "epochs", "lr", "batch_size"):
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    config = Config(
        **settings,
        regularizer=args.regularizer,
        options=given,
        preset=args.preset,
        seed=args.seed,
    )
    data = _data(args)
    trained = train(
        data,
        config,
        lambda epoch, loss: _say(args, f"epoch {epoch} of {config.epochs}: loss {loss:.4f}"),
    )
    summary = {
        "model": config.model,
        "regularizer": config.regularizer,
        "accuracy": trained.accuracy,
        "seconds": round(trained.seconds, 2),
        "terms": trained.terms,
    }
    if args.out:
        save(trained, Path(args.out), data)
        summary["out"] = args.out
    _answer(args, summary, [f"{name}: {value}" for name, value in summary.items()])
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from gradient_alignment.recipes.evaluate import evaluate, svm_judge

    data = _data(args)
    model = _network(args.checkpoint, data)
    judge = svm_judge(data) if args.judge == "svm" else _network(args.judge, data)
    _say(args, f"sampling {args.samples} images in {args.steps} steps")
    found = evaluate(
        model,
        data,
        judge,
        num_samples=args.samples,
        steps=args.steps,
        num_images=args.images,
        seed=args.seed,
    )
    if args.out:
        from gradient_alignment.plots import image_rows

        rows = {str(k): found.samples[found.labels == k][:10] for k in range(data.num_classes)}
        image_rows(dict(list(rows.items())[:10])).savefig(args.out, dpi=110)
    summary = found.summary()
    _answer(args, summary, [f"{name}: {value}" for name, value in summary.items()])
    return 0


def _fool(args: argparse.Namespace) -> int:
    import gradient_alignment as ga
    from gradient_alignment.core.noise import check_count
    from gradient_alignment.recipes.evaluate import compare_fooled, drawn_pattern

    check_count("images", args.images)
    data = _data(args)
    model = _network(args.checkpoint, data).double()
    x, y = data.test_x[: args.images].double(), data.test_y[: args.images]
    pattern = drawn_pattern(tuple(x.shape[1:])).double()
    fooled = ga.fool(model, pattern, args.scale, args.kind)
    found = compare_fooled(model, fooled, pattern, x, y)
    if args.out:
        from gradient_alignment.plots import image_rows

        rows = {
            "image": x[:10],
            "logit gradient": ga.input_gradient(model, x[:10], y[:10]),
            "fooled": ga.input_gradient(fooled, x[:10], y[:10]),
            "centred": ga.input_gradient(fooled, x[:10], y[:10], of="centered"),
        }
        if len(x[0]) == 3:
            rows = {k: v if k == "image" else v.mean(1) for k, v in rows.items()}
        image_rows(rows, signed=list(rows)[1:]).savefig(args.out, dpi=110)
    summary = {
        "accuracy_before": found.accuracy[0],
        "accuracy_after": found.accuracy[1],
        "smallest_cosine_with_pattern": found.shown,
        "mean_cosine_before": found.own,
        "loss_gradient_change": found.loss_gradients,
    }
    _answer(args, summary, [f"{name}: {value:.4g}" for name, value in summary.items()])
    return 0


def _bench(args: argparse.Namespace) -> int:
    import torch

    from gradient_alignment.recipes.bench import compare_estimators
    from gradient_alignment.recipes.models import small_cnn

    torch.manual_seed(args.seed)
    model, y = small_cnn().eval(), torch.arange(args.images) % 10
    x = torch.rand(args.images, 1, 8, 8)
    rows = compare_estimators(
        model, x, y, sigmas=args.sigma, draws=args.draws, repeats=args.repeats, seed=args.seed
    )
    columns = list(vars(rows[0]))
    lines = ["\t".join(columns)]
    for row in rows:
        cells = vars(row).values()
        lines.append("\t".join(v if isinstance(v, str) else f"{v:.4g}" for v in cells))
    _answer(args, [row.summary() for row in rows], lines)
    return 0


def _parser() -> argparse.ArgumentParser:
    from gradient_alignment import __version__

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON")
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--quiet", action="store_true", help="no progress on stderr")
    common.add_argument("--out", help="file to write (checkpoint, or figure)")
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument(
        "--dataset", default="digits", help="digits, mnist, mnist-test, cifar10 or cifar100"
    )
    source.add_argument("--data-dir", help="where data files lie or are downloaded to")
    parser = argparse.ArgumentParser(
        prog="gradient-alignment", description="score matching for classifiers"
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(
        name: str, run: Callable[[argparse.Namespace], int], text: str, *parents: Any
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, parents=[common, *parents])
        command.set_defaults(run=run)
        return command

    p = add("train", _train, "train a classifier with a regulariser", source)
    p.add_argument("--model", help="small-cnn, resnet9/18/34, vgg5/7/11/14")
    p.add_argument("--regularizer", default="none", help="none, score, anti or gradient-norm")
    p.add_argument("--preset", choices=("paper", "code"), help="published settings")
    p.add_argument("--estimator", help="of the trace, such as taylor-cv or taylor")
    p.add_argument("--bn", choices=("shared", "frozen", "batch"))
    p.add_argument("--num-samples", type=int, help="draws for each image")
    for name in ("weight", "stability", "threshold", "sigma", "lr"):
        p.add_argument(f"--{name}", type=float)
    for name in ("epochs", "batch-size"):
        p.add_argument(f"--{name}", type=int)

    p = add("evaluate", _evaluate, "measure what input gradients are worth", source)
    p.add_argument("checkpoint", help="file of `gradient-alignment train --out`")
    p.add_argument("--judge", default="svm", help="svm, or another checkpoint")
    p.add_argument("--samples", type=int, default=200)
    p.add_argument("--steps", type=int, default=500)
    p.add_argument("--images", type=int, default=200, help="test images for gradients")

    p = add("fool", _fool, "make a classifier's saliency maps show a drawn pattern", source)
    p.add_argument("checkpoint", help="file of `gradient-alignment train --out`")
    p.add_argument("--kind", choices=("linear", "quadratic"), default="linear")
    p.add_argument("--scale", type=float, default=1000.0)
    p.add_argument("--images", type=int, default=200)

    p = add("bench", _bench, "bias, variance and time of every trace estimator")
    p.add_argument("--sigma", type=float, nargs="+", default=[0.01])
    p.add_argument("--draws", type=int, default=200)
    p.add_argument("--repeats", type=int, default=10)
    p.add_argument("--images", type=int, default=16)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 success, 2 bad usage or input."""
    args = _parser().parse_args(argv)
    try:
        if args.out and not Path(args.out).resolve().parent.is_dir():
            raise ValueError(f"--out: the folder of {args.out} does not exist")
        status: int = args.run(args)
        return status
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"gradient-alignment {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
