"""Choosing coefficients on validation data: a grid, and a live model that changes scale in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from .depth import DepthMap
from .errors import KeyMismatchError, ShapeMismatchError
from .families import strip_wrappers
from .schedule import Outside, check_finite, scales
from .sources import StateDict

Point = TypeVar("Point")
Model = TypeVar("Model")
Scores = TypeVar("Scores")

GAMMA_GRID = tuple(i / 10 for i in range(10, -1, -1))
"""The paper's grid for gamma, scanned downward so that ties keep the larger gamma."""
BETA_GRID = tuple(i / 10 for i in range(1, 11))
"""The paper's grid for beta (and for the baseline's constant) with task arithmetic and Consensus."""
TIES_GRID = tuple(i / 10 for i in range(1, 16))
"""The paper's grid for beta with TIES."""


@dataclass(frozen=True)
class TuneResult(Generic[Point]):
    """Result of `tune`.

    Attributes:
        best: the chosen grid point.
        objective: its objective.
        trace: (point, scores, objective) of every point, in order.
    """

    best: Point
    objective: float
    trace: list[tuple[Point, Any, float]]


def tune(
    build: Callable[[Point], Model],
    evaluate: Callable[[Model], Scores],
    grid: Iterable[Point],
    objective: Callable[[Scores], float] = float,  # type: ignore[assignment]
) -> TuneResult[Point]:
    """Evaluate every grid point and keep the best; the first of equal ones wins.

    Args:
        build: makes a model (or weights) for a grid point; `ScaledModel.set` fits.
        evaluate: returns a model's validation scores.
        grid: points, in the order of preference.
        objective: turns scores into the number to maximise; default: the score itself.

    Raises:
        ValueError: empty grid, or an objective that is NaN.

    Example:
        >>> tune(lambda x: x, lambda x: -(x - 0.3) ** 2, GAMMA_GRID).best
        0.3
    """
    trace: list[tuple[Point, Any, float]] = []
    best: tuple[Point, float] | None = None
    for point in grid:
        scores = evaluate(build(point))
        value = float(objective(scores))
        if math.isnan(value):
            raise ValueError(f"the objective is NaN at grid point {point!r}")
        trace.append((point, scores, value))
        if best is None or value > best[1]:
            best = (point, value)
    if best is None:
        raise ValueError("the grid is empty")
    return TuneResult(best[0], best[1], trace)


def forgetting_objective(
    target: float,
    target_finetuned: float,
    controls: Iterable[float],
    controls_zeroshot: Iterable[float],
    weight: float = 2.0,
) -> float:
    """Return `w * acc_target / acc_finetuned + mean(acc_control / acc_zeroshot)`, by which gamma is chosen.

    Args:
        target: accuracy of the edited model on its own task.
        target_finetuned: the fine-tuned model's.
        controls: accuracies of the edited model on control tasks.
        controls_zeroshot: the pre-trained model's.
        weight: w; the paper's experiments use 2.
    """
    ratios = [a / b for a, b in zip(controls, controls_zeroshot, strict=True)]
    return weight * target / target_finetuned + sum(ratios) / len(ratios)


class Tuner:
    """Writes theta_0 + (alpha + beta x) tau into live parameters, for one (alpha, beta) after another.

    The edited weights are affine in (alpha, beta), so base, task vector and depth x are kept once and a
    grid point costs one fused multiply-add over the parameters. The fused operation rounds once where
    `edit` rounds twice; the difference is one unit in the last place.

    Args:
        base: pre-trained weights (referenced, not copied).
        update: the task vector, e.g. a `TaskVector` or a merged one; read once.
        live: parameters to write into, by the names of `update`.
        depth: a `DepthMap`, "auto" or a family.
        schedule: see `scales`.
        outside: "alpha" or "depth"; a number or a function would not be affine.
        towers: see `scales`.

    Raises:
        KeyMismatchError: `base` or `live` lacks a name of `update`.
        ShapeMismatchError: a shape differs.
    """

    def __init__(
        self,
        base: StateDict,
        update: Mapping[str, Tensor],
        live: StateDict,
        *,
        depth: DepthMap | str = "auto",
        schedule: str = "linear",
        outside: Outside = "alpha",
        towers: str = "separate",
    ) -> None:
        if outside not in ("alpha", "depth"):
            raise ValueError(f"outside must be 'alpha' or 'depth' here, got {outside!r}")
        update = {name: update[name] for name in update}
        names = list(update)
        for label, state in (("the base", base), ("the model", live)):
            missing = [name for name in names if name not in state]
            if missing:
                raise KeyMismatchError(f"{label} lacks {missing[:10]}")
            for name in names:
                if state[name].shape != update[name].shape:
                    raise ShapeMismatchError(
                        f"{name!r} has shape {tuple(state[name].shape)} in {label} and "
                        f"{tuple(update[name].shape)} in the update"
                    )
        # factors are alpha + beta * x, and x is the factor at alpha = 0, beta = 1
        self._depth = scales(
            names,
            0.0,
            1.0,
            depth=depth,
            schedule=schedule,
            outside=outside,
            towers=towers,
            sizes={name: value.numel() for name, value in update.items()},
        )
        self._base = {name: base[name].detach() for name in names}
        self._update = update
        self._live: dict[str, Tensor] = {}
        self.bind(live)

    def bind(self, live: StateDict) -> None:
        """Write into these parameters from now on."""
        self._live = {name: live[name] for name in self._update}

    @torch.no_grad()
    def set(self, alpha: float, beta: float) -> None:
        """Write the weights of one grid point."""
        check_finite(alpha=alpha, beta=beta)
        for name, target in self._live.items():
            base, update = self._base[name], self._update[name]
            factor = alpha + beta * self._depth[name]
            if target.device == base.device == update.device:
                torch.add(base, update, alpha=factor, out=target.detach())
            else:
                target.copy_(base.to(update.device) + factor * update)
            if name.endswith("running_var"):
                target.detach().clamp_min_(0)


class ScaledModel:
    """A module whose LiNeS factors can be changed in place, as often as the grid asks.

    Args:
        model: module whose parameters are overwritten; it can be copied and pickled with this object.
        base: pre-trained weights, named as in the module (prefixes of wrappers aside).
        update: the task vector, by the same names.
        **arguments: see `Tuner`.

    Raises:
        KeyMismatchError: see `Tuner`.

    Example:
        >>> from lines_merge import TaskVector
        >>> model = nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))})
        >>> tuned = {name: value.clone() for name, value in model.state_dict().items()}
        >>> base = {name: torch.zeros_like(value) for name, value in tuned.items()}
        >>> depth = DepthMap.from_patterns("blocks.{i}.")
        >>> scaled = ScaledModel(model, base, TaskVector(base, tuned), depth=depth)
        >>> bool(scaled.set(alpha=0.0, beta=1.0)["blocks"][0].weight == 0)
        True
    """

    def __init__(
        self, model: nn.Module, base: StateDict, update: Mapping[str, Tensor], **arguments: Any
    ) -> None:
        self.model = model
        plain = {strip_wrappers(name): base[name] for name in base}
        vector = {strip_wrappers(name): update[name] for name in update}
        self._tuner = Tuner(plain, vector, self._live(), **arguments)

    def _live(self) -> dict[str, Tensor]:
        return {strip_wrappers(n): value for n, value in self.model.state_dict().items()}

    def set(self, alpha: float, beta: float) -> nn.Module:
        """Write theta_0 + (alpha + beta x) tau into the model and return it."""
        self._tuner.bind(self._live())  # a copy of this object has a module of its own
        self._tuner.set(alpha, beta)
        return self.model
