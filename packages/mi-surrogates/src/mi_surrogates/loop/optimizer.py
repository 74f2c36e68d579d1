"""Ask for designs, tell their events, step: the loop without a simulator, an executor or a disk."""

from __future__ import annotations

import math
import operator
import time
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mi_surrogates.design.space import DesignSpace
from mi_surrogates.design.surrogate import make_surrogate
from mi_surrogates.design.trust import Region, Step, ascend, rescaled, stretched
from mi_surrogates.errors import SimulationError, SurrogateError
from mi_surrogates.information.estimate import as_events
from mi_surrogates.loop import state
from mi_surrogates.loop.checks import (
    check_counts,
    check_positive,
    count_designs,
    is_level,
    trend_probability,
)
from mi_surrogates.loop.execute import Trial, make_trials, seed_of
from mi_surrogates.loop.history import History, Iteration, OptimizeResult
from mi_surrogates.loop.neighbours import Neighbours, Point, neighbours
from mi_surrogates.loop.objectives import (
    Batch,
    MIObjective,
    Objective,
    RecoObjective,
    make_objective,
)

Floats = NDArray[np.float64]
ADAPT = ("trust", "stretch", "none")


class Optimizer:
    """The five-step loop, for users who own the simulation.

    Args:
        space: the designs.
        objective: "mi", "reco" or an `Objective`.
        surrogate: "ensemble", "mlp", "quadratic", "gp", or an instance, of which copies are fitted.
        designs: M, simulated in each iteration, the nominal one included; "auto" is max(8, F + 4), which
            moves more often for the same events.
        events: N for each design.
        block: events in one call of the simulator; all by default.
        kappa: the designs are drawn from Normal(θ, κ Σ).
        warm_start: carry the networks from one iteration to the next.
        reuse: iterations whose designs are used again where they are near; 0 for none.
        adapt: "trust" (accept and reject steps, Σ · 2 or / 4, and / 2 where the top is inside), "stretch"
            (AIDO), "none" (the authors).
        trust_radius: r; a step stays within Mahalanobis distance r.
        beta: the step climbs mean − β std of the surrogate.
        lr: of the step, in z units.
        epochs: of the step.
        sigma_min: smallest Σ^{1/2}, relative to the space's sigma.
        sigma_max: the largest; never above half of a parameter's range.
        crn: the same event seeds for all designs of an iteration.
        patience: iterations without a better lower confidence bound before the loop is done, or None.
        seed: of everything.
        device: of the networks of a named objective.
        dtype: of these.

    Attributes:
        history: the iterations.
        status: "" while the loop is not done, then "patience", "floor" or "flat".

    Example:
        >>> from mi_surrogates.loop.objectives import CallableObjective
        >>> space = DesignSpace(initial=[0.2], lower=0.0, upper=1.0, sigma=0.1)
        >>> objective = CallableObjective(lambda theta, x, y: -float((theta[0] - 0.7) ** 2))
        >>> opt = Optimizer(space, objective, surrogate="quadratic", designs=8, events=1)
        >>> for _ in range(8):
        ...     for trial in opt.ask():
        ...         opt.tell(trial, np.zeros(1), np.zeros(1))
        ...     iteration = opt.step()
        >>> bool(abs(opt.theta[0] - 0.7) < 0.03)
        True
    """

    def __init__(
        self,
        space: DesignSpace,
        objective: str | Objective = "mi",
        *,
        surrogate: str | nn.Module = "ensemble",
        designs: int | str = 20,
        events: int = 400,
        block: int | None = None,
        kappa: float = 1.0,
        warm_start: bool = True,
        reuse: int = 4,
        adapt: str = "trust",
        trust_radius: float = 1.2,
        beta: float = 0.5,
        lr: float = 0.1,
        epochs: int = 60,
        sigma_min: float = 0.02,
        sigma_max: float = 10.0,
        crn: bool = True,
        patience: int | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if adapt not in ADAPT:
            raise ValueError(f"adapt must be one of {', '.join(ADAPT)}, got {adapt!r}")
        designs = count_designs(designs, surrogate, space.dim)
        check_counts(
            designs=(designs, 2),
            events=(events, 1),
            epochs=(epochs, 1),
            reuse=(reuse, 0),
            patience=(1 if patience is None else patience, 1),
            seed=(seed, 0),
            block=(events if block is None else block, 1),
        )
        check_positive(kappa=kappa, lr=lr, trust_radius=trust_radius, sigma_min=sigma_min)
        if sigma_min > sigma_max:
            raise ValueError(f"sigma_min must be at most sigma_max, got {sigma_min}, {sigma_max}")
        space.check_initial()
        self.space = space
        self.objective = make_objective(objective, device, dtype)
        if isinstance(self.objective, (MIObjective, RecoObjective)):
            self.objective.check_events(events)
        self.designs, self.events = designs, events
        self.block, self.kappa = block or events, kappa
        self.warm_start, self.reuse, self.adapt = warm_start, reuse, adapt
        self.beta, self.lr, self.epochs = beta, lr, epochs
        self.crn, self.patience, self.seed = crn, patience, seed
        self.smallest, self.largest = space.sigma_limits(sigma_min, sigma_max)
        self.settled = np.maximum(0.1 * space.sigma, 1.1 * self.smallest)  # never ends the run
        self._surrogate = surrogate  # a name, or what new ones are copies of
        self.surrogate = self.new_surrogate()
        self.region = Region(space.project(space.initial), np.diag(space.sigma**2), trust_radius)
        self.history = History(names=space.names)
        self.status = ""
        self.multipliers = torch.zeros(len(space.soft), dtype=torch.float64)
        self.penalty = 10.0
        self.total_events = 0
        self._points: list[Point] = []
        self._last: Step | None = None  # the step that led to the present center
        self._previous: tuple[Floats, Floats] | None = None  # center and Σ before it
        self._accepted: tuple[Floats, float, float] | None = None
        self._best, self._since_best, self._flat, self._moved = -math.inf, 0, 0, False
        self._begin()

    def new_surrogate(self, generator: torch.Generator | None = None) -> nn.Module:
        """Return a surrogate as at the start of the run."""
        return make_surrogate(
            self._surrogate, self.space.dim, warm_start=self.warm_start, generator=generator
        )

    @property
    def iteration(self) -> int:
        """Index of the present iteration."""
        return len(self.history)

    @property
    def theta(self) -> Floats:
        """(F,) the present nominal design."""
        return self.space.concrete(self.region.center)

    def _rng(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.iteration, 2**32 - 1, purpose])

    def _begin(self) -> None:
        """Draw the designs of an iteration."""
        drawn = self.region.sample(self.designs, self._rng(0), self.kappa)
        drawn[0] = self.region.center
        if self.adapt == "trust" and self._last is not None and self._previous is not None:
            drawn[1] = self._previous[0]  # simulated again, to judge the step
        self._trials = make_trials(
            self.space.concrete(self.space.project(drawn)),
            self.iteration,
            self.seed,
            events=self.events,
            block=self.block,
            common=self.crn,
        )
        self._told: dict[int, tuple[Tensor, Tensor]] = {}
        self._failed: dict[int, str] = {}

    def ask(self) -> list[Trial]:
        """Return the trials of this iteration that were neither told nor failed."""
        return [
            t for t in self._trials if t.design not in self._told and t.design not in self._failed
        ]

    def _find(self, trial: Trial | int) -> Trial:
        design = trial.design if isinstance(trial, Trial) else operator.index(trial)
        if not 0 <= design < len(self._trials) or (
            isinstance(trial, Trial) and trial.iteration != self.iteration
        ):
            raise ValueError(f"no trial {trial} in iteration {self.iteration}")
        if design in self._told or design in self._failed:
            raise ValueError(f"trial {design} was told before")
        return self._trials[design]

    def tell(self, trial: Trial | int, x: Any, y: Any) -> None:
        """Hand in the events x (N, dx), y (N, dy[, ...]) of a trial, or of its index.

        Raises:
            ValueError: not a trial of this iteration, a wrong number of events, or values that are not
                finite.
        """
        found = self._find(trial)
        tx, ty = as_events(x, "x"), as_events(y, "y")
        for name, values in (("x", tx), ("y", ty)):
            if values.shape[0] != found.events:
                raise ValueError(
                    f"{name} of trial {found.design} must have {found.events} events, "
                    f"got {values.shape[0]}"
                )
        for x0, y0 in self._told.values():
            if x0.shape != tx.shape or y0.shape != ty.shape:
                raise ValueError(
                    f"trial {found.design} has x {tuple(tx.shape)} and y {tuple(ty.shape)}, others "
                    f"have {tuple(x0.shape)} and {tuple(y0.shape)}"
                )
            break
        self._told[found.design] = (tx, ty)

    def fail(self, trial: Trial | int, reason: str) -> None:
        """Say that a trial has no result; the iteration goes on without it."""
        self._failed[self._find(trial).design] = str(reason)

    @property
    def needed(self) -> int:
        """How many designs must succeed: max(F + 2, M/2), and no more than M."""
        return min(self.designs, max(self.space.dim + 2, -(-self.designs // 2)))

    def step(self) -> Iteration:
        """Evaluate the objective, fit the surrogate and move; the next `ask` is of the next iteration.

        Raises:
            RuntimeError: trials are pending.
            SimulationError: too few designs succeeded.
            DegenerateData: the events carry no signal.
            SurrogateError: the surrogate's step was not finite twice.
        """
        if pending := self.ask():
            raise RuntimeError(f"{len(pending)} trials are pending: tell or fail them first")
        start = time.perf_counter()
        self.total_events += sum(self._trials[i].events for i in self._told)
        self._demand(len(self._told))
        order = sorted(self._told)
        batch = Batch(
            np.stack([self._trials[i].theta for i in order]),
            torch.stack([self._told[i][0] for i in order]),
            torch.stack([self._told[i][1] for i in order]),
            self.region.center,
            self.region.sigma,
            seed_of(self.seed, self.iteration, 2**32 - 1, 1),
            self.warm_start and self.iteration > 0,  # the objective may have served another run
        )
        value, stderr = self.objective.evaluate(batch)
        if value.shape != (len(order),) or stderr.shape != (len(order),):
            raise ValueError(
                f"an objective must return two tensors of shape ({len(order)},), got "
                f"{tuple(value.shape)} and {tuple(stderr.shape)}"
            )
        values: dict[int, tuple[float, float]] = {}
        for design, v, s in zip(order, value.tolist(), stderr.tolist(), strict=True):
            if math.isfinite(v) and math.isfinite(s):
                values[design] = (v, s)
            else:
                self._failed[design] = "the objective is not finite"
        self._demand(len(values))
        self._points += [(self._trials[i].theta, *values[i], self.iteration) for i in values]
        self._check_flat(values)

        nominal = self.theta
        accepted, ratio = self._judge(values)
        self._update_multipliers(nominal)
        near = self._neighbours()
        step = self._move(near)
        record = Iteration(
            self.iteration,
            nominal.tolist(),
            *values.get(0, (math.nan, math.nan)),
            accepted,
            ratio,
            self.space.concrete(step.theta).tolist(),
            step.gain,
            self.region.sigma.tolist(),
            step.at_boundary,
            len(values),
            {str(k): v for k, v in sorted(self._failed.items())},
            self.total_events,
            self.space.violation(nominal),
            time.perf_counter() - start,
        )
        self._advance(record, step, clear=near.signal > near.noise)
        return record

    def _demand(self, succeeded: int) -> None:
        if succeeded < self.needed:
            first = next(iter(sorted(self._failed.items())), (None, "no result"))
            raise SimulationError(
                first[0],
                None,
                f"only {succeeded} of {self.designs} designs succeeded and {self.needed} are needed; "
                f"the first failure was: {first[1]}",
            )

    def _check_flat(self, values: dict[int, tuple[float, float]]) -> None:
        """Count iterations in which all values agree within their errors."""
        z = self.region.to_z(np.stack([self._trials[i].theta for i in values]))
        level = is_level(z, *np.array(list(values.values())).T)
        self._flat = self._flat + 1 if level else 0
        self._moved = self._moved or not level
        if self._flat != 3 or self._moved:  # a plateau at the top comes after a slope
            return
        recent = [p for p in self._points if p[3] > self.iteration - 3]
        theta, value, _, when = (np.array(column) for column in zip(*recent, strict=True))
        if trend_probability(self.region.to_z(theta), value, when) < 0.01:
            self._moved = True  # together they show a trend that each was too small to show
            return
        self.status = "flat"
        warnings.warn(
            "the objective was the same for all designs, within its errors, in three iterations: "
            "the simulator may ignore theta, or needs more events or a larger sigma",
            stacklevel=3,
        )

    def _judge(self, values: dict[int, tuple[float, float]]) -> tuple[bool, float | None]:
        """Accept or reject the step that led to the present center, and adapt Σ."""
        ratio, accepted = None, True
        if self.adapt == "trust" and self._last is not None and self._previous is not None:
            if 0 in values and 1 in values:
                (now, e0), (before, e1) = values[0], values[1]
                rise, error = now - before, math.hypot(e0, e1)
                if (noise := self._neighbours().noise) > 0:  # less where events are common
                    error = min(error, math.sqrt(2) * noise)
                ratio = rise / max(self._last.gain, 1e-12)
                if rise < -2 * error or (error == 0 and rise < 0):
                    accepted = False
                elif ratio > 0.75 and self._last.at_boundary:
                    self._scale(2.0)
            elif 0 not in values:
                accepted = False  # the new nominal design could not be simulated
        if not accepted and self._previous is not None:
            center, cov = self._previous
            small = rescaled(cov, 0.25, self.smallest, self.largest)
            self.region = Region(center, small, self.region.radius)
        index = 0 if accepted else 1
        if index in values:
            self._accepted = (self.theta, *values[index])
        if index in values and values[index][0] - 2 * values[index][1] > self._best:
            self._best, self._since_best = values[index][0] - 2 * values[index][1], 0
        else:
            self._since_best += 1
        return accepted, ratio

    def _scale(self, factor: float) -> None:
        cov = rescaled(self.region.cov, factor, self.smallest, self.largest)
        self.region = Region(self.region.center, cov, self.region.radius)

    def _update_multipliers(self, nominal: Floats) -> None:
        """λ ← max(0, λ + μ g) at the nominal design."""
        if not self.space.soft:
            return
        with torch.no_grad():
            point = torch.from_numpy(nominal)[None]
            excess = torch.stack([soft.violation(point)[0] for soft in self.space.soft])
        self.multipliers = torch.relu(self.multipliers + self.penalty * excess)
        if bool((excess > 1e-3).any()):
            self.penalty *= 2

    def _neighbours(self) -> Neighbours:
        return neighbours(self._points, self.region, self.iteration, self.reuse)

    def _move(self, near: Neighbours) -> Step:
        """Fit the surrogate and climb it; refit once with another seed if the step is not finite."""
        for attempt in range(2):
            generator = torch.Generator().manual_seed(
                seed_of(self.seed, self.iteration, 2**32 - 1, 2 + attempt)
            )
            if attempt or not self.warm_start or self.iteration == 0:
                self.surrogate = self.new_surrogate(generator)
            self.surrogate.generator = generator  # type: ignore[assignment]
            near.fit(self.surrogate)
            try:
                return ascend(
                    self.surrogate,
                    self.region,
                    self.space,
                    beta=self.beta,
                    lr=self.lr,
                    epochs=self.epochs,
                    multipliers=self.multipliers,
                    penalty=self.penalty,
                )
            except FloatingPointError:
                continue
        raise SurrogateError(
            f"the {type(self.surrogate).__name__} has no finite gradient at the nominal design"
        )

    def _advance(self, record: Iteration, step: Step, *, clear: bool) -> None:
        """Make the step's end the next center; `clear` is whether the values rise above their noise."""
        moved = step.length > 1e-9
        self._previous = (self.region.center, self.region.cov)
        self._last = step if moved else None
        cov = self.region.cov
        if self.adapt == "stretch":
            cov = stretched(self.space.sigma, step.theta - self.region.center)
        elif self.adapt == "trust" and not moved and not step.at_boundary:
            cov = rescaled(cov, 0.25, self.smallest, self.largest)
        elif self.adapt == "trust" and clear and step.length < self.region.radius / 2:
            # the top is inside: a smaller region has less that the surrogate cannot follow
            least = np.minimum(self.settled, self.region.sigma)
            cov = rescaled(cov, 0.5, least, self.largest)
        free = ~self.space.discrete
        small = (np.sqrt(np.diag(cov)) <= self.smallest * (1 + 1e-9))[free]
        floor = bool(free.any() and small.all())
        self.region = Region(step.theta, cov, self.region.radius)
        self.history.append(record)
        if not self.status and floor and self.adapt == "trust":
            self.status = "floor"
        if not self.status and self.patience is not None and self._since_best >= self.patience:
            self.status = "patience"
        self._begin()

    def result(self, status: str = "", seconds: float = math.nan) -> OptimizeResult:
        """Return where the loop is.

        Raises:
            RuntimeError: no iteration is finished.
        """
        return state.result(self, status, seconds)

    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors, numbers and strings, events told so far included."""
        return state.dump(self)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on where the other optimizer, made with the same arguments, was."""
        state.load(self, saved)
