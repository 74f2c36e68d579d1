"""Checks of arguments, made once at the boundary."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any


def at_least(name: str, value: Any, low: float) -> None:
    """Raise ValueError unless ``value`` is a number >= ``low``."""
    if not (isinstance(value, Real) and low <= float(value) < math.inf):
        raise ValueError(f"{name} must be a finite number >= {low}, got {value!r}")


def above(name: str, value: Any, low: float) -> None:
    """Raise ValueError unless ``value`` is a number > ``low``."""
    if not (isinstance(value, Real) and low < float(value) < math.inf):
        raise ValueError(f"{name} must be a finite number > {low}, got {value!r}")


def within(name: str, value: Any, low: float, high: float) -> None:
    """Raise ValueError unless ``low <= value <= high``."""
    if not (isinstance(value, Real) and low <= float(value) <= high):
        raise ValueError(f"{name} must lie in [{low}, {high}], got {value!r}")


def one_of(name: str, value: object, allowed: Collection[object]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {sorted(map(repr, allowed))}, got {value!r}")


def count(name: str, value: Any, low: int = 1) -> None:
    """Raise ValueError unless ``value`` is an integer >= ``low``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
