"""Off-the-shelf l2 robustness: projected gradient descent and accuracy under it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lcnn.core.penalty import cross_entropy

__all__ = ["pgd_l2", "robust_accuracy"]

Attack = Callable[[nn.Module, Tensor, Tensor, float], Tensor]


def _rows(norms: Tensor, like: Tensor) -> Tensor:
    return norms.view(-1, *[1] * (like.dim() - 1))


def _direction(v: Tensor) -> Tensor:
    """v / ||v|| for each sample, 0 where v is 0."""
    norm = v.flatten(1).norm(dim=1)
    return v / _rows(torch.where(norm > 0, norm, 1.0), v)


def _project(delta: Tensor, radius: float) -> Tensor:
    norm = delta.flatten(1).norm(dim=1)
    return delta * _rows((radius / norm.clamp_min(1e-30)).clamp_max(1.0), delta)


def _gradient(model: Any, x: Tensor, y: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(cross_entropy(model(x), y).sum(), x)
    return g


def pgd_l2(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    radius: float,
    steps: int = 10,
    step_size: float | None = None,
    random_start: bool = True,
    clip: tuple[float, float] | None = (0.0, 1.0),
    restarts: int = 1,
    targeted: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return adversarial inputs within ``radius`` in l2, by normalised gradient steps.

    Args:
        model: in evaluation mode.
        x: (batch, ...).
        y: labels; the targets where ``targeted``.
        radius: of the ball; 0 returns ``x``.
        steps: gradient steps.
        step_size: default radius / 10 for up to 10 steps, 2.5 radius / steps beyond.
        random_start: from a random point of the ball.
        clip: range of valid inputs.
        restarts: keep the worst point of several starts.
        targeted: lower the loss of ``y`` instead of raising it.
        generator: of the starts; default: a fixed seed.

    Raises:
        ValueError: for a negative radius or no steps.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> x = torch.rand(3, 4)
        >>> adversarial = pgd_l2(net, x, torch.tensor([0, 1, 0]), radius=0.1)
        >>> bool(((adversarial - x).norm(dim=1) <= 0.1 + 1e-6).all())
        True
    """
    if not radius >= 0:
        raise ValueError(f"radius must be at least 0, got {radius!r}")
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps and restarts must be at least 1, got {steps!r} and {restarts!r}")
    x = x.detach()
    if radius == 0:
        return x.clone()
    if step_size is None:
        step_size = radius / 10 if steps <= 10 else 2.5 * radius / steps
    generator = generator or torch.Generator(x.device).manual_seed(0)
    sign = -1.0 if targeted else 1.0
    best, worst = x.clone(), torch.full((x.shape[0],), -torch.inf, device=x.device, dtype=x.dtype)

    def valid(point: Tensor) -> Tensor:
        return point if clip is None else point.clamp(*clip)

    for _ in range(restarts):
        delta = torch.zeros_like(x)
        if random_start:
            noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            length = torch.rand(x.shape[0], generator=generator, device=x.device, dtype=x.dtype)
            delta = radius * _direction(noise) * _rows(length, x)
        point = valid(x + delta)
        for _ in range(steps):
            moved = point + sign * step_size * _direction(_gradient(model, point, y))
            point = valid(x + _project(moved - x, radius))
        with torch.no_grad():
            score = sign * cross_entropy(model(point), y)
        better = score > worst
        best = torch.where(_rows(better, x), point, best)
        worst = torch.where(better, score, worst)
    return best


def _autoattack(model: nn.Module, x: Tensor, y: Tensor, radius: float) -> Tensor:
    try:
        import torchattacks
    except ImportError as error:
        raise ImportError(
            "attack='autoattack' needs torchattacks: pip install 'lcnn[eval]'"
        ) from error
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    attack = torchattacks.AutoAttack(model, norm="L2", eps=radius, n_classes=classes)
    adversarial: Tensor = attack(x, y)
    return adversarial


def robust_accuracy(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    radii: list[float],
    attack: Literal["pgd", "autoattack"] | Attack = "pgd",
    **options: Any,
) -> dict[float, float]:
    """Return accuracy under attack for each l2 radius.

    Args:
        model: put into evaluation mode for the time.
        loader: batches (x, y).
        radii: l2 radii; 0 is clean accuracy.
        attack: ``"pgd"`` (:func:`pgd_l2`), ``"autoattack"`` (of torchattacks, extra ``eval``) or a function
            (model, x, y, radius) -> adversarial inputs.
        **options: of :func:`pgd_l2`.

    Raises:
        ValueError: for an unknown attack or no batches.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> with torch.no_grad(): _ = net.weight.copy_(torch.eye(2)), net.bias.zero_()
        >>> robust_accuracy(net, [(torch.eye(2), torch.tensor([0, 1]))], [0.0, 2.0], clip=None)
        {0.0: 1.0, 2.0: 0.0}
    """
    if isinstance(attack, str) and attack not in ("pgd", "autoattack"):
        raise ValueError(f"attack must be 'pgd', 'autoattack' or a function, got {attack!r}")
    right, total = dict.fromkeys(radii, 0), 0
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        for x, y in loader:
            total += len(y)
            for radius in radii:
                if radius == 0 or attack == "pgd":
                    point = pgd_l2(model, x, y, radius=radius, **options)
                elif callable(attack):
                    point = attack(model, x, y, radius)
                else:
                    point = _autoattack(model, x, y, radius)
                with torch.no_grad():
                    right[radius] += int((model(point).argmax(1) == y).sum())
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not total:
        raise ValueError("loader has no batches")
    return {radius: count / total for radius, count in right.items()}
