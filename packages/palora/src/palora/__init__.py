"""Pareto low-rank adapters: one network for every trade-off between its tasks.

``palora.inject(model, tasks)`` adapts a model in place, ``palora.step_loss`` is the training
objective, ``with palora.preference(model, lam):`` turns the dial at inference and
``palora.merge(model, lam)`` makes a plain model of one setting.
"""

from palora.core.balance import FullBalance, GradBalance, LossBalance
from palora.core.checkpoint import (
    Overhead,
    adapter_state_dict,
    load,
    load_adapter_state_dict,
    load_base_state_dict,
    overhead,
    save,
)
from palora.core.inject import InjectionReport, freeze_base, inject, report, unload
from palora.core.loss import (
    StepOutput,
    cosine_diversity,
    multiforward_regularizer,
    scalarize,
    step_loss,
)
from palora.core.merge import merge
from palora.core.optim import param_groups
from palora.core.preference import (
    checkpoint_context,
    disable,
    get_preference,
    preference,
    set_preference,
)
from palora.core.rays import multi
from palora.core.schedule import Schedule
from palora.core.simplex import simplex_grid

__version__ = "0.1.0"

__all__ = [
    "FullBalance",
    "GradBalance",
    "InjectionReport",
    "LossBalance",
    "Overhead",
    "Schedule",
    "StepOutput",
    "adapter_state_dict",
    "checkpoint_context",
    "cosine_diversity",
    "disable",
    "freeze_base",
    "from_peft",
    "get_preference",
    "inject",
    "load",
    "load_adapter_state_dict",
    "load_base_state_dict",
    "merge",
    "multi",
    "multiforward_regularizer",
    "overhead",
    "param_groups",
    "preference",
    "report",
    "save",
    "scalarize",
    "set_preference",
    "simplex_grid",
    "step_loss",
    "to_peft",
    "unload",
]


def __getattr__(name: str) -> object:
    """Load the exchange with PEFT on first use."""
    if name in ("to_peft", "from_peft"):
        from palora.interop import peft

        return getattr(peft, name)
    raise AttributeError(f"module 'palora' has no attribute {name!r}")
