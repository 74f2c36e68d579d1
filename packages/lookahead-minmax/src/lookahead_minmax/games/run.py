"""Play a game by any of the paper's methods, with or without lookahead, batched over starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lookahead_minmax.core.schedule import check_alphas, check_periods
from lookahead_minmax.games.base import Game

Method = Literal["gda", "alt", "eg", "ogda", "unrolled", "svre", "adam", "extraadam"]
Field = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Trajectory:
    """What a run visited.

    Attributes:
        distance: to the solution after every round, (rounds + 1, starts).
        oracle_calls: passes over the field up to each round, (rounds + 1,); a minibatch of B of n
            components counts B / n.
        z: last point, (starts, n).
    """

    distance: Tensor
    oracle_calls: Tensor
    z: Tensor


class _Adam:
    """Adam with bias correction on one flat, batched point."""

    def __init__(self, lr: float, betas: tuple[float, float], eps: float) -> None:
        self.lr, self.betas, self.eps = lr, betas, eps
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0
        self.steps = 0

    def update(self, gradient: Tensor) -> Tensor:
        b1, b2 = self.betas
        self.steps += 1
        self.first = b1 * self.first + (1 - b1) * gradient
        self.second = b2 * self.second + (1 - b2) * gradient**2
        corrected = self.first / (1 - b1**self.steps)
        scale = (self.second / (1 - b2**self.steps)) ** 0.5
        return self.lr * corrected / (scale + self.eps)


def _masks(game: Game, z: Tensor) -> list[Tensor]:
    """Return one 0/1 vector for each player, the last player first: D moves before G."""
    owner = torch.repeat_interleave(torch.arange(len(game.players)), torch.tensor(game.players))
    return [(owner == player).to(z.dtype) for player in reversed(range(len(game.players)))]


def _unrolled(
    game: Game, z: Tensor, field: Field, lr: float, unroll: int, only: int | None
) -> Tensor:
    """Return the field in which each player sees the others (or `only` one) after `unroll` steps."""
    result = torch.zeros_like(z)
    masks = _masks(game, z)
    moving = torch.ones_like(masks[0]) if only is None else masks[::-1][only]
    for own in masks:
        point = z
        for _ in range(unroll if bool((moving * (1 - own)).any()) else 0):
            point = point - lr * moving * (1 - own) * field(point)
        result = result + own * field(point)
    return result


def run(
    game: Game,
    method: Method = "gda",
    *,
    lookahead: tuple[int, float] | Sequence[tuple[int, float]] | None = None,
    steps: int = 100,
    lr: float = 0.1,
    start: Tensor | None = None,
    starts: int = 1,
    batch_size: int | None = None,
    unroll: int = 6,
    unroll_only: int | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    seed: int = 0,
) -> Trajectory:
    """Play `steps` rounds.

    Args:
        game: the game.
        method: "gda" (simultaneous), "alt" (the last player moves first), "eg", "ogda" (the first step is
            plain), "unrolled" (every player against the others after `unroll` steps), "svre" (variance
            reduced extragradient, needs `batch_size`), "adam" (simultaneous) or "extraadam" (one
            shared state, advanced twice a round).
        lookahead: (k, alpha), or one such pair for each nested level; None is the base method.
        steps: rounds.
        lr: step size of all players.
        start: first points, (starts, n); normal random ones around the solution by default.
        starts: number of random points.
        batch_size: components in a minibatch of a finite sum, drawn with replacement; None is the full sum.
        unroll: steps of the others for "unrolled".
        unroll_only: the number of the only player that the others see unrolled, who itself steps plainly
            (1 is the paper's Unroll-Y); None unrolls all (Unroll-XY).
        betas: Adam's.
        seed: of the start and of the minibatches.

    Raises:
        ValueError: the method is unknown, a number is out of range, or "svre" has no batch_size.

    Example:
        >>> from lookahead_minmax.games import Bilinear, run
        >>> game = Bilinear(torch.eye(2, dtype=torch.float64))
        >>> plain, ours = (run(game, lookahead=la, lr=0.3) for la in (None, (6, 0.5)))
        >>> bool(plain.distance[-1] > plain.distance[0]), bool(ours.distance[-1] < ours.distance[0])
        (True, True)
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    if method == "svre" and batch_size is None:
        raise ValueError('"svre" reduces the variance of minibatches: give batch_size')
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if unroll_only is not None and not 0 <= unroll_only < len(game.players):
        raise ValueError(f"unroll_only must be in 0..{len(game.players) - 1}, got {unroll_only}")
    if steps < 0 or lr <= 0 or starts < 1 or unroll < 1:
        raise ValueError(
            f"need steps >= 0, lr > 0, starts >= 1, unroll >= 1; got {steps}, {lr}, {starts}, {unroll}"
        )
    levels = (
        [] if lookahead is None else [lookahead] if isinstance(lookahead[0], int) else lookahead
    )
    periods = check_periods([k for k, _ in levels]) if levels else []  # type: ignore[misc]
    alphas = [row["z"] for row in check_alphas([a for _, a in levels], ["z"], len(periods))]  # type: ignore[misc]

    generator = torch.Generator().manual_seed(seed)
    solution = game.solution()
    if start is None:
        noise = torch.randn(starts, len(solution), generator=generator, dtype=solution.dtype)
        start = solution + noise
    if start.ndim != 2 or start.shape[1] != len(solution) or start.dtype != solution.dtype:
        raise ValueError(
            f"start must be (starts, {len(solution)}) of {solution.dtype}, "
            f"got {tuple(start.shape)} of {start.dtype}"
        )
    z, count = start.clone(), game.players[0]
    size = batch_size or count
    unrolled = len(game.players) if unroll_only is None else len(game.players) - 1

    def sample() -> Field:
        if batch_size is None:
            return game.field
        batch = torch.randint(count, (len(z), batch_size), generator=generator)
        return lambda point: game.field(point, batch)

    adam = _Adam(lr, betas, 1e-8)
    slow = [z.clone() for _ in periods]
    distances, calls, spent = [game.distance(z)[None]], [0.0], 0.0
    visited: list[Tensor] = []
    previous: Tensor | None = None
    snapshot = mean_field = z
    one = size / count if batch_size is not None else 1.0
    for round_number in range(1, steps + 1):
        field = sample()
        if method == "gda":
            z, cost = z - lr * field(z), one
        elif method == "alt":
            for turn, own in enumerate(_masks(game, z)):  # each on a minibatch of its own
                z = z - lr * own * (sample() if turn else field)(z)
            cost = one
        elif method == "eg":
            half = z - lr * field(z)
            z, cost = z - lr * sample()(half), 2 * one
        elif method == "ogda":
            gradient = field(z)
            z = z - 2 * lr * gradient + lr * (gradient if previous is None else previous)
            previous, cost = gradient, one
        elif method == "unrolled":
            z = z - lr * _unrolled(game, z, field, lr, unroll, unroll_only)
            cost = (len(game.players) + unroll * unrolled) * one
        elif method == "svre":
            cost = 4 * one
            if (round_number - 1) % max(1, count // size) == 0:
                snapshot, mean_field = z, one * game.field(z)  # a minibatch is a sum of B of n
                cost += 1
            half = z - lr * (field(z) - field(snapshot) + mean_field)
            other = sample()
            z = z - lr * (other(half) - other(snapshot) + mean_field)
        elif method == "adam":
            z, cost = z - adam.update(field(z)), one
        else:
            half = z - adam.update(field(z))
            z, cost = z - adam.update(sample()(half)), 2 * one
        for level, (k, alpha) in enumerate(zip(periods, alphas, strict=True)):
            if round_number % k == 0:
                z = torch.lerp(slow[level], z, alpha)
                slow[: level + 1] = [z] * (level + 1)
        spent += cost
        calls.append(spent)
        visited.append(z)
        if len(visited) == 500 or round_number == steps:  # one call for many points is much cheaper
            flat = game.distance(torch.cat(visited))
            distances.append(flat.view(len(visited), -1))
            visited.clear()
    return Trajectory(torch.cat(distances), torch.tensor(calls, dtype=torch.float64), z)
