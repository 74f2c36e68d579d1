"""The space of designs: named parameters, bounds, linear and soft constraints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mi_surrogates.design.choice import COMBINATIONS, SIGMA, Choice, named
from mi_surrogates.design.projection import nearest, nearest_soft
from mi_surrogates.errors import InfeasibleDesign

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Parameter:
    """One continuous parameter: its start, its bounds and the spread of the first designs.

    Args:
        initial: where to start.
        lower: lower bound.
        upper: upper bound.
        sigma: standard deviation of the first neighbourhood; a tenth of the range by default.

    Example:
        >>> Parameter(20.0, 0.05, 100.0, sigma=3.0).sigma
        3.0
    """

    initial: float
    lower: float
    upper: float
    sigma: float | None = None


@dataclass(frozen=True)
class Soft:
    """A constraint g(θ) ≤ upper with g differentiable and batched, (B, F) to (B,)."""

    function: Callable[[Tensor], Tensor]
    upper: float

    @property
    def scale(self) -> float:
        """What violations are relative to: |upper|, or 1 where that is 0."""
        return abs(self.upper) or 1.0

    def violation(self, theta: Tensor) -> Tensor:
        """Return (g − upper)/|upper| (B,), negative where the constraint holds."""
        value = self.function(theta)
        if not isinstance(value, Tensor):
            raise TypeError(f"a constraint must return a tensor, got {type(value).__name__}")
        if value.shape != theta.shape[:1]:
            raise ValueError(
                f"a constraint must map (B, F) to (B,), got {tuple(value.shape)} "
                f"from {tuple(theta.shape)}"
            )
        return (value - self.upper) / self.scale


class DesignSpace:
    """Bounded continuous designs, and discrete choices.

    Args:
        parameters: name → `Parameter` or `Choice`; or leave it out and give the arrays.
        initial: (F,) start.
        lower: (F,) or a number.
        upper: (F,) or a number.
        sigma: (F,) or a number; a tenth of the range by default.
        names: of the parameters; "theta0", … by default.

    Attributes:
        names, initial, lower, upper, sigma: as given; arrays are float64. A choice has a column
            "name=option" for each of its options, with weights ≥ 0 that sum to 1.
        linear: rows A and bounds b of A θ ≤ b.
        soft: the soft constraints.
        choices: name → options of every `Choice`.
        blocks: columns of every choice.
        discrete: (F,) whether a column is one of a choice's.

    Raises:
        ValueError: no parameters, duplicate names, lower ≥ upper, a start out of bounds, sigma ≤ 0,
            a bad `Choice`, or more than 1000 combinations of options.
        TypeError: a value is neither a `Parameter` nor a `Choice`.

    Example:
        >>> space = DesignSpace({"a": Parameter(20, 0, 100), "s": Parameter(5, 0, 100)})
        >>> space.add_linear([1.0, 1.0], upper=50.0)
        >>> space.project(np.array([60.0, 30.0]))
        array([40., 10.])
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter | Choice] | None = None,
        *,
        initial: Sequence[float] | Floats | None = None,
        lower: Sequence[float] | Floats | float = 0.0,
        upper: Sequence[float] | Floats | float = 1.0,
        sigma: Sequence[float] | Floats | float | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        if (parameters is None) == (initial is None):
            raise ValueError("give either parameters or initial, lower, upper")
        self.choices: dict[str, list[str]] = {}
        self.blocks: list[list[int]] = []
        if parameters is not None:
            parameters = self._columns(parameters)
            names = list(parameters)
            initial, lower, upper, wide = (
                [
                    math.nan if (value := getattr(p, field)) is None else float(value)
                    for p in parameters.values()
                ]
                for field in ("initial", "lower", "upper", "sigma")
            )
            spread = np.array(wide, dtype=np.float64)
        else:
            size = np.atleast_1d(np.asarray(initial, dtype=np.float64)).size
            given = math.nan if sigma is None else sigma
            spread = np.broadcast_to(np.asarray(given, dtype=np.float64), (size,)).copy()
        start = np.atleast_1d(np.asarray(initial, dtype=np.float64))
        self.names = [f"theta{i}" for i in range(start.size)] if names is None else list(names)
        if start.size == 0:
            raise ValueError("a design space needs at least one parameter")
        if len(set(self.names)) != len(self.names) or len(self.names) != start.size:
            raise ValueError(f"names must be {start.size} different ones, got {self.names}")
        self.initial: Floats = start
        self.lower: Floats = np.broadcast_to(
            np.asarray(lower, dtype=np.float64), start.shape
        ).copy()
        self.upper: Floats = np.broadcast_to(
            np.asarray(upper, dtype=np.float64), start.shape
        ).copy()
        self.sigma: Floats = np.where(np.isnan(spread), (self.upper - self.lower) / 10, spread)
        for i, name in enumerate(self.names):
            if not math.isfinite(self.upper[i] - self.lower[i]):
                raise ValueError(
                    f"parameter {name!r}: the bounds must be finite, got [{self.lower[i]}, "
                    f"{self.upper[i]}]"
                )
            if not self.lower[i] < self.upper[i]:
                raise ValueError(
                    f"parameter {name!r}: lower {self.lower[i]} must be below upper {self.upper[i]}"
                )
            if not self.lower[i] <= start[i] <= self.upper[i]:
                raise ValueError(
                    f"parameter {name!r}: initial {start[i]} is outside "
                    f"[{self.lower[i]}, {self.upper[i]}]"
                )
            if not 0 < self.sigma[i] < math.inf:
                raise ValueError(f"parameter {name!r}: sigma must be positive, got {self.sigma[i]}")
        self.soft: list[Soft] = []
        self.discrete = np.zeros(self.dim, dtype=np.bool_)
        for block in self.blocks:
            self.discrete[block] = True
        eye = np.eye(self.dim)
        self.linear: list[tuple[Floats, float, bool]] = [
            (eye[block].sum(0), 1.0, True) for block in self.blocks
        ]

    def _columns(self, parameters: Mapping[str, Parameter | Choice]) -> dict[str, Parameter]:
        """Note the choices, and return the parameters with a column for each option in their place."""
        columns: dict[str, Parameter] = {}
        clash: list[str] = []
        for name, each in parameters.items():
            if isinstance(each, Parameter):
                new = {name: each}
            elif not isinstance(each, Choice):
                raise TypeError(f"parameter {name!r} must be a Parameter or a Choice, got {each!r}")
            else:
                start = zip(each.options, each.start(name), strict=True)
                new = {f"{name}={o}": Parameter(float(w), 0.0, 1.0, SIGMA) for o, w in start}
                self.choices[name] = list(each.options)
                self.blocks.append(list(range(len(columns), len(columns) + len(new))))
            clash += set(columns) & set(new)
            columns.update(new)
        if clash:
            raise ValueError(f"names must be different, got {sorted(clash)} twice")
        if (size := math.prod(map(len, self.blocks))) > COMBINATIONS:
            raise ValueError(
                f"parameters {', '.join(self.choices)}: at most {COMBINATIONS} combinations of options "
                f"are supported, got {size}"
            )
        return columns

    @property
    def dim(self) -> int:
        """F, the number of parameters."""
        return int(self.initial.size)

    def add_linear(
        self, a: Sequence[float] | Floats, upper: float | Sequence[float], *, equal: bool = False
    ) -> None:
        """Require A θ ≤ upper (or = upper), exactly, of every design that is simulated or returned.

        Args:
            a: (F,) one row, or (R, F); 0 for the columns of a choice.
            upper: a number or (R,).
            equal: make it an equality.

        Raises:
            ValueError: a row has another length than F, or depends on a choice.
            InfeasibleDesign: no design within the bounds satisfies all linear constraints.
        """
        rows = np.atleast_2d(np.asarray(a, dtype=np.float64))
        limits = np.broadcast_to(np.asarray(upper, dtype=np.float64), rows.shape[:1])
        if rows.shape[1] != self.dim or not np.isfinite(rows).all():
            raise ValueError(f"a row of a must have {self.dim} finite numbers, got {rows.shape}")
        if (touched := self.discrete & (rows != 0).any(0)).any():
            name = self.names[int(touched.argmax())]
            raise ValueError(
                f"a linear constraint cannot depend on a choice, a is not 0 for {name!r}"
            )
        before = list(self.linear)
        self.linear += [(row, float(b), equal) for row, b in zip(rows, limits, strict=True)]
        try:
            self.project(self.initial)
        except InfeasibleDesign:
            self.linear = before
            raise

    def add_constraint(self, function: Callable[[Tensor], Tensor], upper: float) -> None:
        """Require g(θ) ≤ upper of the nominal designs, by an augmented Lagrangian.

        Args:
            function: differentiable, (B, F) to (B,); weights in the columns of a choice.
            upper: the violation that counts is relative to the size of upper.
        """
        soft = Soft(function, float(upper))
        soft.violation(torch.from_numpy(self.initial)[None])
        self.soft.append(soft)

    def check_initial(self) -> None:
        """Raise `InfeasibleDesign` if the start breaks a constraint by more than 1e-3."""
        worst = self.violation(self.concrete(self.initial))
        if worst > 1e-3:
            raise InfeasibleDesign(
                f"the initial design breaks a constraint by {worst:.3g} of its limit; start from "
                f"{np.array2string(self.restore(self.initial), precision=6)}, for instance"
            )

    def project(self, theta: Floats) -> Floats:
        """Return the nearest designs within bounds and linear constraints (Euclidean).

        Args:
            theta: (F,) or (B, F).
        """
        theta = np.asarray(theta, dtype=np.float64)
        if theta.ndim == 2:
            return np.stack([self.project(row) for row in theta])
        return nearest(theta, self.lower, self.upper, self.linear)

    def concrete(self, theta: Floats) -> Floats:
        """Return designs (F,) or (B, F) with 1 for the option of the largest weight and 0 for the others.

        Example:
            >>> space = DesignSpace({"m": Choice(["Pb", "Fe"]), "a": Parameter(3, 0, 9)})
            >>> space.concrete(np.array([0.4, 0.6, 3.2]))
            array([0. , 1. , 3.2])
        """
        if not self.blocks:
            return theta
        out = np.array(theta, dtype=np.float64)
        for block in self.blocks:
            out[..., block] = np.eye(len(block))[out[..., block].argmax(-1)]
        return out

    def sigma_limits(self, smallest: float, largest: float) -> tuple[Floats, Floats]:
        """Return the least and the largest (F,) standard deviation of a region.

        Args:
            smallest: relative to sigma.
            largest: relative to sigma; never above half of the range. A choice keeps its own.
        """
        low = self.sigma * smallest
        high = np.maximum(np.minimum(self.sigma * largest, (self.upper - self.lower) / 2), low)
        keep = self.discrete
        return np.where(keep, self.sigma, low), np.where(keep, self.sigma, high)

    def restore(self, theta: Floats) -> Floats:
        """Return a near design that satisfies the soft constraints, too."""
        if not self.soft or self.violation(theta) <= 1e-9:
            return self.project(theta)
        soft = [(lambda t, s=s: s.violation(t)) for s in self.soft]
        return nearest_soft(self.project(theta), self.lower, self.upper, self.linear, soft)

    def violation(self, theta: Floats) -> float:
        """Return the largest relative violation of any constraint at (F,), 0 if all hold."""
        theta = np.asarray(theta, dtype=np.float64)
        worst = [0.0]
        width = self.upper - self.lower
        worst += [*((self.lower - theta) / width), *((theta - self.upper) / width)]
        for row, limit, equal in self.linear:
            excess = (float(row @ theta) - limit) / (abs(limit) or 1.0)
            worst.append(abs(excess) if equal else excess)
        with torch.no_grad():
            worst += [float(s.violation(torch.from_numpy(theta)[None])[0]) for s in self.soft]
        return max(worst)

    def to_unit(self, theta: Floats) -> Floats:
        """Map the box to [0, 1]^F.

        Example:
            >>> DesignSpace(initial=[5.0], lower=0, upper=10).to_unit(np.array([5.0]))
            array([0.5])
        """
        return np.asarray((theta - self.lower) / (self.upper - self.lower))

    def from_unit(self, unit: Floats) -> Floats:
        """Map [0, 1]^F to the box."""
        return np.asarray(self.lower + unit * (self.upper - self.lower))

    def sample(self, n: int, generator: np.random.Generator | int = 0) -> Floats:
        """Return n designs, uniform in the box and projected onto the linear constraints; options one-hot.

        Args:
            n: how many.
            generator: of NumPy, or a seed.
        """
        rng = np.random.default_rng(generator)
        return self.concrete(self.project(self.from_unit(rng.random((n, self.dim)))))

    def as_dict(self, theta: Floats) -> dict[str, float | str]:
        """Return name → value, for a `Choice` the option."""
        return named(self.names, theta, self.choices)

    def config(self) -> dict[str, Any]:
        """Return what defines the space, as JSON can hold it; soft constraints by their number."""
        return {
            "names": self.names,
            "initial": self.initial.tolist(),
            "lower": self.lower.tolist(),
            "upper": self.upper.tolist(),
            "sigma": self.sigma.tolist(),
            "linear": [[row.tolist(), limit, equal] for row, limit, equal in self.linear],
            "soft": [soft.upper for soft in self.soft],
        }


def box_penalty(theta: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Return the smooth penalty of the authors: mean relu(lower − θ)² + relu(θ − upper)².

    Args:
        theta: (..., F).
        lower: (F,).
        upper: (F,).

    Example:
        >>> box_penalty(torch.tensor([2.0, 0.5]), torch.zeros(2), torch.ones(2)).item()
        0.5
    """
    out = torch.relu(lower - theta).square() + torch.relu(theta - upper).square()
    return out.mean(-1)
