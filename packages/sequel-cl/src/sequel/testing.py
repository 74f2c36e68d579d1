"""Check an algorithm of your own: frozen, without arrays, and the same numbers in both backends."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
import torch

from sequel.algorithms.base import Algorithm
from sequel.learner import Learner
from sequel.nn import CNN, MLP, params_to_jax, to_jax
from sequel.rng import stream
from sequel.scenarios import Scenario, permuted, task_incremental

__all__ = ["check_algorithm", "compare_backends", "tiny_data"]


def tiny_data(n: int = 90, classes: int = 6, seed: int = 0) -> tuple[np.ndarray[Any, Any], ...]:
    """Return (x_train, y_train, x_test, y_test) of noisy class prototypes, images (N, 1, 8, 8), float64."""
    rng = stream(seed, "tiny")
    prototypes = rng.standard_normal((classes, 1, 8, 8))
    out: list[np.ndarray[Any, Any]] = []
    for size in (n, n // 2):
        y = rng.permutation(np.arange(size) % classes)
        out += [prototypes[y] + 0.8 * rng.standard_normal((size, 1, 8, 8)), y]
    return tuple(out)


def compare_backends(
    algorithm: Algorithm,
    *,
    scenario: Scenario | None = None,
    network: Any = "mlp",
    optimizer: str = "sgd",
    lr: float = 0.05,
    epochs: int = 3,
    batch_size: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> dict[str, Any]:
    """Run both backends from the same weights; return the largest differences.

    Args:
        algorithm: what to run.
        scenario: three tasks of :func:`tiny_data` by default (task-incremental if it needs task ids).
        network: ``"mlp"`` or ``"cnn"``; or a PyTorch model of the zoo.
        optimizer: ``"sgd"``, ``"momentum"`` or ``"adam"``.
        options: of both learners.

    Returns:
        ``params``, ``state``, ``matrix``, ``losses``: largest absolute differences; ``traces``: compilations of
        the JAX step; ``torch``, ``jax``: the two learners.
    """
    import jax
    import optax

    if scenario is None:
        data = tiny_data()
        wise = "task_wise" in algorithm.needs
        scenario = task_incremental(data, 3) if wise else permuted(data, 3)
    shape = scenario[0].train.x.shape[1:]
    if isinstance(network, str):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made: Any = (
                MLP(int(np.prod(shape)), (16, 16), scenario.n_classes)
                if network == "mlp"
                else CNN(shape, scenario.n_classes, channels=(4, 6))
            )
    else:
        made = network
    made = made.to(dtype)
    with jax.enable_x64(dtype == torch.float64):
        other = to_jax(made)
        momentum = 0.9 if optimizer == "momentum" else 0.0
        first: Any = torch.optim.SGD(made.parameters(), lr, momentum=momentum)
        second: Any = optax.sgd(lr, momentum=momentum or None)
        if optimizer == "adam":
            first, second = torch.optim.Adam(made.parameters(), lr), optax.adam(lr)
        options = {"batch_size": batch_size, "seed": seed, "lr": lr, **options}
        one = Learner(made, first, algorithm, **options)
        two = Learner(other, second, algorithm, **options)
        a, b = one.fit(scenario, epochs), two.fit(scenario, epochs)
        tree, tree2 = one.backend.arrays(), two.backend.arrays()
    params = _difference(_converted(made, tree["params"]), tree2["params"])
    state = _difference(_converted(made, tree["algo"]), tree2["algo"])
    if one.slots is not None and two.slots is not None:
        mine, theirs = one.slots.state_dict(), two.slots.state_dict()
        assert all(np.array_equal(mine[k], theirs[k]) for k in mine), "the memories' rows differ"
    return {
        "params": params,
        "state": state,
        "matrix": float(np.abs(a.matrix - b.matrix).max()),
        "losses": float(np.abs(np.array(a.losses) - np.array(b.losses)).max()),
        "traces": two.backend.traces,
        "torch": one,
        "jax": two,
    }


def _converted(model: Any, tree: Any) -> Any:
    names = dict(model.named_parameters())
    if isinstance(tree, dict) and names and set(names) <= set(tree):
        mine = params_to_jax(model, {k: v for k, v in tree.items() if k in names})
        return {**tree, **mine}
    return {k: _converted(model, v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _difference(a: Any, b: Any) -> float:
    if isinstance(a, dict):
        assert set(a) == set(b), f"the trees differ: {sorted(set(a) ^ set(b))}"
        return max((_difference(a[k], b[k]) for k in a), default=0.0)
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float(np.abs(a - b).max()) if a.size else 0.0


def check_algorithm(algorithm: Algorithm, *, tolerance: float = 1e-10, **options: Any) -> float:
    """Check an algorithm and return the largest difference between the backends.

    It must be hashable (a frozen dataclass), hold no arrays, run three tasks on a MLP and on a CNN in float64 under
    both backends with the same numbers, and compile once. Raises AssertionError naming what failed.
    """
    hash(algorithm)
    for field in dataclasses.fields(algorithm):  # type: ignore[arg-type]
        value = getattr(algorithm, field.name)
        assert not hasattr(value, "shape"), f"{field.name} is an array: keep it in the state"
    worst = 0.0
    for network in ("mlp", "cnn"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = compare_backends(algorithm, network=network, **options)
        assert found["traces"] <= 2, f"the step was compiled {found['traces']} times"
        worst = max(worst, found["params"], found["state"], found["matrix"])
        assert worst <= tolerance, f"{network}: the backends differ by {worst:.2g}"
    return worst
