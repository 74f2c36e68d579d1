"""What a checkpoint of a learner holds, and how a learner goes back to one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from sequel.learner import Learner

__all__ = ["restore", "state_of"]


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
