"""An optimizer as tensors, numbers and strings, and back."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mi_surrogates.design.trust import Region, Step
from mi_surrogates.loop.history import History, Iteration, OptimizeResult

if TYPE_CHECKING:
    from mi_surrogates.loop.optimizer import Optimizer


def dump(opt: Optimizer) -> dict[str, Any]:
    """Return everything as tensors, numbers and strings, events told so far included."""
    points = [torch.tensor([*t, v, s, float(i)], dtype=torch.float64) for t, v, s, i in opt._points]
    last, accepted, previous = opt._last, opt._accepted, opt._previous
    return {
        "center": torch.from_numpy(opt.region.center),
        "cov": torch.from_numpy(opt.region.cov),
        "points": torch.stack(points) if points else None,
        "history": [each.as_dict() for each in opt.history],
        "last": None
        if last is None
        else [torch.from_numpy(last.theta), last.gain, last.at_boundary, last.length],
        "previous": None if previous is None else [torch.from_numpy(p) for p in previous],
        "accepted": None
        if accepted is None
        else [torch.from_numpy(accepted[0]), accepted[1], accepted[2]],
        "best": [opt._best, opt._since_best, opt._flat, opt._moved],
        "multipliers": opt.multipliers,
        "penalty": opt.penalty,
        "events": opt.total_events,
        "status": opt.status,
        "objective": opt.objective.state_dict(),
        "surrogate": copy.deepcopy(opt.surrogate.state_dict()) if opt.history else None,
        "told": {str(k): list(v) for k, v in opt._told.items()},
        "failed": {str(k): v for k, v in opt._failed.items()},
    }


def load(opt: Optimizer, state: dict[str, Any]) -> None:
    """Go on where the other optimizer, made with the same arguments, was."""
    cov = state["cov"].numpy()
    opt.region = Region(state["center"].numpy(), cov, opt.region.radius)
    dim = opt.space.dim
    rows = [] if state["points"] is None else state["points"].numpy()
    opt._points = [
        (row[:dim].copy(), float(row[dim]), float(row[dim + 1]), int(row[dim + 2])) for row in rows
    ]
    opt.history = History((Iteration(**row) for row in state["history"]), opt.space.names)
    last, previous, accepted = state["last"], state["previous"], state["accepted"]
    opt._last = None if last is None else Step(last[0].numpy(), *last[1:])
    opt._previous = None
    if previous is not None:
        opt._previous = (previous[0].numpy(), previous[1].numpy())
    opt._accepted = None
    if accepted is not None:
        opt._accepted = (accepted[0].numpy(), accepted[1], accepted[2])
    opt._best, opt._since_best, opt._flat, opt._moved = state["best"]
    opt.multipliers, opt.penalty = state["multipliers"], state["penalty"]
    opt.total_events, opt.status = state["events"], state["status"]
    opt.objective.load_state_dict(state["objective"])
    opt.surrogate = opt.new_surrogate(torch.Generator())
    if state["surrogate"] is not None:
        opt.surrogate.load_state_dict(state["surrogate"])
        opt.surrogate.fitted = True  # type: ignore[assignment]
    opt._begin()
    opt._told = {int(k): (v[0], v[1]) for k, v in state["told"].items()}
    opt._failed = {int(k): v for k, v in state["failed"].items()}


def result(opt: Optimizer, status: str, seconds: float) -> OptimizeResult:
    """Return where the loop is."""
    if opt._accepted is None:
        raise RuntimeError("no iteration is finished whose nominal design could be simulated")
    theta, value, stderr = opt._accepted
    return OptimizeResult(
        theta.copy(),
        value,
        stderr,
        list(opt.space.names),
        History(opt.history, opt.space.names),
        np.stack([p[0] for p in opt._points]),
        np.array([p[1] for p in opt._points]),
        np.array([p[2] for p in opt._points]),
        opt.total_events,
        seconds,
        opt.space.violation(theta),
        status or opt.status,
        opt.surrogate,
        opt.region,
        dict(opt.space.choices),
    )
