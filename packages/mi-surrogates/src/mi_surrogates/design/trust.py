"""The local region around the nominal design, the ascent inside it, and how it adapts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mi_surrogates.design.choice import Relaxed
from mi_surrogates.design.space import DesignSpace

Floats = NDArray[np.float64]


class Region:
    """The ellipsoid δᵀ Σ⁻¹ δ < r² around a nominal design.

    Args:
        center: (F,) the nominal design.
        cov: (F, F) Σ.
        radius: r; 1.2 as in the authors' code (r² ≈ 1.5).

    Example:
        >>> region = Region(np.zeros(2), np.diag([4.0, 1.0]))
        >>> region.contains(np.array([2.3, 0.0])), region.contains(np.array([0.0, 1.3]))
        (True, False)
    """

    def __init__(self, center: Floats, cov: Floats, radius: float = 1.2) -> None:
        if not radius > 0:
            raise ValueError(f"radius must be positive, got {radius}")
        self.center, self.cov, self.radius = np.array(center), np.array(cov), radius
        self.root: Floats = np.asarray(np.linalg.cholesky(self.cov), dtype=np.float64)
        self.inverse: Floats = np.asarray(np.linalg.inv(self.root), dtype=np.float64)

    @property
    def sigma(self) -> Floats:
        """Standard deviations (F,) of the parameters."""
        return np.sqrt(np.diag(self.cov))

    def to_z(self, theta: Floats) -> Floats:
        """Return z = Σ^{-1/2}(θ − center) for (F,) or (B, F)."""
        return np.asarray((theta - self.center) @ self.inverse.T)

    def from_z(self, z: Floats) -> Floats:
        """Return θ = center + Σ^{1/2} z."""
        return np.asarray(self.center + z @ self.root.T)

    def distance(self, theta: Floats) -> float:
        """Return the Mahalanobis distance of (F,) from the center."""
        return float(np.linalg.norm(self.to_z(theta)))

    def contains(self, theta: Floats) -> bool:
        """Return whether a design lies inside."""
        return self.distance(theta) < self.radius

    def sample(self, n: int, rng: np.random.Generator, kappa: float = 1.0) -> Floats:
        """Return n designs (n, F) from Normal(center, kappa Σ)."""
        z = rng.standard_normal((n, self.center.size)) * math.sqrt(kappa)
        return self.from_z(z)


@dataclass(frozen=True)
class Step:
    """Where an ascent ended.

    Attributes:
        theta: (F,) the last point inside the region.
        gain: predicted rise of the objective's mean.
        at_boundary: whether the region stopped it.
        length: Mahalanobis length of the step.
    """

    theta: Floats
    gain: float
    at_boundary: bool
    length: float


def ascend(
    surrogate: nn.Module,
    region: Region,
    space: DesignSpace,
    *,
    beta: float = 0.5,
    lr: float = 0.1,
    epochs: int = 60,
    multipliers: Tensor | None = None,
    penalty: float = 10.0,
    tolerance: float = 1e-5,
) -> Step:
    """Climb mean(s) − β std(s) − penalties by Adam in z units, and return the last point inside.

    Soft constraints enter as an augmented Lagrangian, (μ/2) Σ relu(g + λ/μ)², in units of the
    surrogate's spread; bounds and linear constraints are met by projection after every step. Of choices
    it is the options' weights that move, and the surrogate counts as in `Relaxed`; where they rest, the
    best combination of options is taken at once, even outside the region.

    Args:
        surrogate: of z, not of θ.
        region: the trust region; its center is feasible.
        space: bounds and constraints.
        beta: weight of the standard deviation.
        lr: of Adam, in z units.
        epochs: steps at most.
        multipliers: (J,) λ of the soft constraints.
        penalty: μ.
        tolerance: stop when a step is shorter, squared in z units.

    Raises:
        FloatingPointError: the surrogate's gradient is not finite.
    """
    dtype = next((b.dtype for b in surrogate.buffers()), torch.float64)
    if space.blocks:
        surrogate = Relaxed(surrogate, region, space)
    root = torch.from_numpy(region.root).to(dtype)
    center = torch.from_numpy(region.center).to(dtype)
    theta = region.center
    z = torch.zeros(center.numel(), dtype=dtype, requires_grad=True)
    adam = torch.optim.Adam([z], lr)
    at_boundary = False
    with torch.no_grad():
        start = float(surrogate(z[None])[0][0])
        unit = float(getattr(surrogate, "spread", torch.tensor(1.0)))
    for _ in range(epochs):
        mean, std = surrogate(z[None])
        goal = mean[0] - beta * std[0]
        if space.soft:
            point = (center + root @ z)[None]
            excess = torch.stack([soft.violation(point)[0] for soft in space.soft])
            shift = torch.zeros_like(excess) if multipliers is None else multipliers.to(dtype)
            terms = torch.relu(excess + shift / penalty).square()
            goal = goal - unit * penalty / 2 * terms.sum()
        (z.grad,) = torch.autograd.grad(-goal, z)
        if not bool(torch.isfinite(z.grad).all()):
            raise FloatingPointError("the surrogate's gradient is not finite")
        before = z.detach().clone()
        adam.step()
        proposal = space.project(region.from_z(z.detach().double().numpy()))
        if not region.contains(proposal):
            at_boundary = True
            break
        theta = proposal
        with torch.no_grad():
            z.copy_(torch.from_numpy(region.to_z(proposal)).to(dtype))
            if float((z - before).square().sum()) < tolerance:
                break
    if space.soft:
        restored = space.restore(theta)
        # a restored point may lie outside; go back towards the feasible center until it does not
        inside = region.contains(restored)
        if space.blocks:  # nor may the design that is simulated break a constraint
            inside = inside and space.violation(space.concrete(restored)) <= 1e-3
        theta = restored if inside else region.center
    moved = np.abs(theta - region.center)[space.discrete]
    if isinstance(surrogate, Relaxed) and float(moved.max()) < 1e-9:
        # no single option is better, but several at once may be; the simulator judges such a leap
        here = torch.from_numpy(region.to_z(theta)).to(dtype)[None]
        other = np.where(space.discrete, surrogate.best(here, beta), theta)
        theta = other if space.violation(other) <= 1e-3 else theta
    with torch.no_grad():
        end = torch.from_numpy(region.to_z(theta)).to(dtype)
        gain = float(surrogate(end[None])[0][0]) - start
    return Step(theta, gain, at_boundary, region.distance(theta))


def stretched(sigma: Floats, move: Floats) -> Floats:
    """Return AIDO's covariance, longer along the last move: diag(σ²) + (s − 1) n nᵀ.

    n = δ/(‖δ‖ + 1e-4), s = 2 max(1, 4‖δ‖). (Its code squares σ twice.)

    Example:
        >>> stretched(np.ones(2), np.array([1.0, 0.0])).round(2).tolist()
        [[8.0, 0.0], [0.0, 1.0]]
    """
    length = float(np.linalg.norm(move))
    n = move / (length + 1e-4)
    return np.asarray(np.diag(sigma**2) + (2 * max(1.0, 4 * length) - 1) * np.outer(n, n))


def rescaled(cov: Floats, factor: float, smallest: Floats, largest: Floats) -> Floats:
    """Return factor · Σ with the standard deviations kept within [smallest, largest].

    Example:
        >>> rescaled(np.eye(1), 4.0, np.array([0.1]), np.array([1.5]))
        array([[2.25]])
    """
    sigma = np.sqrt(np.diag(cov))
    wanted = np.clip(sigma * math.sqrt(factor), smallest, largest)
    ratio = wanted / sigma
    return np.asarray(cov * np.outer(ratio, ratio))
