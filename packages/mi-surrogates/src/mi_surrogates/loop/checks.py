"""Checks of the loop: its numbers, and whether the objective depends on the design at all."""

from __future__ import annotations

import math
import operator

import numpy as np
from numpy.typing import NDArray
from scipy.special import fdtrc
from torch import nn

from mi_surrogates.design.surrogate import QuadraticSurrogate

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


def trend_probability(z: Floats, value: Floats, block: NDArray[np.int64] | None = None) -> float:
    """Return the p-value of an F test for a linear dependence of value (P,) on z (P, F).

    With `block` (P,), every block has a level of its own.

    Example:
        >>> z = np.linspace(-1, 1, 10)[:, None]
        >>> trend_probability(z, z[:, 0]) < 1e-6 < trend_probability(z, z[:, 0] ** 2)
        True
    """
    size, dim = z.shape
    labels = np.zeros(size, np.int64) if block is None else block
    level = (labels[:, None] == np.unique(labels)).astype(np.float64)
    freedom = size - dim - level.shape[1]
    if freedom < 1:
        return 0.0

    def left(design: Floats) -> float:
        fitted = design @ np.linalg.lstsq(design, value, rcond=None)[0]
        return float(((value - fitted) ** 2).sum())

    without, rest = left(level), left(np.column_stack([level, z]))
    explained = max(without - rest, 0.0)  # rounding
    return float(fdtrc(dim, freedom, explained / dim / max(rest / freedom, 1e-300)))


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


def count_designs(designs: int | str, surrogate: str | nn.Module, dim: int) -> int:
    """Return the number of designs that is meant, max(8, F + 4) for "auto".

    Raises:
        ValueError: another word, or too few designs for a quadratic surrogate.
        TypeError: neither a whole number nor a word.

    Example:
        >>> count_designs("auto", "quadratic", 6), count_designs(20, "quadratic", 6)
        (10, 20)
    """
    if isinstance(designs, str):
        if designs != "auto":
            raise ValueError(f"designs must be a number or 'auto', got {designs!r}")
        return max(8, dim + 4)
    try:
        designs = operator.index(designs)
    except TypeError:
        raise TypeError(f"designs must be a whole number or 'auto', got {designs!r}") from None
    quadratic = surrogate == "quadratic" or isinstance(surrogate, QuadraticSurrogate)
    if quadratic and designs < dim + 2:
        raise ValueError(
            f"a quadratic surrogate of {dim} parameters needs designs >= {dim + 2}, got {designs}"
        )
    return designs


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
