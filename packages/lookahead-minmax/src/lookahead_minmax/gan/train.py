"""Train a small GAN by alternating Adam, with or without lookahead, and watch its Fréchet distance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lookahead_minmax import EMA, ExtraGradient, LookaheadMinmax
from lookahead_minmax.gan.checkpoint import Checkpoint, Stateful
from lookahead_minmax.gan.data import load
from lookahead_minmax.gan.models import dcgan28, digits_pair, mlp, ring_pair
from lookahead_minmax.gan.unrolled import unroll_adam
from lookahead_minmax.metrics import feature_distance

NETWORKS: dict[str, tuple[Callable[[], tuple[nn.Module, nn.Module]], tuple[int, ...]]] = {
    "digits": (digits_pair, (32,)),
    "ring": (ring_pair, (16,)),
    "mnist": (dcgan28, (128, 1, 1)),
}
"""For each data set, how to build generator and discriminator, and the shape of the noise."""


@dataclass(frozen=True)
class Recipe:
    """What a run is.

    Attributes:
        data: "digits" (MLPs, 32-dimensional noise), "ring" (MLPs, eight Gaussians in the plane) or "mnist"
            (the paper's DCGAN).
        train: MNIST's training images, else its test images.
        scale: range of the pixels.
        base: "alt" (alternating), "extra" (extragradient in the authors' "opponent" mode) or "unrolled"
            (alternating, the generator's gradient through the discriminator's next `unroll` steps).
        k: rounds between synchronisations, one for each level; empty is the base method.
        alpha: Lookahead's factor.
        rounds: of r discriminator steps and one generator step.
        d_iters: r.
        unroll: steps of the discriminator that the generator sees; 20 is the paper's on MNIST.
        optim: "adam", "radam" or "sgd", both players ("unrolled" needs Adam).
        lr: step size, both players.
        betas: Adam's and RAdam's.
        batch_size: of real images and of noise.
        ema: decay of the generator's EMA.
        evaluations: how often the distance is measured, evenly spaced.
        seed: of networks, batches and noise.
    """

    data: Literal["digits", "ring", "mnist"] = "digits"
    train: bool = False
    scale: Literal["-1_1", "0_1"] = "-1_1"
    base: Literal["alt", "extra", "unrolled"] = "alt"
    k: tuple[int, ...] = ()
    alpha: float = 0.5
    rounds: int = 3000
    d_iters: int = 1
    unroll: int = 20
    optim: Literal["adam", "radam", "sgd"] = "adam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.0, 0.9)
    batch_size: int = 50
    ema: float = 0.999
    evaluations: int = 12
    seed: int = 0


def load_images(recipe: Recipe, data_dir: Path | None = None) -> tuple[Tensor, Tensor]:
    """Return the recipe's examples and their labels; see `data.load` for the errors."""
    return load(recipe.data, data_dir, train=recipe.train, scale=recipe.scale, seed=recipe.seed)


NUMBERS = ("rounds", "live", "ema", "ema_slow")


@dataclass
class Curve:
    """Fréchet distances over a run, one for each evaluation.

    Attributes:
        recipe: the run's settings.
        rounds: rounds done at each evaluation.
        live: of the generator that is being trained.
        ema: of its exponential moving average.
        ema_slow: of the moving average that is updated at synchronisations; empty without lookahead.
        samples: 25 images of the last live generator (on the ring, 1,000 points).
    """

    recipe: Recipe
    rounds: list[int] = field(default_factory=list)
    live: list[float] = field(default_factory=list)
    ema: list[float] = field(default_factory=list)
    ema_slow: list[float] = field(default_factory=list)
    samples: Tensor = field(default_factory=lambda: torch.empty(0))

    def summary(self, which: str = "live") -> dict[str, float]:
        """Return best and last distance, and mean and deviation over the last quarter."""
        values = torch.tensor(getattr(self, which), dtype=torch.float64)
        late = values[-max(2, len(values) // 4) :]
        return {
            "best": float(values.min()),
            "last": float(values[-1]),
            "mean": float(late.mean()),
            "std": float(late.std()),
        }

    def as_dict(self) -> dict[str, object]:
        """Return settings and numbers, ready for JSON."""
        return {"recipe": asdict(self.recipe), **{name: getattr(self, name) for name in NUMBERS}}


def feature_extractor(
    images: Tensor, labels: Tensor, *, steps: int = 600, seed: int = 0
) -> nn.Module:
    """Train a classifier d-128-32-10 and return its part up to the 32 penultimate features.

    Args:
        images: (n, ...), flattened here.
        labels: (n,).
        steps: of Adam, batch 100.
        seed: of its initialisation and batches.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flat = images.flatten(1)
        classifier = mlp(flat.shape[1], 128, 32, 10)
        optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3)
        for _ in range(steps):
            rows = torch.randint(len(flat), (100,))
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(classifier(flat[rows]), labels[rows]))
            optimizer.step()
    return nn.Sequential(nn.Flatten(), *list(classifier)[:-1]).eval().requires_grad_(False)


def make_optimizer(recipe: Recipe, network: nn.Module) -> torch.optim.Optimizer:
    """Return the recipe's optimizer of one player."""
    if recipe.optim == "sgd":
        return torch.optim.SGD(network.parameters(), lr=recipe.lr)
    kind = torch.optim.RAdam if recipe.optim == "radam" else torch.optim.Adam
    return kind(network.parameters(), lr=recipe.lr, betas=recipe.betas)


def train(
    recipe: Recipe,
    images: Tensor,
    features: nn.Module,
    progress: Callable[[int, float], None] | None = None,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> Curve:
    """Train one GAN and return its curve.

    Args:
        recipe: the settings.
        images: what `load_images` returns for the recipe: (n, 64) for digits, (n, 2) for the ring, (n, 1, 28, 28)
            for MNIST.
        features: maps images to features for the Fréchet distance.
        progress: called with (rounds done, distance of the live generator).
        checkpoint: a file that is written after every evaluation.
        resume: go on from that file, bit for bit.

    Raises:
        ValueError: base "unrolled" with another optimizer than Adam, a count is below 1, or the file is of a
            run with other settings.
        FileNotFoundError: there is nothing to resume.
    """
    for name in ("rounds", "d_iters", "batch_size", "evaluations"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(recipe, name)}")
    if recipe.base == "unrolled" and recipe.optim != "adam":
        raise ValueError(f"base 'unrolled' differentiates Adam's steps; optim is {recipe.optim!r}")
    torch.manual_seed(recipe.seed)
    pair, shape = NETWORKS[recipe.data]
    generator, discriminator = pair()
    opt_g, opt_d = (make_optimizer(recipe, network) for network in (generator, discriminator))
    players = {"G": opt_g, "D": opt_d}
    ema, ema_slow = EMA(generator, recipe.ema), EMA(generator, recipe.ema)
    lookahead = None
    if recipe.k:
        lookahead = LookaheadMinmax(players, k=list(recipe.k), alpha=recipe.alpha)
        lookahead.on_sync(ema_slow.update)
    extra = ExtraGradient(players, extrapolate="opponent", state="separate")

    draws = torch.Generator().manual_seed(recipe.seed + 1)

    def noise(count: int = recipe.batch_size) -> Tensor:
        return torch.randn(count, *shape, generator=draws)

    def loss_d(score: Callable[[Tensor], Tensor]) -> Tensor:
        rows = torch.randint(len(images), (recipe.batch_size,), generator=draws)
        fake = generator(noise())
        return F.softplus(-score(images[rows])).mean() + F.softplus(score(fake)).mean()

    def fill_d() -> None:
        generator.requires_grad_(False)
        loss = loss_d(discriminator)
        generator.requires_grad_()
        opt_d.zero_grad()
        torch.autograd.backward(loss)

    def fill_g() -> None:
        opt_g.zero_grad()
        unroll = recipe.unroll if recipe.base == "unrolled" else 0
        score: Callable[[Tensor], Tensor] = discriminator
        if unroll and isinstance(opt_d, torch.optim.Adam):
            score = unroll_adam(discriminator, opt_d, loss_d, unroll)
        torch.autograd.backward(F.softplus(-score(generator(noise()))).mean())

    def alternating_round() -> None:
        for _ in range(recipe.d_iters):
            fill_d()
            opt_d.step()
        fill_g()
        opt_g.step()

    def extragradient_round() -> None:
        fill_g()
        gradients = [p.grad for p in generator.parameters()]
        for _ in range(recipe.d_iters):
            fill_d()
            extra.extrapolate("D")
        for parameter, gradient in zip(generator.parameters(), gradients, strict=True):
            parameter.grad = gradient
        extra.extrapolate("G")
        for _ in range(recipe.d_iters):
            with extra.own_weights("D"):
                fill_d()
            extra.step("D")
        with extra.own_weights("G"):
            fill_g()
        extra.step("G")

    real = features(images)
    fixed = torch.randn(len(images), *shape, generator=torch.Generator().manual_seed(12345))

    @torch.no_grad()
    def distance() -> float:
        generator.eval()
        result = feature_distance(
            real, features(torch.cat([generator(z) for z in torch.split(fixed, 500)]))
        )
        generator.train()
        return result

    curve = Curve(recipe)
    parts: dict[str, Stateful] = {
        "G": generator,
        "D": discriminator,
        "opt_g": opt_g,
        "opt_d": opt_d,
    }
    parts |= {"ema": ema, "ema_slow": ema_slow, "extra": extra}
    if lookahead is not None:
        parts["lookahead"] = lookahead
    file = None if checkpoint is None else Checkpoint(checkpoint, asdict(recipe), parts, draws)
    if resume and file is not None:
        for name, numbers in file.load().items():
            setattr(curve, name, numbers)
    start = curve.rounds[-1] if curve.rounds else 0
    every = max(1, recipe.rounds // recipe.evaluations)
    play = extragradient_round if recipe.base == "extra" else alternating_round
    for done in range(start + 1, recipe.rounds + 1):
        play()
        if lookahead is not None:
            lookahead.step()
        ema.update()
        if done % every == 0:
            curve.rounds.append(done)
            curve.live.append(distance())
            with ema.average():
                curve.ema.append(distance())
            if lookahead is not None:
                with ema_slow.average():
                    curve.ema_slow.append(distance())
            if file is not None:
                file.save({name: getattr(curve, name) for name in NUMBERS})
            if progress is not None:
                progress(done, curve.live[-1])
    with torch.no_grad():
        curve.samples = generator(fixed[: 1000 if recipe.data == "ring" else 25])
    return curve
