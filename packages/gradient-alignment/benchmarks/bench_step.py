"""A training step against the published formulation, pixel perturbation against Quantus, the sampler against its floor.

python benchmarks/bench_step.py [--json FILE]
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
import warnings

import numpy as np
import torch
from bench_trace import table
from common import Published, finish, milliseconds, options, step
from torch import nn

import gradient_alignment as ga
from gradient_alignment.recipes.models import resnet, small_cnn


def networks() -> dict[str, tuple[nn.Module, torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    y = torch.arange(64) % 10
    return {
        "digits CNN, batch 64": (small_cnn(), torch.rand(64, 1, 8, 8), y),
        "ResNet-9 with batch norm, 16x16, batch 8": (
            resnet(9, 10),
            torch.rand(8, 3, 16, 16),
            y[:8],
        ),
    }


def steps(args: object) -> list[list[object]]:
    lines: list[list[object]] = []
    for name, (model, x, y) in networks().items():
        for draws in (1, 4):
            published = Published(model, 1e-3, 1e-3, 0.01, draws)
            options = {"estimator": "taylor", "bn": "batch", "num_samples": draws}
            ours = ga.RegularizedLoss(model, ga.ScoreMatching(**options))
            torch.manual_seed(1)
            one = published(x, y)
            torch.manual_seed(1)
            two = ours(x, y)
            # the same numbers: the same directions of the same generator
            error = float((one - two).detach().abs() / one.detach().abs())
            controlled = ga.RegularizedLoss(model, ga.ScoreMatching(num_samples=draws))
            three = ga.RegularizedLoss(
                model,
                ga.ScoreMatching(num_samples=draws),
                ga.GradientNorm(1e-3),
                ga.AntiScoreMatching(0.0),
            )
            calls = [
                step(lambda m=model, x=x, y=y: nn.functional.cross_entropy(m(x), y), model),
                step(lambda p=published, x=x, y=y: p(x, y), model),
                step(lambda o=ours, x=x, y=y: o(x, y), model),
                step(lambda c=controlled, x=x, y=y: c(x, y), model),
                step(lambda t=three, x=x, y=y: t(x, y), model),
            ]
            times = milliseconds(calls, args.repeats)
            plain, theirs, own, cv, all_three = times
            lines.append(
                [
                    name,
                    str(draws),
                    plain,
                    theirs,
                    own,
                    cv,
                    all_three,
                    own / theirs,
                    cv / theirs,
                    cv / plain,
                    f"{error:.0e}",
                ]
            )
    return lines


def loop(
    model: nn.Module, x: np.ndarray, y: np.ndarray, maps: np.ndarray, fractions: list[float]
) -> list[float]:
    """Pixel perturbation, image by image and fraction by fraction."""
    right = np.zeros(len(fractions))
    for image, label, scores in zip(x, y, maps, strict=True):
        order = np.argsort(scores.ravel(), kind="stable")
        for index, fraction in enumerate(fractions):
            changed = image.reshape(len(image), -1).copy()
            gone = order[: max(1, round(fraction * scores.size))]
            changed[:, gone] = image.mean((1, 2))[:, None]
            with torch.no_grad():
                logits = model(torch.from_numpy(changed.reshape(1, *image.shape)))
            right[index] += float(logits.argmax() == label)
    return list(right / len(x))


def perturbation(args: object) -> list[list[object]]:
    torch.manual_seed(0)
    model = small_cnn(size=28).eval()
    x, y = torch.rand(args.images, 1, 28, 28), torch.arange(args.images) % 10
    maps = ga.reduce_channels(ga.input_gradient(model, x, y))
    count = 28 * 28
    features = 28
    fractions = [k * features / count for k in range(1, count // features + 1)]
    ga.pixel_perturbation(model, x[:32], y[:32], maps[:32])  # warm
    start = time.perf_counter()
    curve = ga.pixel_perturbation(
        model, x, y, maps, fractions=fractions, order="morf", metric="prob"
    )
    ours = time.perf_counter() - start
    lines: list[list[object]] = [["gradient-alignment", str(len(fractions)), ours, 1.0]]
    start = time.perf_counter()
    slow = loop(model, x.numpy(), y.numpy(), -maps.numpy(), fractions)
    seconds = time.perf_counter() - start
    lines.append(["loop over images and fractions", str(len(fractions)), seconds, seconds / ours])
    quick = ga.pixel_perturbation(model, x, y, maps, fractions=fractions, order="morf")
    assert np.allclose(slow, quick.values.numpy(), atol=2 / args.images), "the loop disagrees"
    if importlib.util.find_spec("quantus"):
        import quantus

        metric = quantus.PixelFlipping(
            features_in_step=features,
            perturb_baseline="mean",
            abs=False,
            normalise=False,
            return_aggregate=False,
            disable_warnings=True,
            display_progressbar=False,
        )
        for batch in (32, 64):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                start = time.perf_counter()
                theirs = metric(
                    model=model,
                    x_batch=x.numpy(),
                    y_batch=y.numpy(),
                    a_batch=maps.unsqueeze(1).numpy(),
                    device="cpu",
                    softmax=True,
                    batch_size=batch,
                )
                seconds = time.perf_counter() - start
            mean = np.asarray(theirs).mean(0)
            difference = float(np.abs(mean[-len(fractions) :] - curve.values.numpy()).max())
            version = importlib.metadata.version("quantus")
            name = f"quantus {version} PixelFlipping, batch {batch}"
            lines.append([name, str(mean.size), seconds, seconds / ours])
            print(f"largest difference of the mean curve to quantus's: {difference:.1e}\n")
    return lines


def sampler(args: object) -> list[list[object]]:
    lines: list[list[object]] = []
    for name, (model, x, y) in networks().items():
        model.eval()

        def ours(model: nn.Module = model, x: torch.Tensor = x, y: torch.Tensor = y) -> object:
            return ga.sample(model, y, steps=10, init=x)

        def floor(model: nn.Module = model, x: torch.Tensor = x, y: torch.Tensor = y) -> object:
            for _ in range(10):
                point = x.clone().requires_grad_()
                torch.autograd.grad(model(point).gather(1, y[:, None]).sum(), point)
            return None

        a, b = milliseconds([ours, floor], args.repeats)
        lines.append([name, a, b, a / b])
    return lines


def main() -> None:
    parser = options(__doc__.splitlines()[0], 15)
    parser.add_argument("--images", type=int, default=512)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    columns = [
        "network",
        "K",
        "plain step, ms",
        "published",
        "ours, same estimator",
        "ours, control variate",
    ]
    columns += [
        "three regularisers",
        "same / published",
        "control variate / published",
        "/ plain",
        "loss differs by",
    ]
    first = steps(args)
    table(columns, first)
    second = perturbation(args)
    print(f"pixel perturbation, {args.images} images of 28x28, one run each\n")
    table(["", "fractions", "s", "/ ours"], second)
    third = sampler(args)
    table(["sampler, 10 steps", "ours, ms", "forward and input gradient", "ratio"], third)
    finish(args, {"steps": first, "perturbation": second, "sampler": third})


if __name__ == "__main__":
    main()
