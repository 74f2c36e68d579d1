"""Discrete options: a point of the simplex in the loop, one-hot wherever a design is simulated."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from mi_surrogates.design.space import DesignSpace
    from mi_surrogates.design.trust import Region

Floats = NDArray[np.float64]
SIGMA = 0.5  # of an option's weight, all through a run: every option keeps being drawn
COMBINATIONS = 1000  # of the options of all choices; the step averages over them


@dataclass(frozen=True)
class Choice:
    """One of several options, such as a material: C columns of a design, one of which is 1.

    Args:
        options: at least two different strings.
        initial: the first nominal one; without it all start alike, and the first of them is nominal.

    Raises:
        ValueError: from `DesignSpace`, which knows the name: fewer than two options, options that are
            not strings or not different, an unknown initial one.

    Example:
        >>> Choice(["Pb", "Fe", "W"], initial="Fe").start("absorber").round(3).tolist()
        [0.167, 0.667, 0.167]
    """

    options: Sequence[str]
    initial: str | None = None

    def start(self, name: str) -> Floats:
        """Return the weights (C,) a run begins with; `name` is for errors."""
        options = self.options
        listed = not isinstance(options, str) and hasattr(options, "__iter__")
        if not listed or not all(isinstance(each, str) for each in options):
            raise ValueError(
                f"parameter {name!r}: options must be a list of strings, got {options!r}"
            )
        if len(options) < 2 or len(set(options)) < len(options):
            raise ValueError(
                f"parameter {name!r}: options must be two or more different ones, got {list(options)}"
            )
        weights = np.full(len(options), 1 / len(options))
        if self.initial is None:
            return weights
        if self.initial not in options:
            raise ValueError(
                f"parameter {name!r}: initial must be one of {list(options)}, got {self.initial!r}"
            )
        weights /= 2
        weights[list(options).index(self.initial)] += 0.5
        return weights


def named(
    names: Sequence[str], theta: Floats, choices: Mapping[str, Sequence[str]]
) -> dict[str, float | str]:
    """Return name → value, or → the option of the largest weight.

    Args:
        names: (F,) of the columns; those of a choice are "name=option".
        theta: (F,).
        choices: name → options.

    Example:
        >>> named(["m=Pb", "m=Fe", "a"], np.array([0.0, 1.0, 3.2]), {"m": ["Pb", "Fe"]})
        {'m': 'Fe', 'a': 3.2}
    """
    values = {column: float(value) for column, value in zip(names, theta, strict=True)}
    owner = {f"{name}={option}": name for name, options in choices.items() for option in options}
    out: dict[str, float | str] = {}
    for column, value in values.items():
        name = owner.get(column)
        if name is None:
            out[column] = value
        elif name not in out:
            out[name] = max(choices[name], key=lambda option: values[f"{name}={option}"])
    return out


class Relaxed(nn.Module):
    """A surrogate of one-hot designs as a function of the options' weights p: Σ_o p_o s(one-hot of o).

    The expectation over options that are drawn independently with the weights of their choices. The
    surrogate is only asked where it has data, and the highest mean is that of a single combination.

    Args:
        surrogate: of z.
        region: z = Σ^{-1/2}(θ − center).
        space: with at least one choice.
    """

    def __init__(self, surrogate: nn.Module, region: Region, space: DesignSpace) -> None:
        super().__init__()
        self.surrogate, self.blocks = surrogate, space.blocks
        self.spread = getattr(surrogate, "spread", torch.tensor(1.0))
        self.center, self.root = torch.from_numpy(region.center), torch.from_numpy(region.root)
        self.inverse = torch.from_numpy(region.inverse)
        self.discrete = torch.from_numpy(space.discrete)
        self.picks = torch.tensor(list(itertools.product(*self.blocks)))  # (K, choices) columns
        self.corners = torch.zeros(len(self.picks), space.dim).scatter(1, self.picks, 1.0)

    def _ask(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return θ (P, F), and mean and standard deviation (P, K) with each combination of options."""
        center, root, inverse, corners = (
            each.to(z.dtype) for each in (self.center, self.root, self.inverse, self.corners)
        )
        theta = center + z @ root.T
        designs = torch.where(self.discrete, corners, theta[:, None])  # (P, K, F)
        mean, std = self.surrogate(((designs - center) @ inverse.T).flatten(0, 1))
        return theta, mean.view(len(z), -1), std.view(len(z), -1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation (P,) of the surrogate, averaged over options, at z (P, F)."""
        theta, mean, std = self._ask(z)
        share = torch.zeros_like(theta)
        for block in self.blocks:
            share[:, block] = theta[:, block] / theta[:, block].sum(1, keepdim=True)
        weight = share[:, self.picks].prod(2)  # (P, K)
        return (weight * mean).sum(1), (weight * std).sum(1)

    @torch.no_grad()
    def best(self, z: Tensor, beta: float) -> Floats:
        """Return the options (F,) with the highest mean − beta std at z (1, F), 0 for parameters."""
        _, mean, std = self._ask(z)
        return np.asarray(self.corners[int((mean - beta * std)[0].argmax())].double().numpy())
