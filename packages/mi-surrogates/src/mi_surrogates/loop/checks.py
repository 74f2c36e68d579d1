"""Checks of the loop: its numbers, and whether the objective depends on the design at all."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import fdtrc

Floats = NDArray[np.float64]


def is_level(z: Floats, value: Floats, stderr: Floats) -> bool:
    """Return whether all values agree within their errors and show no linear trend in z.

    Common random numbers hide a trend in the errors of single values, hence the second test.

    Args:
        z: (P, F) designs.
        value: (P,) objective.
        stderr: (P,) standard errors.

    Example:
        >>> z = np.linspace(-1, 1, 10)[:, None]
        >>> is_level(z, np.zeros(10), np.ones(10)), is_level(z, 9 * z[:, 0], np.ones(10))
        (True, False)
    """
    noise = float(np.median(stderr))
    if np.ptp(value) == 0:
        return True
    if noise == 0:
        return False
    freedom = len(value) - 1
    chi = float((((value - value.mean()) / np.maximum(stderr, 1e-12 * noise)) ** 2).sum())
    if float(value.std()) < 0.3 * noise:
        return True
    within = chi < freedom + 2 * math.sqrt(2 * freedom)
    return within and trend_probability(z, value) > 0.01


def trend_probability(z: Floats, value: Floats) -> float:
    """Return the p-value of an F test for a linear dependence of value (P,) on z (P, F).

    Example:
        >>> z = np.linspace(-1, 1, 10)[:, None]
        >>> trend_probability(z, z[:, 0]) < 1e-6 < trend_probability(z, z[:, 0] ** 2)
        True
    """
    size, dim = z.shape
    if size < dim + 2:
        return 0.0
    design = np.column_stack([np.ones(size), z])
    fitted = design @ np.linalg.lstsq(design, value, rcond=None)[0]
    left = float(((value - fitted) ** 2).sum())
    explained = float(((fitted - value.mean()) ** 2).sum())
    ratio = (explained / dim) / max(left / (size - dim - 1), 1e-300)
    return float(fdtrc(dim, size - dim - 1, ratio))


def check_counts(**counts: tuple[int, int]) -> None:
    """Raise ValueError, naming it, for a count that is below its least value.

    Example:
        >>> check_counts(designs=(1, 2))
        Traceback (most recent call last):
            ...
        ValueError: designs must be at least 2, got 1
    """
    for name, (number, least) in counts.items():
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")


def check_positive(**values: float) -> None:
    """Raise ValueError, naming it, for a value that is not positive.

    Example:
        >>> check_positive(lr=0.0)
        Traceback (most recent call last):
            ...
        ValueError: lr must be positive, got 0.0
    """
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def check_training(events: int, batch_size: int) -> None:
    """Raise ValueError if there are too few events of a design to train on.

    Example:
        >>> check_training(400, 500)
        Traceback (most recent call last):
            ...
        ValueError: batch_size 500 is above the 400 events
    """
    if events < 50:
        raise ValueError(f"a learned objective needs events >= 50, got {events}")
    if batch_size > events:
        raise ValueError(f"batch_size {batch_size} is above the {events} events")
