"""The five-step loop: objectives, ask and tell, executors, the store."""

from mi_surrogates.loop.execute import Simulator, Trial
from mi_surrogates.loop.history import History, Iteration, OptimizeResult
from mi_surrogates.loop.objectives import (
    Batch,
    CallableObjective,
    MIObjective,
    Objective,
    RecoObjective,
)
from mi_surrogates.loop.optimize import optimize
from mi_surrogates.loop.optimizer import Optimizer
from mi_surrogates.loop.store import Store

__all__ = [
    "Batch",
    "CallableObjective",
    "History",
    "Iteration",
    "MIObjective",
    "Objective",
    "OptimizeResult",
    "Optimizer",
    "RecoObjective",
    "Simulator",
    "Store",
    "Trial",
    "optimize",
]
