"""Noisy channels with exact information: Gaussian, water-filling, uniform, the authors', saturating."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr, ndtr

from mi_surrogates.design.space import DesignSpace
from mi_surrogates.problems.base import Problem

Floats = NDArray[np.float64]
Events = tuple[Floats, Floats]


def gaussian_information(rho: float) -> float:
    """Return −½ log(1 − ρ²), the information of two Gaussians with correlation ρ.

    Example:
        >>> round(gaussian_information(0.99), 6)
        1.958518
    """
    return -0.5 * float(np.log1p(-(rho**2)))


def linear_information(a: Floats, cov_x: Floats, cov_noise: Floats) -> float:
    """Return ½ log det(I + Σ_n⁻¹ A Σ_x Aᵀ) of y = A x + n with Gaussian x and n.

    Example:
        >>> round(linear_information(np.eye(1) * 3, np.eye(1), np.eye(1)), 6)
        1.151293
    """
    signal = np.linalg.solve(cov_noise, a @ cov_x @ a.T)
    return 0.5 * float(np.linalg.slogdet(np.eye(len(signal)) + signal)[1])


def uniform_information(epsilon: float) -> float:
    """Return the information of X ~ U(0, 1) and X + U(−ε, ε): ε − log 2ε, or 1/(4ε) for ε > ½.

    Example:
        >>> round(uniform_information(0.1), 6), round(uniform_information(0.75), 6)
        (1.709438, 0.333333)
    """
    return epsilon - float(np.log(2 * epsilon)) if epsilon <= 0.5 else 1 / (4 * epsilon)


def differential_entropy(density: Floats, step: float) -> float:
    """Return −∫ p log p of a density on a regular grid, by the trapezoidal rule.

    Example:
        >>> t = np.linspace(-12, 12, 4001)
        >>> p = np.exp(-t**2 / 2) / np.sqrt(2 * np.pi)
        >>> round(differential_entropy(p, t[1] - t[0]), 6)
        1.418939
    """
    safe = np.where(density > 0, density, 1.0)
    values = -density * np.log(safe)
    return float((values.sum() - (values[0] + values[-1]) / 2) * step)


def correlated(theta: Floats, n: int, seed: int) -> Events:
    """Two standard Gaussians with correlation θ."""
    x, noise = np.random.default_rng(seed).standard_normal((2, n))
    rho = float(theta[0])
    return x[:, None], (rho * x + np.sqrt(1 - rho**2) * noise)[:, None]


GAINS = np.array([4.0, 2.0, 1.0, 0.25])


def parallel_channels(theta: Floats, n: int, seed: int) -> Events:
    """Four Gaussian channels with gains 4, 2, 1, ¼ and powers θ: y = √(g P) x + n."""
    x, noise = np.random.default_rng(seed).standard_normal((2, n, 4))
    return x, np.sqrt(GAINS * np.maximum(theta, 0)) * x + noise


def _water_information(theta: Floats) -> float:
    return linear_information(np.diag(np.sqrt(GAINS * theta)), np.eye(4), np.eye(4))


def _water_space() -> DesignSpace:
    space = DesignSpace(initial=[0.5] * 4, lower=0.0, upper=2.0, sigma=0.2, names=list("abcd"))
    space.add_linear([1.0] * 4, 2.0, equal=True)
    return space


def uniform_noise(theta: Floats, n: int, seed: int) -> Events:
    """X ~ U(0, 1), Y = X + U(−θ, θ)."""
    x, noise = np.random.default_rng(seed).random((2, n))
    return x[:, None], (x + float(theta[0]) * (2 * noise - 1))[:, None]


def noisy_channel(theta: Floats, n: int, seed: int) -> Events:
    """The authors' example: x ~ U(0, 4), y = x + N(0, θ1²) − log(θ2) x."""
    rng = np.random.default_rng(seed)
    x, noise = rng.uniform(0, 4, n), rng.standard_normal(n)
    return x[:, None], (x * (1 - np.log(theta[1])) + theta[0] * noise)[:, None]


def noisy_channel_information(theta: Floats) -> float:
    """Return the information of `noisy_channel` by quadrature.

    Example:
        >>> round(noisy_channel_information(np.array([0.7, 1.6])), 6)
        0.282504
    """
    sigma, width = float(theta[0]), 4 * abs(1 - float(np.log(theta[1])))
    t = np.linspace(-10 * sigma, width + 10 * sigma, 20_001)
    if width < 1e-12:
        return 0.0
    density = (ndtr(t / sigma) - ndtr((t - width) / sigma)) / width
    noise = 0.5 * np.log(2 * np.pi * np.e * sigma**2)
    return differential_entropy(density, t[1] - t[0]) - float(noise)


def saturating_sensor(theta: Floats, n: int, seed: int) -> Events:
    """x ~ N(0, 1), y = clip(θ x, −1, 1) + N(0, 0.1²)."""
    x, noise = np.random.default_rng(seed).standard_normal((2, n))
    return x[:, None], (np.clip(float(theta[0]) * x, -1, 1) + 0.1 * noise)[:, None]


def saturating_information(theta: Floats) -> float:
    """Return the information of `saturating_sensor` by quadrature.

    Example:
        >>> round(saturating_information(np.array([0.5])), 5)
        1.57161
    """
    gain, sigma = float(theta[0]), 0.1
    t = np.linspace(-2, 2, 8001)
    ends = float(np.exp(log_ndtr(-1 / gain)))

    def normal(u: Floats) -> Floats:
        return np.asarray(np.exp(-((u / sigma) ** 2) / 2) / (sigma * np.sqrt(2 * np.pi)))

    density = ends * (normal(t - 1) + normal(t + 1))
    # inside, u = θ x is Gaussian of width θ cut at ±1; the product with the noise is Gaussian again
    total = gain**2 + sigma**2
    mean, width = t * gain**2 / total, gain * sigma / np.sqrt(total)
    inside = ndtr((1 - mean) / width) - ndtr((-1 - mean) / width)
    density = density + inside * np.exp(-(t**2) / (2 * total)) / np.sqrt(2 * np.pi * total)
    noise = 0.5 * np.log(2 * np.pi * np.e * sigma**2)
    return differential_entropy(density, t[1] - t[0]) - float(noise)


CHANNELS = [
    Problem(
        "correlated",
        correlated,
        lambda: DesignSpace(initial=[0.3], lower=0.0, upper=0.9, sigma=0.1, names=["rho"]),
        lambda theta: gaussian_information(float(theta[0])),
        gaussian_information(0.9),
        (0.9,),
    ),
    Problem(
        "water_filling",
        parallel_channels,
        _water_space,
        _water_information,
        0.5 * float(np.log(15.625)),
        (1.0, 0.75, 0.25, 0.0),
        method="gaussian",
    ),
    Problem(
        "uniform_noise",
        uniform_noise,
        lambda: DesignSpace(initial=[0.75], lower=0.1, upper=2.0, sigma=0.1, names=["epsilon"]),
        lambda theta: uniform_information(float(theta[0])),
        uniform_information(0.1),
        (0.1,),
    ),
    Problem(
        "noisy_channel",
        noisy_channel,
        lambda: DesignSpace(
            initial=[1.2, 1.6], lower=[0.2, 1.0], upper=2.2, sigma=[0.2, 0.1], names=["t1", "t2"]
        ),
        noisy_channel_information,
        1.667113,
        (0.2, 1.0),
    ),
    Problem(
        "saturating_sensor",
        saturating_sensor,
        lambda: DesignSpace(initial=[0.3], lower=0.05, upper=3.0, sigma=0.15, names=["gain"]),
        saturating_information,
        1.746244,
        (0.85034,),
    ),
]
