"""Command line: `lookahead-minmax game | spectrum | gan | eval`. Results on stdout, progress on stderr."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lookahead_minmax.games import Game

GAMES = ("bilinear", "stochastic", "dirac", "covariance", "rock-paper-scissors")
METHODS = ("gda", "alt", "eg", "ogda", "unrolled", "svre", "adam", "extraadam")


def _parser() -> argparse.ArgumentParser:
    from lookahead_minmax import __version__

    parser = argparse.ArgumentParser(prog="lookahead-minmax", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object")
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--out", type=Path, help="folder for the JSON and the picture")
    common.add_argument("--quiet", action="store_true", help="no progress")

    method = argparse.ArgumentParser(add_help=False, parents=[common])
    method.add_argument("--k", type=int, nargs="*", default=[], help="one period for each level")
    method.add_argument("--alpha", type=float, default=0.5)

    game = commands.add_parser("game", parents=[method], help="play a game with a known solution")
    game.add_argument("name", choices=GAMES)
    game.add_argument("--method", choices=METHODS, default="gda")
    game.add_argument("--lr", type=float, default=0.1)
    game.add_argument("--steps", type=int, default=500)
    game.add_argument("--starts", type=int, default=5)
    game.add_argument("--dimension", type=int, default=100)
    game.add_argument("--batch-size", type=int, help="components in a minibatch (stochastic)")

    spectrum = commands.add_parser(
        "spectrum", parents=[method], help="contraction of a method, and the best k"
    )
    spectrum.add_argument("--lr", type=float, default=0.1)
    spectrum.add_argument("--sigma", type=float, nargs="+", default=[1.0], help="one, or a range")
    spectrum.add_argument("--method", choices=METHODS[:4], default="gda")
    spectrum.add_argument("--suggest", action="store_true", help="also return the best k")

    gan = commands.add_parser("gan", parents=[method], help="train a GAN and watch its distance")
    gan.add_argument("--data", choices=("digits", "ring", "mnist"), default="digits")
    gan.add_argument("--data-dir", type=Path, help="folder with the files of MNIST")
    gan.add_argument("--base", choices=("alt", "extra", "unrolled"), default="alt")
    gan.add_argument("--optim", choices=("adam", "radam", "sgd"), default="adam")
    gan.add_argument("--rounds", type=int, default=3000)
    gan.add_argument("--d-iters", type=int, default=1)
    gan.add_argument("--unroll", type=int, default=20, help="steps (--base unrolled)")
    gan.add_argument("--lr", type=float, default=1e-3)
    gan.add_argument("--betas", type=float, nargs=2, default=(0.0, 0.9), help="Adam's and RAdam's")
    gan.add_argument("--batch-size", type=int, default=50)
    gan.add_argument("--ema", type=float, default=0.999)
    gan.add_argument("--resume", action="store_true", help="go on with the run in --out")
    gan.add_argument(
        "--train", action="store_true", help="MNIST's training images, not its test images"
    )
    gan.add_argument("--scale", choices=("0_1", "-1_1"), default="-1_1", help="range of the pixels")

    judge = commands.add_parser("eval", parents=[common], help="judge the run that gan --out saved")
    judge.add_argument("run", type=Path, help="the run's folder")
    judge.add_argument("--data-dir", type=Path, help="folder with the files of MNIST")
    judge.add_argument("--samples", type=int, help="of each generator; as many as real ones")
    judge.add_argument(
        "--fid", action="store_true", help="FID and inception score (torch-fidelity)"
    )
    judge.add_argument("--inception", type=Path, help="file of torch-fidelity's Inception weights")
    return parser


def _build_game(arguments: argparse.Namespace) -> Game:
    import torch

    from lookahead_minmax import games

    generator = torch.Generator().manual_seed(arguments.seed)
    size = arguments.dimension
    if size < 1:
        raise ValueError(f"--dimension must be at least 1, got {size}")
    if arguments.name == "bilinear":
        a, b = torch.randn(2, size, generator=generator, dtype=torch.float64)
        return games.Bilinear(torch.eye(size, dtype=torch.float64), a, b)
    if arguments.name == "stochastic":
        return games.StochasticBilinear(size, arguments.seed)
    if arguments.name == "dirac":
        return games.DiracGAN()
    if arguments.name == "covariance":
        return games.Covariance(torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64))
    return games.MatrixGame(torch.tensor([[0.0, 1, -1], [-1, 0, 1], [1, -1, 0]]).double())


def _game(arguments: argparse.Namespace) -> dict[str, Any]:
    from lookahead_minmax import games

    if arguments.batch_size is not None and arguments.name != "stochastic":
        raise ValueError("--batch-size belongs to the stochastic game")
    game = _build_game(arguments)
    lookahead = [(k, arguments.alpha) for k in arguments.k] or None
    options = {
        "steps": arguments.steps,
        "lr": arguments.lr,
        "starts": arguments.starts,
        "batch_size": arguments.batch_size,
        "seed": arguments.seed,
    }
    runs = {arguments.method: games.run(game, arguments.method, **options)}
    if lookahead:
        label = f"{arguments.method}, lookahead k={arguments.k}, alpha={arguments.alpha}"
        runs[label] = games.run(game, arguments.method, lookahead=lookahead, **options)
    if arguments.out is not None:
        from lookahead_minmax.plot import plot_distances

        _save(plot_distances(runs), arguments.out)
    return {
        label: {
            "start": run.distance[0].mean().item(),
            "end": run.distance[-1].mean().item(),
            "passes": run.oracle_calls[-1].item(),
        }
        for label, run in runs.items()
    }


def _spectrum(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from lookahead_minmax import spectral

    if len(arguments.sigma) > 2:
        raise ValueError("--sigma takes one singular value, or the smallest and the largest")
    result: dict[str, Any] = {}
    for sigma in arguments.sigma:
        jacobian = spectral.bilinear_jacobian(torch.full((1, 1), sigma, dtype=torch.float64))
        matrix = spectral.operator(jacobian, arguments.method, arguments.lr)
        row = {"round": spectral.spectral_radius(matrix)}
        if arguments.k:
            kept = len(matrix) - len(jacobian)  # the optimistic method's previous point
            period = spectral.lookahead_operator(matrix, arguments.k, arguments.alpha, kept=kept)
            row["period"] = spectral.spectral_radius(period)
            row["per_round"] = row["period"] ** (1 / arguments.k[-1])
        result[f"sigma {sigma:g}"] = row
    if arguments.suggest:
        low, high = min(arguments.sigma), max(arguments.sigma)
        best = spectral.suggest_k(arguments.lr, low, high, arguments.alpha, arguments.method)
        result["suggested"] = {"k": best.k, "per_round": best.rate}
    if arguments.out is not None:
        from lookahead_minmax.plot import plot_stability

        _save(plot_stability(arguments.alpha, arguments.method), arguments.out)
    return result


def _gan(arguments: argparse.Namespace) -> dict[str, Any]:
    from lookahead_minmax.gan import evaluate, train

    recipe = train.Recipe(
        data=arguments.data,
        train=arguments.train,
        scale=arguments.scale,
        base=arguments.base,
        k=tuple(arguments.k),
        alpha=arguments.alpha,
        rounds=arguments.rounds,
        d_iters=arguments.d_iters,
        unroll=arguments.unroll,
        optim=arguments.optim,
        lr=arguments.lr,
        betas=tuple(arguments.betas),
        batch_size=arguments.batch_size,
        ema=arguments.ema,
        seed=arguments.seed,
    )
    images, labels = train.load_images(recipe, arguments.data_dir)

    def report(done: int, distance: float) -> None:
        if not arguments.quiet:
            text = f"round {done}/{recipe.rounds}: Fréchet distance {distance:.2f}"
            print(text, file=sys.stderr, flush=True)

    checkpoint = None if arguments.out is None else arguments.out / "checkpoint.pt"
    if arguments.resume and checkpoint is None:
        raise ValueError("--resume needs the folder of the run: --out")
    features = train.feature_extractor(images, labels)
    curve = train.train(
        recipe, images, features, report, checkpoint=checkpoint, resume=arguments.resume
    )
    if arguments.out is not None:
        from lookahead_minmax.plot import plot_gan_curves

        _save(plot_gan_curves({"run": [curve]}), arguments.out)
    which = ["live", "ema", *(["ema_slow"] if curve.ema_slow else [])]
    result = {**curve.as_dict(), "summary": {name: curve.summary(name) for name in which}}
    if arguments.data == "ring":
        result["coverage"] = evaluate.ring_coverage(curve.samples)
    return result


def _eval(arguments: argparse.Namespace) -> dict[str, Any]:
    from lookahead_minmax.gan import evaluate, train

    if arguments.inception is not None and not arguments.fid:
        raise ValueError("--inception belongs to --fid")
    run = evaluate.load_run(arguments.run)
    images, labels = train.load_images(run.recipe, arguments.data_dir)
    count = len(images) if arguments.samples is None else arguments.samples
    samples = {name: run.sample(name, count, arguments.seed) for name in run.generators}
    features = train.feature_extractor(images, labels)
    result: dict[str, Any] = {"rounds": run.rounds, "samples": count}
    for name, made in samples.items():
        result[name] = {"distance": evaluate.feature_distance(features(images), features(made))}
        if run.recipe.data == "ring":
            result[name] |= evaluate.ring_coverage(made)
        if arguments.fid:
            if not arguments.quiet:
                print(f"{name}: Inception features", file=sys.stderr, flush=True)
            scores = evaluate.inception(images, made, run.recipe.scale, weights=arguments.inception)
            result[name] |= scores
    if arguments.out is not None:
        from lookahead_minmax.plot import plot_samples

        _save(plot_samples({name: made[:25] for name, made in samples.items()}), arguments.out)
    return result


def _save(axes: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(folder / "figure.png", dpi=110)


def _jsonable(value: Any) -> Any:
    """Return a result with None for infinite and undefined numbers, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(result: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, value in result.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}", *_lines(value, indent + "  ")]
        elif isinstance(value, float) and math.isfinite(value):
            lines.append(f"{indent}{key:12} {value:.6g}")
        else:
            lines.append(f"{indent}{key:12} {value}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns 0, or 2 for bad input."""
    arguments = _parser().parse_args(argv)
    if arguments.out is not None:
        import matplotlib as mpl

        mpl.use("Agg")
    commands = {"game": _game, "spectrum": _spectrum, "gan": _gan, "eval": _eval}
    try:
        result = commands[arguments.command](arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"lookahead-minmax: {error}", file=sys.stderr)
        return 2
    if arguments.out is not None:
        text = json.dumps(_jsonable(result), indent=1)
        (arguments.out / "result.json").write_text(text, encoding="utf-8")
    print(json.dumps(_jsonable(result)) if arguments.json else "\n".join(_lines(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
