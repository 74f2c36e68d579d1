"""A DCGAN with its training loop written out: what lookahead changes in it, and what to evaluate after it.

Without `--data-dir` it learns scikit-learn's 8x8 digits in half a minute of one CPU thread; with it, MNIST with the
paper's networks, for hours. Both runs, without and with lookahead, share seeds. The generators have BatchNorm, whose
running statistics belong to the fast weights, so the averages are evaluated after `recalibrate`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lookahead_minmax import EMA, LookaheadMinmax, recalibrate
from lookahead_minmax.gan import data
from lookahead_minmax.gan.models import dcgan28
from lookahead_minmax.gan.train import feature_extractor
from lookahead_minmax.metrics import feature_distance

LATENT = {8: 32, 28: 128}


def dcgan8() -> tuple[nn.Module, nn.Module]:
    """Return a convolutional pair for 8x8 digits: noise (n, 32, 1, 1) to images, images to logits (n,)."""
    generator = nn.Sequential(
        nn.ConvTranspose2d(32, 64, 4, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 1, 3, padding=1),
        nn.Tanh(),
    )
    discriminator = nn.Sequential(
        nn.Conv2d(1, 32, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(64, 1, 4),
        nn.Flatten(0),
    )
    return generator, discriminator


def load(folder: Path | None) -> tuple[Tensor, Tensor]:
    """Return the digits as (n, 1, 8, 8), or MNIST's training images, and their labels."""
    if folder is not None:
        return data.mnist(folder, train=True)
    images, labels = data.digits()
    return images.unflatten(1, (1, 8, 8)), labels


def run(images: Tensor, features: nn.Module, args: argparse.Namespace, k: int) -> dict[str, Any]:
    """Train one GAN, with lookahead every k rounds or (k = 0) without; return its Fréchet distances."""
    torch.manual_seed(args.seed)
    latent = LATENT[images.shape[-1]]
    generator, discriminator = dcgan8() if images.shape[-1] == 8 else dcgan28()
    options: dict[str, Any] = {"lr": args.lr, "betas": (0.05, 0.999)}
    opt_g = torch.optim.Adam(generator.parameters(), **options)
    opt_d = torch.optim.Adam(discriminator.parameters(), **options)
    la = LookaheadMinmax({"G": opt_g, "D": opt_d}, k=k) if k else None
    ema = EMA(generator, 0.99)
    for step in range(args.rounds):
        real = images[torch.randint(len(images), (args.batch_size,))]
        fake = generator(torch.randn(args.batch_size, latent, 1, 1))
        opt_d.zero_grad()
        loss = F.softplus(-discriminator(real)) + F.softplus(discriminator(fake.detach()))
        loss.mean().backward()
        opt_d.step()
        opt_g.zero_grad()
        F.softplus(-discriminator(fake)).mean().backward()
        opt_g.step()
        if la is not None:
            la.step()
        ema.update()
        if not args.quiet and (step + 1) % max(1, args.rounds // 5) == 0:
            print(f"k={k}: round {step + 1}/{args.rounds}", file=sys.stderr, flush=True)

    fixed = torch.randn(len(images), latent, 1, 1, generator=torch.Generator().manual_seed(0))

    def noise() -> Iterator[Tensor]:
        yield from torch.split(fixed, 200)

    @torch.no_grad()
    def distance(candidate: nn.Module) -> float:
        network = copy.deepcopy(candidate)
        recalibrate(network, noise())
        network.eval()
        made = torch.cat([features(network(z)) for z in noise()])
        return feature_distance(features(images), made)

    result: dict[str, Any] = {"live": distance(generator), "ema": distance(ema.averaged_module())}
    if la is not None:
        with la.slow_weights(["G"]):
            result["slow"] = distance(generator)
    with torch.no_grad():
        result["samples"] = ema.averaged_module()(fixed[:25])
    return result


def picture(runs: dict[str, dict[str, Any]], file: Path) -> None:
    """Write 25 images of each run's averaged generator."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(runs), figsize=(4 * len(runs), 4), squeeze=False)
    for axis, (name, run_) in zip(axes[0], runs.items(), strict=True):
        size = run_["samples"].shape[-1]
        grid = run_["samples"].view(5, 5, size, size).transpose(1, 2).reshape(5 * size, 5 * size)
        axis.imshow(grid.numpy(), cmap="gray")
        axis.set_title(name)
        axis.set_axis_off()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST's .gz files")
    parser.add_argument("--rounds", type=int, default=1503, help="between two synchronisations")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for samples.png and result.json")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    args = parser.parse_args(argv)
    images, labels = load(args.data_dir)
    features = feature_extractor(images, labels)
    runs = {
        f"k = {k}" if k else "without": run(images, features, args, k)
        for k in dict.fromkeys((0, args.k))
    }
    numbers = {
        name: {key: value for key, value in run_.items() if key != "samples"}
        for name, run_ in runs.items()
    }
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        picture(runs, args.out / "samples.png")
        (args.out / "result.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    if args.json:
        print(json.dumps(numbers))
    else:
        for name, values in numbers.items():
            shown = ", ".join(f"{key} {value:.2f}" for key, value in values.items())
            print(f"Fréchet distance, {name}: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
