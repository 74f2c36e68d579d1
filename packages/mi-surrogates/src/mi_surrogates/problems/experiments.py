"""Designs of experiments with exact information: a death process, a regression, a ring of sensors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr, gammaln, xlog1py, xlogy

from mi_surrogates.design.space import DesignSpace
from mi_surrogates.problems.base import Problem
from mi_surrogates.problems.channels import linear_information

Floats = NDArray[np.float64]
Events = tuple[Floats, Floats]
POPULATION = 50


class DeathProcess:
    """Infected ~ Bin(50, 1 − e^{−b t}) at the time θ = t, for an unknown rate b.

    Args:
        prior: "normal" (b ~ N(1, 1) truncated to b > 0) or "lognormal" (log b ~ N(0, 1)).

    Example:
        >>> round(DeathProcess("normal").information(np.array([1.276])), 5)
        1.35592
    """

    def __init__(self, prior: str = "normal") -> None:
        if prior not in ("normal", "lognormal"):
            raise ValueError(f"prior must be 'normal' or 'lognormal', got {prior!r}")
        self.prior = prior

    def __call__(self, theta: Floats, n: int, seed: int) -> Events:
        """Draw rates (n, 1) and counts (n, 1)."""
        rng = np.random.default_rng(seed)
        if self.prior == "lognormal":
            rate = rng.lognormal(0, 1, n)
        else:
            rate = rng.normal(1, 1, 8 * n + 64)
            rate = rate[rate > 0][:n]
        count = rng.binomial(POPULATION, -np.expm1(-rate * float(theta[0])))
        return rate[:, None], count[:, None].astype(np.float64)

    def _prior(self) -> tuple[Floats, Floats]:
        """Return a grid of rates and its weights."""
        if self.prior == "lognormal":
            s = np.linspace(-9, 9, 6001)
            rate, weight = np.exp(s), np.exp(-(s**2) / 2)
        else:
            rate = np.linspace(0, 9, 12_001)
            weight = np.exp(-((rate - 1) ** 2) / 2)
            weight[0] /= 2
        return rate, weight / weight.sum()

    def information(self, theta: Floats) -> float:
        """Return I(b; count | t) in nats, by quadrature over b and the sum over counts."""
        rate, weight = self._prior()
        k = np.arange(POPULATION + 1)[:, None]
        p = -np.expm1(-rate * float(theta[0]))
        choose = gammaln(POPULATION + 1) - gammaln(k + 1) - gammaln(POPULATION - k + 1)
        pmf = np.exp(choose + xlogy(k, p) + xlog1py(POPULATION - k, -p))
        return float(entr(pmf @ weight).sum() - weight @ entr(pmf).sum(0))

    def x_entropy(self) -> float:
        """Return the entropy of the prior in nats."""
        half = 0.5 * np.log(2 * np.pi * np.e)
        if self.prior == "lognormal":
            return float(half)
        rate, weight = self._prior()
        step = rate[1] - rate[0]
        return float(entr(weight / step)[1:].sum() * step)


def regression(theta: Floats, n: int, seed: int) -> Events:
    """Quadratic regression: β ~ N(0, 100 I), y = β0 + β1 t + β2 t² + N(0, 1) at three points θ = t."""
    rng = np.random.default_rng(seed)
    beta, noise = 10 * rng.standard_normal((n, 3)), rng.standard_normal((n, 3))
    return beta, beta @ np.vander(theta, 3, increasing=True).T + noise


def regression_information(theta: Floats) -> float:
    """Return the exact information of `regression`.

    Example:
        >>> round(regression_information(np.array([-1.0, 0.0, 1.0])), 6)
        7.615767
    """
    return linear_information(np.vander(theta, 3, increasing=True), 100 * np.eye(3), np.eye(3))


class SensorRing:
    """Fleuret's toy: a particle leaves the origin at an angle, sensors of radius r fire if it crosses them.

    θ = (x1, y1, …, xK, yK). Sensor j fires if abs(−sin β x_j + cos β y_j) ≤ r and the particle flies towards
    it, with β = α + U(−ε/2, ε/2). x = (cos α, sin α), y has K bits.

    Args:
        radius: r.
        epsilon: ε; `information` is exact for 0 only.

    Example:
        >>> ring = SensorRing()
        >>> theta = np.array([0.3, 0.0, -0.15, 0.26, -0.15, -0.26])
        >>> bool(abs(ring.information(theta) - np.log(6)) < 0.001)
        True
    """

    def __init__(self, radius: float = 0.5, epsilon: float = 0.0) -> None:
        self.radius, self.epsilon = radius, epsilon

    def __call__(self, theta: Floats, n: int, seed: int) -> Events:
        """Fly n particles."""
        rng = np.random.default_rng(seed)
        alpha = rng.uniform(0, 2 * np.pi, n)
        beta = alpha + self.epsilon * (rng.random(n) - 0.5)
        fired = self.fires(theta, beta)
        return np.stack([np.cos(alpha), np.sin(alpha)], 1), fired.astype(np.float64)

    def fires(self, theta: Floats, beta: Floats) -> NDArray[np.bool_]:
        """Return (n, K): which sensors a particle at the angle β crosses."""
        px, py = theta[::2], theta[1::2]
        c, s = np.cos(beta)[:, None], np.sin(beta)[:, None]
        return np.asarray((np.abs(c * py - s * px) <= self.radius) & (c * px + s * py >= 0))

    def information(self, theta: Floats) -> float:
        """Return H(Y) in nats (ε = 0) from the arcs between all angles where a sensor changes."""
        px, py = theta[::2], theta[1::2]
        distance, angle = np.hypot(px, py), np.arctan2(py, px)
        half = np.where(
            distance > self.radius,
            np.arcsin(np.minimum(self.radius / np.maximum(distance, 1e-300), 1)),
            np.pi / 2,
        )
        cuts = np.sort(np.concatenate([angle - half, angle + half]) % (2 * np.pi))
        cuts = np.append(cuts, cuts[0] + 2 * np.pi)
        patterns = self.fires(theta, (cuts[1:] + cuts[:-1]) / 2)
        codes = patterns @ (2 ** np.arange(patterns.shape[1]))
        share = np.bincount(codes, weights=np.diff(cuts) / (2 * np.pi))
        return float(entr(share).sum())


class NoisyRosenbrock:
    """Rosenbrock's valley of two hidden directions of F parameters, with noise; y only, x is a dummy.

    Args:
        dim: F.
        noise: standard deviation of an event.
        seed: of the random plane; F = 2 is the plain function.

    Example:
        >>> f = NoisyRosenbrock(2)
        >>> f.value(np.array([1.0, 1.0]))
        -0.0
    """

    def __init__(self, dim: int = 2, noise: float = 1.0, seed: int = 0) -> None:
        draw = np.random.default_rng(seed).standard_normal((dim, 2))
        self.plane = np.eye(2) if dim == 2 else np.linalg.qr(draw)[0]
        self.noise = noise

    def value(self, theta: Floats) -> float:
        """Return −f(u), u = the hidden coordinates; the largest value is 0."""
        u, v = theta @ self.plane
        return float(-(100 * (v - u * u) ** 2 + (1 - u) ** 2))

    def __call__(self, theta: Floats, n: int, seed: int) -> Events:
        """Return a dummy x (n, 1) and noisy values y (n, 1)."""
        rng = np.random.default_rng(seed)
        x, noise = rng.standard_normal((2, n, 1))
        return x, self.value(theta) + self.noise * noise


class ThreeHump(NoisyRosenbrock):
    """The three-hump camel of two hidden directions of F parameters, with noise.

    Example:
        >>> ThreeHump(2).value(np.zeros(2))
        -0.0
    """

    def value(self, theta: Floats) -> float:
        """Return −f(u), u = the hidden coordinates; the largest value is 0."""
        u, v = theta @ self.plane
        return float(-(2 * u**2 - 1.05 * u**4 + u**6 / 6 + u * v + v**2))


def _death(prior: str, time: float, best: float) -> Problem:
    process = DeathProcess(prior)
    return Problem(
        f"death_{prior}",
        process,
        lambda: DesignSpace(initial=[3.0], lower=0.05, upper=8.0, sigma=0.5, names=["time"]),
        process.information,
        best,
        (time,),
        method="ba",
        options={"x_entropy": process.x_entropy(), "components": 3},
    )


_RING = SensorRing()
EXPERIMENTS = [
    _death("normal", 1.27578, 1.355925),
    _death("lognormal", 1.02917, 1.506106),
    Problem(
        "regression",
        regression,
        lambda: DesignSpace(
            initial=[-0.4, 0.1, 0.5], lower=-1.0, upper=1.0, sigma=0.15, names=["t1", "t2", "t3"]
        ),
        regression_information,
        7.615767,
        (-1.0, 0.0, 1.0),
        method="gaussian",
    ),
    Problem(
        "sensor_ring",
        _RING,
        lambda: DesignSpace(
            initial=[1.0, 0.1, 0.9, 0.8, 0.3, 1.2], lower=-2.0, upper=2.0, sigma=0.2
        ),
        _RING.information,
        float(np.log(6)),
        (0.3, 0.0, -0.15, 0.2598, -0.15, -0.2598),
        unique=False,
        method="mine",
    ),
]
