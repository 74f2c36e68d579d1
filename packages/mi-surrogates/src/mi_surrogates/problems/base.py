"""What a problem with a known answer is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mi_surrogates.design.space import DesignSpace
from mi_surrogates.loop.execute import Simulator

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """A simulator whose information is known exactly.

    Attributes:
        name: of the problem.
        simulator: `(theta, n, seed) -> (x, y)`, picklable.
        make_space: returns a fresh design space.
        information: θ → I(X; Y | θ) in nats, exact or by quadrature.
        best: the largest information in the space.
        theta: a design that has it.
        unique: whether all optimal designs are permutations or reflections of `theta`; where False only
            the information tells.
        method: an estimator that suits the data.
        options: for `MIObjective`, such as `x_entropy`.
    """

    name: str
    simulator: Simulator
    make_space: Callable[[], DesignSpace]
    information: Callable[[Floats], float]
    best: float
    theta: tuple[float, ...]
    unique: bool = True
    method: str = "ksg"
    options: dict[str, Any] = field(default_factory=dict)
