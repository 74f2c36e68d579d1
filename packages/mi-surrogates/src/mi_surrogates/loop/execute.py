"""Running trials on any `concurrent.futures.Executor`, with retries, timeouts and bounded queues."""

from __future__ import annotations

import os
import pickle
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mi_surrogates.errors import SimulationError

Floats = NDArray[np.floating[Any]]


class Simulator(Protocol):
    """Any picklable callable; a plain function is fine."""

    def __call__(self, theta: Any, n: int, seed: int) -> Any:
        """Return x (n, dx) and y (n, dy[, ...]), or a mapping with these two keys."""
        ...


@dataclass(frozen=True)
class Trial:
    """One design to be simulated.

    Attributes:
        iteration: of the loop.
        design: index in the iteration; its results are used in this order.
        theta: (F,) the design.
        blocks: (events, seed) of every call of the simulator.
    """

    iteration: int
    design: int
    theta: NDArray[np.float64]
    blocks: tuple[tuple[int, int], ...]

    @property
    def events(self) -> int:
        """Events of all blocks."""
        return sum(n for n, _ in self.blocks)


def seed_of(seed: int, *where: int) -> int:
    """Return the seed of a place in the run: the same on any executor, with any number of workers.

    Example:
        >>> seed_of(0, 1, 2, 3) == seed_of(0, 1, 2, 3) != seed_of(0, 1, 2, 4)
        True
    """
    return int(np.random.SeedSequence([seed, *where]).generate_state(1)[0])


def make_trials(
    thetas: NDArray[np.float64],
    iteration: int,
    seed: int,
    *,
    events: int,
    block: int,
    common: bool,
) -> list[Trial]:
    """Return the trials of an iteration, `events` each in calls of `block`.

    Args:
        thetas: (M, F) designs.
        iteration: of the loop.
        seed: of the run.
        events: N.
        block: events in one call.
        common: the same event seeds for all designs.

    Example:
        >>> trial = make_trials(np.zeros((1, 2)), 0, 0, events=5, block=2, common=True)[0]
        >>> [n for n, _ in trial.blocks], trial.events
        ([2, 2, 1], 5)
    """
    trials = []
    for design, theta in enumerate(thetas):
        where = 0 if common else design
        blocks = tuple(
            (min(block, events - start), seed_of(seed, iteration, where, i))
            for i, start in enumerate(range(0, events, block))
        )
        trials.append(Trial(iteration, design, theta, blocks))
    return trials


def _events(values: Any, name: str, n: int) -> Floats:
    """Return (n, d) finite real numbers, or raise ValueError with the reason."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be real numbers, got dtype {array.dtype}")
    if array.ndim == 0 or array.shape[0] != n:
        raise ValueError(f"{name} must have {n} events, got shape {array.shape}")
    array = array.reshape(n, -1)
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).any(1).sum())
        raise ValueError(f"{name} has NaN or infinite values in {bad} of {n} events")
    return array


def simulate(
    simulator: Simulator, theta: NDArray[np.float64], n: int, seed: int, design: int = 0
) -> tuple[Floats, Floats]:
    """Call a simulator once and check what comes back.

    Raises:
        SimulationError: it raised, or returned wrong lengths, types or values that are not finite.

    Example:
        >>> simulate(lambda theta, n, seed: {"x": np.arange(n), "y": np.ones(n)}, np.ones(1), 3, 0)[0]
        array([[0.],
               [1.],
               [2.]])
    """
    try:
        found = simulator(np.array(theta), n, seed)
        if isinstance(found, Mapping):
            found = (found["x"], found["y"])
        if len(found) != 2:
            raise ValueError(f"a simulator must return x and y, got {len(found)} values")
        return _events(found[0], "x", n), _events(found[1], "y", n)
    except Exception as error:  # noqa: BLE001 (a simulator may raise anything)
        reason = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        raise SimulationError(design, seed, reason) from None


def check_picklable(simulator: Simulator, executor: Executor | None) -> None:
    """Raise TypeError, naming the attribute, if a process pool cannot take the simulator.

    Only for the standard library's pool: loky and dask pickle by value.
    """
    if not isinstance(executor, ProcessPoolExecutor):
        return
    try:
        pickle.dumps(simulator)
    except Exception as error:
        culprit = ""
        for name, value in getattr(simulator, "__dict__", {}).items():
            try:
                pickle.dumps(value)
            except Exception:  # noqa: BLE001 (a simulator may raise anything)
                culprit = f"; its attribute {name!r} is what cannot be pickled"
                break
        raise TypeError(
            f"the simulator cannot be sent to another process ({error}){culprit}. Define it at the top "
            "of a module, or use loky or threads"
        ) from error


class _Running:
    """One submitted block, and when it was first seen to run."""

    def __init__(self, trial: Trial, block: int, attempt: int) -> None:
        self.trial, self.block, self.attempt = trial, block, attempt
        self.since: float | None = None


def run_trials(
    simulator: Simulator,
    trials: Sequence[Trial],
    on_result: Callable[[Trial, Floats, Floats], None],
    on_failure: Callable[[Trial, SimulationError], None],
    *,
    executor: Executor | None = None,
    timeout: float | None = None,
    retries: int = 2,
    in_flight: int | None = None,
) -> None:
    """Simulate trials; the callbacks are called here, as results arrive, in any order.

    Args:
        simulator: `(theta, n, seed) -> (x, y)`.
        trials: what to simulate.
        on_result: gets the trial and the events of all its blocks.
        on_failure: gets the trial and the error after the last retry.
        executor: None for this process. Only `submit` and `Future` are used.
        timeout: seconds that a block may run; it is then given up (the worker cannot be stopped) and not
            repeated. Not watched without an executor.
        retries: how often a failed block is repeated, with the same seed.
        in_flight: blocks submitted at once; twice the number of workers by default, and no more than the
            number of free workers with a timeout, so that waiting in a queue does not count as running.

    Raises:
        SimulationError: the executor broke (a worker died).
    """
    parts: dict[int, dict[int, tuple[Floats, Floats]]] = {t.design: {} for t in trials}
    failed: set[int] = set()

    def finish(job: _Running, found: tuple[Floats, Floats]) -> None:
        trial, done = job.trial, parts[job.trial.design]
        done[job.block] = found
        if len(done) == len(trial.blocks) and trial.design not in failed:
            x, y = (np.concatenate([done[b][i] for b in range(len(trial.blocks))]) for i in (0, 1))
            parts[trial.design] = {}
            on_result(trial, x, y)

    def give_up(job: _Running, error: SimulationError) -> None:
        if job.trial.design not in failed:
            failed.add(job.trial.design)
            on_failure(job.trial, error)

    jobs = deque(_Running(t, b, 0) for t in trials for b in range(len(t.blocks)))
    if executor is None:
        while jobs:
            job = jobs.popleft()
            if job.trial.design in failed:
                continue
            n, seed = job.trial.blocks[job.block]
            try:
                found = simulate(simulator, job.trial.theta, n, seed, job.trial.design)
            except SimulationError as error:
                if job.attempt < retries:
                    jobs.appendleft(_Running(job.trial, job.block, job.attempt + 1))
                else:
                    give_up(job, error)
            else:
                finish(job, found)
        return

    workers = getattr(executor, "_max_workers", None) or os.cpu_count() or 1
    limit = in_flight or 2 * workers
    if timeout:  # a process pool calls a block running while it still waits for a worker
        limit = min(limit, workers)
    pending: dict[Future[Any], _Running] = {}
    lost: list[Future[Any]] = []  # given up, but they may still occupy a worker
    try:
        while jobs or pending:
            lost = [future for future in lost if not future.done()]
            while jobs and len(pending) < max(1, limit - len(lost)):
                job = jobs.popleft()
                if job.trial.design in failed:
                    continue
                n, seed = job.trial.blocks[job.block]
                args = (simulator, job.trial.theta, n, seed, job.trial.design)
                pending[executor.submit(simulate, *args)] = job
            if not pending:
                continue
            done, _ = wait(pending, 0.02 if timeout else None, FIRST_COMPLETED)
            for future in [each for each in pending if each in done]:  # in the order of submission
                job = pending.pop(future)
                try:
                    found = future.result()
                except BrokenExecutor:
                    raise
                except Exception as error:  # noqa: BLE001 (a simulator may raise anything)
                    if not isinstance(error, SimulationError):
                        seed = job.trial.blocks[job.block][1]
                        reason = f"{type(error).__name__}: {error}"
                        error = SimulationError(job.trial.design, seed, reason)
                    if job.attempt < retries:
                        jobs.append(_Running(job.trial, job.block, job.attempt + 1))
                    else:
                        give_up(job, error)
                else:
                    finish(job, found)
            if timeout:
                lost += _expire(pending, timeout, give_up)
    except BrokenExecutor as error:
        raise SimulationError(
            None,
            None,
            f"a worker process died ({error}); what had arrived is saved where a checkpoint was given: "
            "run again with a new executor to go on",
        ) from error
    finally:
        for future in pending:
            future.cancel()


def _expire(
    pending: dict[Future[Any], _Running],
    timeout: float,
    give_up: Callable[[_Running, SimulationError], None],
) -> list[Future[Any]]:
    """Give up the blocks that have run for too long, and return their futures."""
    now, lost = time.monotonic(), []
    for future, job in list(pending.items()):
        if job.since is None and future.running():
            job.since = now
        if job.since is not None and now - job.since > timeout and not future.done():
            future.cancel()
            del pending[future]
            lost.append(future)
            seed = job.trial.blocks[job.block][1]
            give_up(job, SimulationError(job.trial.design, seed, f"no result after {timeout:g} s"))
    return lost
