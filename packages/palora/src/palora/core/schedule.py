r"""Which preferences to train on at each step: the deterministic annealed schedule and others."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from palora.core.simplex import grid_size, simplex_grid, smallest_resolution

__all__ = ["Schedule", "sharpen"]

MODES = ("anneal", "fixed", "dirichlet", "anneal-dirichlet")


def sharpen(base: Tensor, exponent: float) -> Tensor:
    """Return ``base^e / Σ base^e`` along the last dimension, in log space.

    Example:
        >>> sharpen(torch.tensor([.25, .75]), 0.0)
        tensor([0.5000, 0.5000])
    """
    if exponent == 0:  # 0·log 0 is not a number, 0^0 is 1
        return torch.full_like(base, 1 / base.shape[-1])
    return torch.softmax(exponent * base.log(), dim=-1)


class Schedule:
    r"""The preferences (rays) of every training step.

    ``"anneal"`` is the paper's deterministic schedule: base points on an even grid, sharpened by
    :math:`λ_t(τ) ∝ (λ_t^{base})^{Qτ}`. At τ → 0 every ray is at the centre of the simplex, at
    τ = 1/Q the rays are the even grid, at τ → 1 they approach the vertices and faces.

    Args:
        tasks: T ≥ 2.
        num: M, rays per step (the paper's window).
        mode: ``"anneal"``; ``"fixed"``, the even grid at every τ; ``"dirichlet"``, λ ~ Dir(p);
            ``"anneal-dirichlet"``, λ ~ Dir(p(1−τ) + 0.001).
        temperature: Q; 5 in the authors' code.
        epsilon: ε: base points are shrunk by λ ← ε + (1−Tε)λ; 0.01 in the authors' code.
        p: concentration of the random modes.
        cycle: where no lattice has exactly ``num`` points, go through the points of the next
            larger one, ``num`` a step, in a fixed stride order that visits all equally often.
            False raises instead.
        seed: of the random modes; None draws one.
        layout: ``"lattice"`` (Das–Dennis), or ``"energy"`` (Riesz s-energy points, exactly
            ``num`` of them; needs pymoo).

    Raises:
        ValueError: fewer than two tasks, ``num`` < 2 in a deterministic mode, an ε outside
            [0, 1/T), an unknown mode or layout.

    Example:
        >>> Schedule(2, num=3)(0.2)
        tensor([[0.0100, 0.9900],
                [0.5000, 0.5000],
                [0.9900, 0.0100]])
    """

    def __init__(
        self,
        tasks: int,
        num: int = 5,
        mode: Literal["anneal", "fixed", "dirichlet", "anneal-dirichlet"] = "anneal",
        temperature: float = 5.0,
        epsilon: float = 0.01,
        p: float = 1.0,
        cycle: bool = True,
        seed: int | None = None,
        layout: Literal["lattice", "energy"] = "lattice",
    ) -> None:
        """Prepare the base points; see the class."""
        counts: list[tuple[str, object, int]] = [("tasks", tasks, 2), ("num", num, 1)]
        for name, count, least in counts:
            if not isinstance(count, int) or isinstance(count, bool) or count < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {count!r}")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
        if layout not in ("lattice", "energy"):
            raise ValueError(f"layout must be 'lattice' or 'energy', got {layout!r}")
        if not 0 < p < math.inf or not 0 < temperature < math.inf:
            raise ValueError(
                f"p and temperature must be positive and finite, got {p} and {temperature}"
            )
        self.tasks, self.num, self.mode, self.layout = tasks, num, mode, layout
        self.temperature, self.epsilon, self.p, self.cycle = temperature, epsilon, p, cycle
        self.seed, self.step = seed, 0
        self._rng = np.random.default_rng(seed)
        self.base = torch.empty(0, tasks, dtype=torch.float64)
        if mode in ("anneal", "fixed"):
            self.base = self._base_points()
        self._order = _stride_order(len(self.base))

    def _base_points(self) -> Tensor:
        tasks, num, epsilon = self.tasks, self.num, self.epsilon
        if num < 2:
            raise ValueError(
                f"mode {self.mode!r} spreads its rays over the simplex and needs num of at least "
                "2, got 1; for one ray a step use mode='dirichlet' or 'anneal-dirichlet'"
            )
        if not 0 <= epsilon < 1 / tasks:
            raise ValueError(f"epsilon must be in [0, 1/{tasks}), got {epsilon}")
        if self.layout == "energy":
            points = _energy_points(tasks, num)
        else:
            resolution = smallest_resolution(tasks, num)
            size = grid_size(tasks, resolution)
            if size != num and not self.cycle:
                below = grid_size(tasks, resolution - 1) if resolution > 1 else None
                raise ValueError(
                    f"no lattice for {tasks} tasks has {num} points; the nearest sizes are "
                    f"{below or ''} {size}; cycle=True goes through {size} in turn"
                )
            points = (simplex_grid(tasks, resolution).double() * resolution).round() / resolution
            if tasks == 2:
                points = points.flip(0)  # the paper counts the first component upwards
        return epsilon + (1 - tasks * epsilon) * points

    def __call__(self, progress: float, step: int | None = None) -> Tensor:
        """Return the ``(num, T)`` float32 preferences at progress τ.

        Args:
            progress: τ in [0, 1], for step s of S: ``(s + 1) / S``.
            step: which part of a larger lattice to visit; None counts the calls.

        Raises:
            ValueError: progress outside [0, 1] by more than 1e-6.
        """
        if not -1e-6 <= progress <= 1 + 1e-6:
            raise ValueError(f"progress must be in [0, 1], got {progress}")
        tau = min(max(float(progress), 0.0), 1.0)
        at = self.step if step is None else step
        self.step = at + 1
        if self.mode == "dirichlet":
            return self._dirichlet(self.p)
        if self.mode == "anneal-dirichlet":
            return self._dirichlet(self.p * (1 - tau) + 0.001)
        points = self.base
        if len(points) != self.num:
            start = at * self.num
            wanted = [self._order[(start + i) % len(points)] for i in range(self.num)]
            points = points[wanted]
        if self.mode == "anneal":
            points = sharpen(points, self.temperature * tau)
        return points.float()

    def _dirichlet(self, concentration: float) -> Tensor:
        drawn = self._rng.dirichlet([concentration] * self.tasks, self.num)
        return torch.from_numpy(drawn).float()

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on with the same preferences after a restart."""
        return {
            "tasks": self.tasks,
            "num": self.num,
            "mode": self.mode,
            "step": self.step,
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: it comes from a schedule of other tasks, num or mode.
        """
        for key in ("tasks", "num", "mode"):
            if state[key] != getattr(self, key):
                raise ValueError(f"{key} is {getattr(self, key)!r} here and {state[key]!r} there")
        self.step = state["step"]
        self._rng.bit_generator.state = state["rng"]


def _stride_order(size: int) -> list[int]:
    """A fixed order of 0..size−1 that jumps by about the golden ratio, so that neighbours differ."""
    stride = max(1, round(size * (math.sqrt(5) - 1) / 2))
    while math.gcd(stride, max(size, 1)) != 1:
        stride += 1
    return [i * stride % size for i in range(size)]


def _energy_points(tasks: int, num: int) -> Tensor:
    try:
        from pymoo.util.ref_dirs import get_reference_directions
    except ImportError as error:
        raise ImportError("layout='energy' needs pymoo: pip install \"palora[moo]\"") from error
    points = np.asarray(get_reference_directions("energy", tasks, num, seed=1))
    return torch.from_numpy(points).double()
