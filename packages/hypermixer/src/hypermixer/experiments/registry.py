"""The experiments by name; a module is imported when its experiment is run."""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "shapes": "shapes",
    "listops": "classification",
    "digits": "classification",
    "topics-pair": "classification",
    "sst2": "classification",
    "agnews": "classification",
    "trec": "classification",
    "cost": "cost",
    "tuning": "tuning",
}


def experiment_names() -> tuple[str, ...]:
    """Return the names that :func:`run_experiment` knows."""
    return tuple(_MODULES)


def run_experiment(name: str, **options: Any) -> dict[str, Any]:
    """Run an experiment.

    Args:
        name: one of :func:`experiment_names`.
        options: ``seeds``, ``mixers``, ``steps``, ``data_dir``, ``progress`` and what the
            experiment's own ``run`` takes.

    Returns:
        experiment, settings, runs (one dict a seed and model), summary, claims, environment, seconds.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in _MODULES:
        raise ValueError(f"experiment must be one of {', '.join(_MODULES)}; got {name!r}")
    module = importlib.import_module(f"hypermixer.experiments.{_MODULES[name]}")
    result: dict[str, Any] = module.run(name, **options)
    return result
