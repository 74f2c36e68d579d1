"""`optimize`: the loop with a simulator, an executor and a folder."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

import torch
from torch import nn

from mi_surrogates.design.space import DesignSpace
from mi_surrogates.errors import CheckpointMismatch, SimulationError
from mi_surrogates.loop.describe import describe
from mi_surrogates.loop.execute import Floats, Simulator, Trial, check_picklable, run_trials
from mi_surrogates.loop.history import Iteration, OptimizeResult, valid_json
from mi_surrogates.loop.objectives import Objective
from mi_surrogates.loop.optimizer import Optimizer
from mi_surrogates.loop.store import Store


class Progress:
    """One line on stderr: iterations, events, the value and the best one with their errors, the time left."""

    def __init__(self, total: int, *, enabled: bool) -> None:
        self.total, self.enabled, self.start = total, enabled, time.monotonic()
        self.best: Iteration | None = None
        self.first: int | None = None

    def __call__(self, record: Iteration) -> None:
        """Show an iteration."""
        if self.best is None or record.value > self.best.value:
            self.best = record
        if not self.enabled:
            return
        self.first = record.index if self.first is None else self.first
        each = (time.monotonic() - self.start) / (record.index - self.first + 1)
        left = each * (self.total - record.index - 1)
        line = (
            f"iteration {record.index + 1}/{self.total}  events {record.events}  "
            f"value {record.value:.4g} ± {record.stderr:.2g}  "
            f"best {self.best.value:.4g} ± {self.best.stderr:.2g}  left {left:.0f} s"
        )
        print(
            line.ljust(90), end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True
        )

    def close(self) -> None:
        """End the line."""
        if self.enabled and sys.stderr.isatty():
            print(file=sys.stderr)


def optimize(
    simulator: Simulator,
    space: DesignSpace,
    objective: str | Objective = "mi",
    *,
    surrogate: str | nn.Module = "ensemble",
    designs: int | str = 20,
    events: int = 400,
    iterations: int = 30,
    max_events: int | None = None,
    max_seconds: float | None = None,
    warm_start: bool = True,
    reuse: int = 4,
    adapt: str = "trust",
    executor: Executor | None = None,
    timeout: float | None = None,
    retries: int = 2,
    in_flight: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: str | bool = "auto",
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    callbacks: Sequence[Callable[[Iteration], Any]] = (),
    progress: bool = True,
    **options: Any,
) -> OptimizeResult:
    """Find the design that maximises the objective.

    The result does not depend on the executor or the number of workers: seeds belong to the place in the
    run, and results are used in the order of the designs.

    Args:
        simulator: `(theta (F,), n, seed) -> (x (n, dx), y (n, dy[, ...]))`, or a mapping with "x", "y".
        space: parameters and constraints.
        objective: "mi" (information, in nats), "reco" (−log of a reconstruction's loss) or an `Objective`.
        surrogate: "ensemble", "mlp", "quadratic", "gp" (extra `botorch`), or an instance of such a class.
        designs: M, in an iteration; "auto" is max(8, F + 4), for few parameters and a small budget.
        events: N, for each design.
        iterations: at most.
        max_events: stop before an iteration that would exceed it.
        max_seconds: stop after the iteration that exceeds it; the result then depends on the machine.
        warm_start: carry networks from iteration to iteration (the paper's transfer learning).
        reuse: earlier iterations whose designs help the surrogate where they are near.
        adapt: "trust", "stretch" or "none".
        executor: any `concurrent.futures.Executor`; None simulates here.
        timeout: seconds for one call of the simulator on an executor.
        retries: of a failed call, with the same seed.
        in_flight: calls submitted at once; twice the workers by default.
        checkpoint: a folder for events, state and history.
        resume: "auto" goes on if the folder holds a run; True demands one; False refuses one.
        seed: of everything.
        device: of the networks.
        dtype: of the networks.
        callbacks: called with every `Iteration`; one that returns True ends the run ("callback").
        progress: show a line on stderr.
        **options: further arguments of `Optimizer`.

    Returns:
        The result; `theta` is the last nominal design that was simulated and not rejected.

    Raises:
        InfeasibleDesign, SimulationError, DegenerateData, CheckpointMismatch, CheckpointLocked,
        SurrogateError: see there.
        TypeError: the simulator cannot be sent to the executor's processes.

    Example:
        >>> import numpy as np
        >>> def noisy(theta, n, seed):
        ...     rng = np.random.default_rng(seed)
        ...     x = rng.normal(size=n)
        ...     return x, x + (0.1 + (theta[0] - 0.7) ** 2) * rng.normal(size=n)
        >>> space = DesignSpace(initial=[0.1], lower=0.0, upper=1.0, sigma=0.15)
        >>> from mi_surrogates.loop.objectives import MIObjective
        >>> result = optimize(noisy, space, MIObjective("gaussian"), surrogate="quadratic", designs=8,
        ...                   iterations=8, progress=False)
        >>> bool(abs(result.theta[0] - 0.7) < 0.1)
        True
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if resume not in ("auto", True, False):
        raise ValueError(f"resume must be 'auto', True or False, got {resume!r}")
    check_picklable(simulator, executor)
    optimizer = Optimizer(
        space,
        objective,
        surrogate=surrogate,
        designs=designs,
        events=events,
        warm_start=warm_start,
        reuse=reuse,
        adapt=adapt,
        seed=seed,
        device=device,
        dtype=dtype,
        **options,
    )
    if max_events is not None and max_events < optimizer.designs * events:
        raise ValueError(
            f"max_events {max_events} is below one iteration of {optimizer.designs} designs x {events} events"
        )
    config = {
        "simulator": describe(simulator),
        "space": space.config(),
        "objective": describe(objective),
        "surrogate": describe(surrogate),
        "designs": optimizer.designs,
        "events": events,
        "warm_start": warm_start,
        "reuse": reuse,
        "adapt": adapt,
        "seed": seed,
        "dtype": str(dtype),
        "options": describe(options),
    }
    store = None if checkpoint is None else Store(checkpoint, config)
    start = time.monotonic()
    bar = Progress(iterations, enabled=progress)
    try:
        if store is not None:
            _resume(optimizer, store, resume)
        status = _loop(
            simulator,
            optimizer,
            store,
            iterations=iterations,
            max_events=max_events,
            deadline=None if max_seconds is None else start + max_seconds,
            hooks=[bar, *callbacks],
            executor=executor,
            timeout=timeout,
            retries=retries,
            in_flight=in_flight,
        )
    finally:
        bar.close()
        if store is not None:
            store.close()
    return optimizer.result(status, time.monotonic() - start)


def _resume(optimizer: Optimizer, store: Store, resume: str | bool) -> None:
    state = store.load_state()
    if state is None and resume is True:
        raise CheckpointMismatch(f"{store.path} holds no run to resume")
    if state is not None and resume is False:
        raise CheckpointMismatch(
            f"{store.path} holds a run already; give another folder, or resume='auto'"
        )
    if state is not None:
        optimizer.load_state_dict(state)


def _loop(
    simulator: Simulator,
    optimizer: Optimizer,
    store: Store | None,
    *,
    iterations: int,
    max_events: int | None,
    deadline: float | None,
    hooks: Sequence[Callable[[Iteration], Any]],
    **running: Any,
) -> str:
    """Run iterations until something ends the loop; return what it was."""
    while not optimizer.status:
        if optimizer.iteration >= iterations:
            return "iterations"
        if max_events is not None:
            next_events = optimizer.total_events + optimizer.designs * optimizer.events
            if next_events > max_events:
                return "events"
        if deadline is not None and optimizer.iteration and time.monotonic() > deadline:
            return "seconds"
        _simulate(simulator, optimizer, store, **running)
        record = optimizer.step()
        if store is not None:
            store.save_state(
                optimizer.state_dict(), [valid_json(each.as_dict()) for each in optimizer.history]
            )
        answers = [hook(record) for hook in hooks]
        if any(answer is True for answer in answers):
            return "callback"
    return optimizer.status


def _simulate(
    simulator: Simulator, optimizer: Optimizer, store: Store | None, **running: Any
) -> None:
    """Get the events of all trials, from the folder or the simulator."""
    for trial in optimizer.ask() if store is not None else ():
        assert store is not None
        found = store.load_events(trial.iteration, trial.design)
        reason = store.load_failure(trial.iteration, trial.design)
        if found is not None:
            optimizer.tell(trial, *found)
        elif reason is not None:
            optimizer.fail(trial, reason)

    def arrived(trial: Trial, x: Floats, y: Floats) -> None:
        optimizer.tell(trial, x, y)
        if store is not None:
            store.save_events(trial.iteration, trial.design, x, y)

    def failed(trial: Trial, error: SimulationError) -> None:
        optimizer.fail(trial, str(error))
        if store is not None:
            store.save_failure(trial.iteration, trial.design, str(error))

    run_trials(simulator, optimizer.ask(), arrived, failed, **running)
