"""Small simulators at the top of a module, so that every executor can pickle them."""

from __future__ import annotations

import os
import time

import numpy as np
import torch

from mi_surrogates import DesignSpace


def linear(theta: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian x; the noise is smallest at theta = (0.7, 0.4)."""
    x, noise = np.random.default_rng(seed).standard_normal((2, n))
    return x, x + (0.2 + ((theta - [0.7, 0.4]) ** 2).sum()) * noise


MATERIALS = ["Pb", "Fe", "W"]  # least noise 0.8, 0.2, 0.5, at a = 0.3, 0.5, 0.8


def materials(theta: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian x; the noise is smallest for Fe and a = 0.5. Only one-hot designs are allowed."""
    if sorted(theta[:3]) != [0.0, 0.0, 1.0]:
        raise ValueError(f"no such material: {theta[:3]}")
    x, noise = np.random.default_rng(seed).standard_normal((2, n))
    return x, x + (
        theta[:3] @ [0.8, 0.2, 0.5] + (theta[3] - theta[:3] @ [0.3, 0.5, 0.8]) ** 2
    ) * noise


def price(theta: torch.Tensor) -> torch.Tensor:
    """A constraint: a, and a surcharge for Fe."""
    return theta[:, 3] + 0.6 * theta[:, 1]


def ring(theta: torch.Tensor) -> torch.Tensor:
    """A constraint: the squared distance from the origin."""
    return theta.square().sum(-1)


def ignores(theta: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    x, noise = np.random.default_rng(seed).standard_normal((2, n))
    return x, x + noise


def sometimes_fails(theta: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    if round(theta[0] * 1e6) % 5 == 1:
        raise RuntimeError("the beam tripped")
    return linear(theta, n, seed)


def always_fails(theta: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    raise RuntimeError("no licence")


def hangs_sometimes(theta: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    if round(theta[0] * 1e6) % 5 == 1:
        time.sleep(3.0)
    return linear(theta, n, seed)


def straggles(theta: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    time.sleep(0.03 * float(theta[0] > 0.3))
    return linear(theta, n, seed)


def kills_its_worker(theta: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    os._exit(3)


class Unpicklable:
    def __init__(self) -> None:
        self.good = 1
        self.handle = lambda: None

    def __call__(self, theta: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        return linear(theta, n, seed)


def space() -> DesignSpace:
    return DesignSpace(initial=[0.3, 0.8], lower=0.0, upper=1.0, sigma=0.08, names=["a", "b"])
