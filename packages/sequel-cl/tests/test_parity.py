"""The heart: one definition of each algorithm gives the same numbers under PyTorch and JAX."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import sequel
from sequel.testing import check_algorithm, compare_backends

pytest.importorskip("jax")

# Penalties and rates are small enough that no run is chaotic: there, rounding would grow without bound.
ALGORITHMS: dict[str, Any] = {
    "naive": sequel.Naive(),
    "stablesgd": sequel.StableSGD(),
    "joint": sequel.Joint(),
    "ewc": sequel.EWC(lam=2.0),
    "si": sequel.SI(lam=0.05),
    "mas": sequel.MAS(lam=0.02),
    "lwf": sequel.LwF(),
    "lfl": sequel.LFL(lam=0.5),
    "er": sequel.ER(memory=30),
    "agem": sequel.AGEM(per_task=10, replay_batch=16),
    "gem": sequel.GEM(per_task=8),
    "der": sequel.DER(memory=30),
    "derpp": sequel.DERpp(memory=30),
    "mcsgd": sequel.MCSGD(per_task=10, epochs=2, line_samples=4),
    "lamaml": sequel.LaMAML(memory=30, glances=2, inner_batch=4, alpha_init=0.05),
    "icarl": sequel.ICaRL(memory=30),
    "kcl": sequel.KCL(coreset=6, features=16, tau=0.001),
}
VARIANTS: dict[str, Any] = {
    "joint-from-scratch": sequel.Joint(from_scratch=True),
    "ewc-online-true": sequel.EWC(lam=2.0, mode="online", gamma=0.9, fisher="true"),
    "ewc-last-mc": sequel.EWC(lam=2.0, mode="last", fisher="mc", n_samples=40, temperature=2.0),
    "ewc-batch-prox": sequel.EWC(lam=100.0, fisher="batch", apply="prox"),
    "si-total-clip": sequel.SI(lam=0.05, grad_source="total", clip_omega=1.0),
    "mas-ema-batch": sequel.MAS(lam=0.02, accumulate="ema", per_sample=False),
    "lwf-t2": sequel.LwF(t2_scaling=True),
    "er-reservoir-sum": sequel.ER(memory=20, policy="reservoir", combine="sum"),
    "er-balanced": sequel.ER(memory=20, policy="class_balanced"),
    "er-herding": sequel.ER(memory=20, policy="herding"),
    "derpp-second": sequel.DERpp(memory=20, from_step="second_task"),
    "mcsgd-chain": sequel.MCSGD(
        per_task=10, chain_rule=True, normalize="mean", start="connected", include_current=False
    ),
    "lamaml-second": sequel.LaMAML(
        memory=20, glances=1, inner_batch=8, second_order=True, sync_update=True
    ),
    "kcl-rbf": sequel.KCL(coreset=6, kernel="rbf"),
    "kcl-poly": sequel.KCL(coreset=6, kernel="poly"),
}


def compare(algorithm: Any, **options: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compare_backends(algorithm, **options)


def test_every_algorithm_is_in_the_table() -> None:
    assert set(ALGORITHMS) == set(sequel.ALGORITHMS)


QUICK_CNN = ("ewc", "er", "derpp")  # the other CNN cases take seconds each: marked slow
CASES = [
    pytest.param(
        name,
        network,
        marks=pytest.mark.slow if network == "cnn" and name not in QUICK_CNN else (),
    )
    for name in ALGORITHMS
    for network in ("mlp", "cnn")
]


@pytest.mark.parametrize(("name", "network"), CASES)
def test_backends_agree_to_1e_10_under_sgd(name: str, network: str) -> None:
    found = compare(ALGORITHMS[name], network=network)
    assert found["params"] <= 1e-10
    assert found["state"] <= 1e-10
    assert found["matrix"] == 0.0
    assert found["losses"] <= 1e-10
    assert found["traces"] == 1  # three tasks, their short batches included
    losses = np.array(found["torch"].losses)
    losses = losses[: len(losses) // 3]  # of the first task
    assert losses[-8:].mean() < losses[:8].mean()  # it trained


@pytest.mark.parametrize("name", ["ewc", "si", "agem", "derpp"])
def test_backends_agree_to_1e_8_under_adam(name: str) -> None:
    found = compare(ALGORITHMS[name], optimizer="adam", lr=1e-3)
    assert found["params"] <= 1e-8
    assert found["state"] <= 1e-8


@pytest.mark.parametrize("name", ["ewc"])
def test_backends_agree_under_momentum_clipping_and_decay(name: str) -> None:
    found = compare(ALGORITHMS[name], optimizer="momentum", lr=0.02, grad_clip=0.5, lr_decay=0.8)
    assert found["params"] <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_agree_to_1e_10(name: str) -> None:
    found = compare(VARIANTS[name])
    assert found["params"] <= 1e-10
    assert found["state"] <= 1e-10


@pytest.mark.parametrize("name", ["ewc"])
def test_backends_agree_in_float32(name: str) -> None:
    # 1e-4: float32 has 7 digits, and errors of 6e-8 grow over 100 steps.
    assert compare(ALGORITHMS[name], dtype=torch.float32)["params"] <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["agem", "lwf", "icarl"])
def test_backends_agree_with_masks(name: str) -> None:
    scenario = sequel.scenarios.task_incremental(sequel.testing.tiny_data(), 3)
    found = compare(ALGORITHMS[name], scenario=scenario)
    assert found["params"] <= 1e-10
    assert found["matrix"] == 0.0


def test_one_compilation_over_ten_tasks_and_ragged_sizes() -> None:
    x, y, xt, yt = sequel.testing.tiny_data(200, classes=10)
    scenario = sequel.scenarios.class_incremental((x[:173], y[:173], xt, yt), 10)
    found = compare(sequel.EWC(lam=1.0), scenario=scenario, epochs=1)
    assert found["traces"] == 1
    assert found["params"] <= 1e-10


@dataclass(frozen=True)
class L2Init(sequel.Algorithm):
    """A user's algorithm: stay near the initial parameters."""

    lam: float = 0.1

    def init(self, ops: Any, params: Any, info: Any) -> Any:
        return {"start": ops.copy(params)}

    def grads(self, ops: Any, grads: Any, params: Any, ctx: Any, state: Any) -> Any:
        return ops.add_scaled(grads, ops.sub(params, state["start"]), self.lam)


def test_a_users_algorithm_runs_on_both() -> None:
    assert check_algorithm(L2Init(0.05), epochs=1) <= 1e-10


def test_check_algorithm_finds_a_difference() -> None:
    @dataclass(frozen=True)
    class Wrong(sequel.Algorithm):
        def grads(self, ops: Any, grads: Any, params: Any, ctx: Any, state: Any) -> Any:
            return ops.map(lambda g: g * (1.0 if ops.name == "torch" else 1.1), grads)

    with pytest.raises(AssertionError, match="the backends differ"):
        check_algorithm(Wrong(), epochs=1)


def test_check_algorithm_refuses_array_attributes() -> None:
    @dataclass(frozen=True, eq=False)
    class Arrays(sequel.Algorithm):
        anchor: Any = None

    with pytest.raises(AssertionError, match="anchor is an array"):
        check_algorithm(Arrays(np.zeros(3)), epochs=1)
