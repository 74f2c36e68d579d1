from __future__ import annotations

import os
import warnings
from typing import Any

# The suite compiles some hundred small programs and runs each for milliseconds: less optimisation.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import pytest
import torch

import sequel

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small_scenario(n_tasks: int = 3, n: int = 90) -> Any:
    from sequel.testing import tiny_data

    return sequel.scenarios.permuted(tiny_data(n), n_tasks)


def small_learner(algorithm: Any, scenario: Any, *, lr: float = 0.05, **options: Any) -> Any:
    torch.manual_seed(0)
    model = sequel.nn.MLP(64, (16, 16), scenario.n_classes)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    options = {"batch_size": 8, **options}
    return sequel.Learner(model, optimizer, algorithm, **options)


def fit_quiet(learner: Any, scenario: Any, **kw: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return learner.fit(scenario, **kw)
