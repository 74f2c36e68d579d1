"""Streams of tasks from any arrays: class-, task- and domain-incremental, permuted, rotated, blurry."""

from sequel.scenarios.build import (
    blurry,
    class_incremental,
    data_incremental,
    domain_incremental,
    from_datasets,
    permuted,
    rotate,
    rotated,
    task_incremental,
)
from sequel.scenarios.core import Data, Dataset, Scenario, Task

__all__ = [
    "Data",
    "Dataset",
    "Scenario",
    "Task",
    "blurry",
    "class_incremental",
    "data_incremental",
    "domain_incremental",
    "from_datasets",
    "permuted",
    "rotate",
    "rotated",
    "task_incremental",
]
