"""Continual learning: one definition of each algorithm, the same numbers in PyTorch and JAX.

The names of the first screen: :class:`Learner`, the algorithms (:class:`EWC`, :class:`SI`, :class:`ER`,
...), ``sequel.scenarios``, ``sequel.data``, ``sequel.nn``, :class:`ReplayBuffer`, ``sequel.functional`` and, for a loop
of your own, ``sequel.torch``. JAX is imported only where it is used.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any


def _refuse_namesake() -> None:
    try:
        importlib.metadata.version("sequel-core")
    except importlib.metadata.PackageNotFoundError:
        return
    raise ImportError(
        "sequel-core, an abandoned package, installs the same import name: pip uninstall sequel-core, "
        "then pip install --force-reinstall sequel-cl"
    )


_refuse_namesake()

__version__ = "0.1.0"

_HOME = {
    **dict.fromkeys(
        [
            "AGEM",
            "DER",
            "DERpp",
            "ER",
            "EWC",
            "GEM",
            "ICaRL",
            "Joint",
            "KCL",
            "LFL",
            "LaMAML",
            "LwF",
            "MAS",
            "MCSGD",
            "Naive",
            "SI",
            "StableSGD",
            "Algorithm",
            "Quadratic",
            "ALGORITHMS",
        ],
        "sequel.algorithms",
    ),
    "Learner": "sequel.learner",
    "Result": "sequel.result",
    "ReplayBuffer": "sequel.buffer",
    "Callback": "sequel.callbacks",
    "Checkpoint": "sequel.callbacks",
    "Progress": "sequel.callbacks",
    "CSVLogger": "sequel.loggers",
    "TensorBoardLogger": "sequel.loggers",
    "WandbLogger": "sequel.loggers",
    "fit_seeds": "sequel.seeds",
}
_MODULES = [
    "algorithms",
    "callbacks",
    "checkpoint",
    "data",
    "functional",
    "integrations",
    "loggers",
    "metrics",
    "nn",
    "ops",
    "plot",
    "rng",
    "scenarios",
    "testing",
    "torch",
]

if TYPE_CHECKING:
    from sequel import (
        algorithms,
        callbacks,
        checkpoint,
        data,
        functional,
        integrations,
        loggers,
        metrics,
        nn,
        ops,
        plot,
        rng,
        scenarios,
        testing,
        torch,
    )
    from sequel.algorithms import (
        AGEM,
        ALGORITHMS,
        DER,
        ER,
        EWC,
        GEM,
        KCL,
        LFL,
        MAS,
        MCSGD,
        SI,
        Algorithm,
        DERpp,
        ICaRL,
        Joint,
        LaMAML,
        LwF,
        Naive,
        Quadratic,
        StableSGD,
    )
    from sequel.buffer import ReplayBuffer
    from sequel.callbacks import Callback, Checkpoint, Progress
    from sequel.learner import Learner
    from sequel.loggers import CSVLogger, TensorBoardLogger, WandbLogger
    from sequel.result import Result
    from sequel.seeds import fit_seeds

__all__ = [
    "AGEM",
    "ALGORITHMS",
    "DER",
    "ER",
    "EWC",
    "GEM",
    "KCL",
    "LFL",
    "MAS",
    "MCSGD",
    "SI",
    "Algorithm",
    "CSVLogger",
    "Callback",
    "Checkpoint",
    "DERpp",
    "ICaRL",
    "Joint",
    "LaMAML",
    "Learner",
    "LwF",
    "Naive",
    "Progress",
    "Quadratic",
    "ReplayBuffer",
    "Result",
    "StableSGD",
    "TensorBoardLogger",
    "WandbLogger",
    "algorithms",
    "callbacks",
    "checkpoint",
    "data",
    "fit_seeds",
    "functional",
    "integrations",
    "loggers",
    "metrics",
    "nn",
    "ops",
    "plot",
    "rng",
    "scenarios",
    "testing",
    "torch",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"sequel.{name}")
    raise AttributeError(f"module 'sequel' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
