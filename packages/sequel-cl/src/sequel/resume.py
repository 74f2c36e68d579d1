"""What a checkpoint of a learner holds, and how a learner goes back to one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sequel import checkpoint

if TYPE_CHECKING:
    from sequel.algorithms import Algorithm
    from sequel.callbacks import Callback
    from sequel.learner import Learner

__all__ = ["Load", "restore", "state_of"]


def _identity(learner: Learner, params: dict[str, Any]) -> dict[str, Any]:
    """Return what must be equal in the run that goes on."""
    return {
        "backend": learner.backend.name,
        "algorithm": repr(learner.algorithm),
        "seed": learner.seed,
        "batch_size": learner.batch_size,
        "fingerprint": learner.fingerprint,
        "shapes": {k: list(v.shape) for k, v in params.items()},
    }


def _recipe(algorithm: Algorithm) -> dict[str, Any]:
    """Return how to make one of sequel's own algorithms again."""
    from sequel.algorithms import ALGORITHMS

    known = type(algorithm) is ALGORITHMS.get(algorithm.name)
    params = dataclasses.asdict(algorithm) if known else {}  # type: ignore[call-overload]
    return {"name": algorithm.name, "known": known, "params": params}


def state_of(learner: Learner) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (tree of arrays, JSON-able header) of a learner."""
    if learner.scenario is None:
        raise RuntimeError("call setup(scenario) first")
    tree = learner.backend.arrays()
    rows = [[s, t, *row] for s, t, row in learner.anytime]
    tree["run"] = {
        "matrix": learner.matrix,
        "initial": learner.initial,
        "losses": np.asarray(learner.losses, dtype=np.float64),
        "anytime": np.asarray(rows, dtype=np.float64),
    }
    if learner.slots is not None:
        tree["slots"] = learner.slots.state_dict()
    header = {
        "position": learner.position,
        "global_step": learner.global_step,
        "options": learner._options,
        "algo": _recipe(learner.algorithm),
        "versions": {"numpy": np.__version__, "torch": torch.__version__},
        **_identity(learner, tree["params"]),
    }
    return tree, header


def restore(
    learner: Learner, tree: dict[str, Any], header: dict[str, Any], *, strict: bool = True
) -> None:
    """Put a learner, bound to its scenario, into a checkpoint's state."""
    if learner.scenario is None:
        raise RuntimeError("call setup(scenario) before loading a checkpoint")
    mine = _identity(learner, learner.backend.arrays()["params"])
    wrong = [key for key, value in mine.items() if header[key] != value]
    if wrong and strict:
        pairs = "; ".join(f"{k}: {header[k]!r} there, {mine[k]!r} here" for k in wrong)
        raise RuntimeError(f"the checkpoint is of another run ({pairs}); strict=False loads it")
    learner.backend.load_arrays(tree)
    run = tree["run"]
    learner.matrix, learner.initial = run["matrix"].copy(), run["initial"].copy()
    learner.losses = run["losses"].tolist()
    learner.anytime = [(int(r[0]), int(r[1]), r[2:].tolist()) for r in run["anytime"]]
    if learner.slots is not None:
        learner.slots.load_state_dict(tree["slots"])
    learner.position = {k: int(v) for k, v in header["position"].items()}
    learner.global_step = int(header["global_step"])
    learner.emit("on_resume", position=dict(learner.position))


class Load:
    """``learner.load(path)`` restores into a learner, ``Learner.load(path, model=..., optimizer=...)`` makes one."""

    def __get__(self, learner: Learner | None, kind: type[Learner]) -> Callable[..., Any]:
        """Return the function of an instance, or that of the class."""
        if learner is not None:
            return _Into(learner)
        return _Make(kind)


class _Into:
    def __init__(self, learner: Learner) -> None:
        self.learner = learner

    def __call__(self, path: str | os.PathLike[str], *, strict: bool = True) -> None:
        """Restore a checkpoint file into this learner, which is bound to its scenario."""
        self.learner.restore(*checkpoint.read(path), strict=strict)


class _Make:
    def __init__(self, kind: type[Learner]) -> None:
        self.kind = kind

    def __call__(
        self,
        path: str | os.PathLike[str],
        *,
        model: Any,
        optimizer: Any,
        algorithm: Algorithm | None = None,
        callbacks: Sequence[Callback] = (),
        **changes: Any,
    ) -> Learner:
        """Return the learner of a checkpoint file, with its settings; it is restored when it is given its scenario.

        ``algorithm`` and ``loss`` must be given where they are your own; ``changes`` replace settings, e.g. ``device``.
        """
        from sequel.algorithms import ALGORITHMS

        tree, header = checkpoint.read(path)
        saved = header["algo"]
        if algorithm is None:
            if not saved["known"]:
                raise ValueError(
                    f"algorithm must be given: {saved['name']!r} is not one of sequel's"
                )
            params = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["params"].items()}
            algorithm = ALGORITHMS[saved["name"]](**params)
        options = {**header["options"], **changes}
        if "loss" not in options:
            raise ValueError("loss must be given: the run's was a function of its own")
        learner = self.kind(model, optimizer, algorithm, callbacks=callbacks, **options)
        learner._pending = (tree, header)
        return learner
