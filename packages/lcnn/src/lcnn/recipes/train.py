"""Training and measuring one network, as the paper does: SGD, two drops of the learning rate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcnn.core.activation import CenteredSoftplus
from lcnn.core.loss import LCNNLoss, param_groups
from lcnn.recipes.methods import METHODS, build
from lcnn.study.attacks import pgd_l2, robust_accuracy
from lcnn.study.curvature import curvature

__all__ = ["Recipe", "Run", "augment", "betas", "measure", "train"]


@dataclass(frozen=True)
class Recipe:
    """Defaults are the paper's CIFAR settings.

    ``overrides`` replace the method's loss options, so that one method can be run at other weights.
    ``seconds`` of processor time end a run early, at the end of an epoch, and put the drops at 75 % and 87.5 % of that time.
    """

    method: str = "lcnn"
    epochs: int = 200
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0
    flip: bool = False
    pad: int = 0
    seconds: float | None = None
    beta_init: float = 5.0
    overrides: dict[str, Any] | None = None
    radius: float | None = None
    attack_step: float = 1 / 3  # of the radius, which three of the authors' tenths do not reach


@dataclass
class Run:
    """A trained network, in evaluation mode, and its cost in seconds of processor time."""

    model: nn.Module
    losses: list[float]
    seconds: float
    epochs: int


def augment(x: Tensor, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Crop every image at random after zero padding, and mirror half of them.

    Example:
        >>> augment(torch.ones(4, 1, 8, 8), 0, False, torch.Generator()).equal(torch.ones(4, 1, 8, 8))
        True
    """
    n, _, height, width = x.shape
    if pad:
        shift = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator)
        rows = (shift[0] + torch.arange(height))[:, None, :, None]
        columns = (shift[1] + torch.arange(width))[:, None, None, :]
        padded = F.pad(x, [pad] * 4)
        samples = torch.arange(n).view(-1, 1, 1, 1)
        channels = torch.arange(x.shape[1]).view(1, -1, 1, 1)
        x = padded[samples, channels, rows, columns]
    if flip:
        mirrored = torch.rand(n, generator=generator) < 0.5
        x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)
    return x


def betas(model: nn.Module) -> list[float]:
    """Return the present betas, one for each activation module (the mean of its channels).

    Example:
        >>> betas(nn.Sequential(CenteredSoftplus(2.0)))
        [2.0]
    """
    acts = [m for m in model.modules() if isinstance(m, CenteredSoftplus)]
    return [round(act.beta.detach().mean().item(), 6) for act in acts]


def _adversarial(
    model: nn.Module, x: Tensor, y: Tensor, radius: float, step: float, seed: int
) -> Tensor:
    """Three l2 PGD steps, in evaluation mode."""
    model.eval()
    generator = torch.Generator(x.device).manual_seed(seed)
    out = pgd_l2(model, x, y, radius=radius, steps=3, step_size=step, generator=generator)
    model.train()
    return out


def train(
    make: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    say: Callable[[str], None] = lambda text: None,
    *,
    ready: bool = False,
) -> Run:
    """Train one row of the comparison from scratch.

    Args:
        make: returns the plain ReLU network; the recipe's method converts it.
        x: (n, ...) images.
        y: (n,) labels.
        recipe: the settings.
        say: told the loss after every tenth of the run.
        ready: ``make`` returns the network as the method needs it, converted already.

    Raises:
        ValueError: for an unknown method.

    Example:
        >>> from lcnn.recipes.models import mlp
        >>> recipe = Recipe("lcnn", epochs=2, batch_size=16)
        >>> run = train(lambda: mlp(2, 8, 2), torch.randn(32, 2), torch.arange(32) % 2, recipe)
        >>> len(run.losses)
        2
    """
    torch.manual_seed(recipe.seed)
    if recipe.method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {recipe.method!r}")
    row = METHODS[recipe.method]
    model = make() if ready else build(make(), recipe.method, x[:2], beta_init=recipe.beta_init)
    criterion = LCNNLoss(model, **{**row.loss, **(recipe.overrides or {})})
    groups = param_groups(model, recipe.weight_decay)
    optimizer = torch.optim.SGD(groups, recipe.lr, recipe.momentum)
    generator = torch.Generator().manual_seed(recipe.seed)
    radius = row.adversarial if recipe.radius is None else recipe.radius
    size = min(recipe.batch_size, len(x))
    start, losses, step = time.process_time(), [], 0
    model.train()
    for epoch in range(recipe.epochs):
        progress = epoch / recipe.epochs
        if recipe.seconds is not None:
            progress = max(progress, (time.process_time() - start) / recipe.seconds)
            if progress >= 1:
                break
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * 0.1 ** ((progress >= 0.75) + (progress >= 0.875))
        total = 0.0
        order = torch.randperm(len(x), generator=generator)
        for index in order[: len(x) // size * size].split(size):
            xb, yb = x[index], y[index]
            if recipe.pad or recipe.flip:
                xb = augment(xb, recipe.pad, recipe.flip, generator)
            step += 1
            if row.adversarial:
                size_of_step = recipe.attack_step * radius
                xb = _adversarial(model, xb, yb, radius, size_of_step, recipe.seed + step)
            optimizer.zero_grad(set_to_none=True)
            loss = criterion(xb, yb)
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / (len(x) // size))
        if epoch % max(1, recipe.epochs // 10) == 0:
            say(f"{row.title}, epoch {epoch + 1}: loss {losses[-1]:.4f}")
    return Run(model.eval(), losses, time.process_time() - start, len(losses))


def measure(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    radii: list[float] | None = None,
    *,
    iters: int = 20,
    chunk: int = 256,
) -> dict[str, Any]:
    """Return accuracy, mean gradient norm, Hessian norm, curvature, and accuracy under 10-step PGD.

    Args:
        model: in evaluation mode.
        x: (n, ...) test images in [0, 1].
        y: (n,) labels.
        radii: l2 radii of the attack.
        iters: Hessian-vector products at most, by Lanczos.
        chunk: samples at a time.

    Example:
        >>> result = measure(nn.Linear(4, 2), torch.rand(8, 4), torch.arange(8) % 2)
        >>> sorted(result)
        ['accuracy', 'curvature', 'grad_norm', 'hessian_norm', 'robust']
    """
    found = curvature(model, x, y, method="lanczos", iters=iters, tol=1e-2, chunk=chunk)
    batches = list(zip(x.split(chunk), y.split(chunk), strict=True))
    robust = robust_accuracy(model, batches, [0.0, *(radii or [])])
    return {
        "accuracy": robust.pop(0.0),
        "grad_norm": found.grad_norm.mean().item(),
        "hessian_norm": found.hessian_norm.mean().item(),
        "curvature": found.curvature.mean().item(),
        "robust": robust,
    }
