"""The command line: ``lcnn`` or ``python -m lcnn.cli``."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["main"]

NETWORKS = ("digits", "small-cnn", "resnet18", "resnet34", "vgg11")


class _Usage(Exception):
    """Bad input, told in one line."""


class _Parser(argparse.ArgumentParser):
    """Tells bad usage in one line; the usage itself is what --help shows."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(text, file=sys.stderr, flush=True)


def _answer(args: argparse.Namespace, data: dict[str, Any]) -> None:
    if args.json:
        print(json.dumps(data, indent=1))
        return
    for key, value in data.items():
        print(f"{key:14} {f'{value:.4f}' if isinstance(value, float) else value}")


def _network(arch: str, classes: int, channels: int, size: int, lcnn: bool) -> Any:
    """A network of its own, of timm, or what ``module:callable`` returns."""
    from lcnn.recipes import models

    paper = {"resnet18": models.resnet18, "resnet34": models.resnet34, "vgg11": models.vgg11}
    if arch in paper:
        return paper[arch](classes, lcnn=lcnn, in_channels=channels, size=size)
    if arch in ("digits", "small-cnn"):
        make = models.digits_net if arch == "digits" else models.small_cnn
        return make(classes)
    module, colon, name = arch.partition(":")
    if not colon:
        raise _Usage(
            f"unknown --arch {arch!r}: one of {', '.join(NETWORKS)}, timm:NAME, or module:callable"
        )
    try:
        if module == "timm":
            timm = importlib.import_module("timm")
            return timm.create_model(name, num_classes=classes, in_chans=channels)
        return getattr(importlib.import_module(module), name)()
    except Exception as error:  # whatever the user's own code raises
        raise _Usage(f"cannot make {arch!r}: {error}") from error


def _data(args: argparse.Namespace) -> Any:
    from lcnn.recipes import data

    try:
        return data.load(args.dataset, args.data_dir, args.seed)
    except (OSError, ImportError) as error:
        raise _Usage(str(error)) from error


def _read(path: str) -> dict[str, Any]:
    import torch

    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return dict(load_file(path))
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises many kinds
        raise _Usage(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise _Usage(f"{path} holds a {type(found).__name__}, not a state dict")
    return dict(found)


def _folder(path: str) -> Path:
    """Return the folder of a file to be written, or refuse."""
    parent = Path(path).parent
    if not parent.is_dir():
        raise _Usage(f"cannot write {path}: no such folder")
    return parent


def _write(state: dict[str, Any], path: str) -> None:
    """Write to a temporary name and rename, so that an interrupted run leaves the old file whole."""
    import torch

    target = Path(path)
    handle, name = tempfile.mkstemp(dir=_folder(path), suffix=target.suffix)
    os.close(handle)
    try:
        if target.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file({k: v.contiguous().clone() for k, v in state.items()}, name)
        else:
            torch.save(state, name)
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)


def _built(args: argparse.Namespace, split: Any) -> Any:
    """The network of ``--arch`` as ``--method`` needs it."""
    from lcnn.recipes.methods import METHODS, build, with_own_activations

    x = split.x
    row = METHODS[args.method]
    classes = int(split.y.max()) + 1
    try:
        full = row.beta is None and not row.layers
        plain = _network(args.arch, classes, x.shape[1], x.shape[-1], lcnn=full)
        if args.arch not in NETWORKS[2:]:
            return build(plain, args.method, x[:2])
        return plain if full else with_own_activations(plain, row.beta)
    except (RuntimeError, ValueError, TypeError) as error:
        raise _Usage(f"cannot convert {args.arch!r}: {error}") from error


def _loaded(args: argparse.Namespace, split: Any) -> Any:
    model = _built(args, split)
    try:
        model.load_state_dict(_read(args.checkpoint))
    except RuntimeError as error:
        raise _Usage(f"{args.checkpoint} is not of this network: {str(error)[:200]}") from error
    return model.eval()


def _train(args: argparse.Namespace) -> int:
    import torch

    from lcnn.recipes.train import Recipe, betas, measure, train

    torch.set_num_threads(args.threads)
    if args.out:
        _folder(args.out)  # before the time is spent
    if not all(math.isfinite(r) and r >= 0 for r in args.radii):
        raise _Usage(f"--radii must be finite numbers of at least 0, got {args.radii}")
    split = _data(args)
    overrides = {k: v for k in ("gradnorm",) if (v := getattr(args, k)) is not None}
    recipe = Recipe(
        args.method,
        args.epochs,
        args.batch_size,
        args.lr,
        seed=args.seed,
        flip=args.dataset.startswith("cifar"),
        pad=4 if args.dataset.startswith(("cifar", "svhn")) else 0,
        overrides=overrides,
    )
    run = train(
        lambda: _built(args, split), split.x, split.y, recipe, lambda t: _say(args, t), ready=True
    )
    n = min(args.limit, len(split.test_y))
    found = measure(run.model, split.test_x[:n], split.test_y[:n], args.radii, iters=10)
    if args.out:
        _write(run.model.state_dict(), args.out)
        _say(args, f"wrote {args.out}")
    _answer(
        args, {"method": args.method, **found, "betas": betas(run.model), "seconds": run.seconds}
    )
    return 0


def _eval(args: argparse.Namespace) -> int:
    from lcnn.study.attacks import robust_accuracy

    split = _data(args)
    model = _loaded(args, split)
    n = min(args.limit, len(split.test_y))
    batches = list(zip(split.test_x[:n].split(256), split.test_y[:n].split(256), strict=True))
    found = robust_accuracy(model, batches, [0.0, *args.radii])
    _answer(args, {f"radius {radius:g}": value for radius, value in found.items()})
    return 0


def _probe(args: argparse.Namespace) -> int:
    from lcnn.core.bound import hessian_bound
    from lcnn.study.curvature import curvature

    split = _data(args)
    model = _loaded(args, split)
    n = min(args.limit, len(split.test_y))
    x, y = split.test_x[:n], split.test_y[:n]
    found = curvature(model, x, y, method=args.probe, iters=args.iters, chunk=128)
    bound = hessian_bound(model, with_loss=True)
    data = {
        name: getattr(found, name).mean().item()
        for name in ("grad_norm", "hessian_norm", "curvature", "residual")
    }
    data |= {"hessian_bound": float(bound.hessian.detach()), "unbounded": bound.unbounded}
    _answer(args, data)
    return 0


def _convert(args: argparse.Namespace) -> int:
    import torch

    from lcnn.adapters.convert import convert
    from lcnn.adapters.restore import load_pretrained

    state = _read(args.input)
    shape = tuple(args.input_size)
    plain = _network(args.arch, args.classes, shape[0], shape[-1], lcnn=False)
    try:
        made = convert(plain, torch.zeros(1, *shape))
        load_pretrained(made, state)
    except (RuntimeError, ValueError, TypeError) as error:
        raise _Usage(f"cannot convert {args.input}: {str(error)[:300]}") from error
    _write(made.state_dict(), args.output)
    report: Any = made.lcnn_report
    _say(args, str(report))
    _answer(
        args, {"converted": len(report.converted), "left": len(report.left), "out": args.output}
    )
    return 0


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _parser() -> _Parser:
    from lcnn import __version__

    parser = _Parser(prog="lcnn", description="Low-curvature neural networks.")
    parser.add_argument("--version", action="version", version=f"lcnn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    def command(name: str, run: Any, text: str) -> _Parser:
        sub: _Parser = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.add_argument("--quiet", action="store_true", help="no progress on stderr")
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--arch", default="digits", help="network, timm:NAME, or module:callable")
        return sub

    def on_data(sub: _Parser) -> None:
        from lcnn.recipes.data import DATASETS
        from lcnn.recipes.methods import METHODS

        sub.add_argument("--dataset", choices=DATASETS, default="digits")
        sub.add_argument("--data-dir", help="folder of the data; default: the user's cache")
        sub.add_argument("--method", choices=list(METHODS), default="lcnn")
        sub.add_argument("--limit", type=_positive, default=256, help="test samples to measure")
        sub.add_argument("--radii", type=float, nargs="*", default=[0.1, 0.2, 0.3])

    sub = command("train", _train, "Train one row of the comparison and measure it.")
    on_data(sub)
    sub.add_argument("--epochs", type=_positive, default=10)
    sub.add_argument("--batch-size", type=_positive, default=64)
    sub.add_argument("--lr", type=float, default=0.1)
    sub.add_argument("--gradnorm", type=float, help="weight of the gradient-norm term")
    sub.add_argument("--threads", type=_positive, default=1)
    sub.add_argument("--out", help="where to write the weights (.pt or .safetensors)")

    sub = command("eval", _eval, "Accuracy under l2 PGD.")
    on_data(sub)
    sub.add_argument("--checkpoint", required=True)

    sub = command(
        "probe", _probe, "Gradient norm, Hessian norm, curvature, and the provable bound."
    )
    on_data(sub)
    sub.add_argument("--checkpoint", required=True)
    sub.add_argument("--probe", choices=("power", "lanczos", "exact"), default="lanczos")
    sub.add_argument("--iters", type=_positive, default=10)

    sub = command("convert", _convert, "Convert a checkpoint of the plain network.")
    sub.add_argument("input")
    sub.add_argument("output")
    sub.add_argument("--classes", type=_positive, default=10)
    sub.add_argument("--input-size", type=_positive, nargs=3, default=[1, 8, 8], metavar="N")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 for success, 2 for bad usage or input."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
    except (_Usage, ValueError) as error:
        print(f"lcnn {args.command}: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
