"""Online use, and steps that are skipped: nothing may be lost in silence."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sequel

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(200, 6)), np.arange(200) % 4


def scenario(bad: bool = False) -> Any:
    x = X.copy()
    if bad:
        x[[8, 90]] = np.nan  # one sample of each task
    return sequel.scenarios.class_incremental((x, Y, X, Y), 2)


def learner(
    algorithm: Any, backend: str = "torch", dtype: Any = torch.float64, **options: Any
) -> Any:
    torch.manual_seed(0)
    model = sequel.nn.MLP(6, (8,), 4).to(dtype)
    options = {"batch_size": 10, **options}
    if backend == "torch":
        return sequel.Learner(
            model, torch.optim.SGD(model.parameters(), 0.05), algorithm, **options
        )
    optax = pytest.importorskip("optax")
    return sequel.Learner(sequel.nn.to_jax(model), optax.sgd(0.05), algorithm, **options)


def feed(one: Any, stream: Any) -> None:
    one.setup(stream)
    for number, task in enumerate(stream):
        for at in range(0, len(task.train), 10):
            rows = slice(at, at + 10)
            one.observe(task.train.x[rows], task.train.y[rows], task=number)


def test_a_new_task_number_consolidates_the_task_before() -> None:
    stream = scenario()
    ewc = learner(sequel.EWC(lam=1.0))
    ewc.setup(stream)
    first = stream[0].train
    ewc.observe(first.x[:10], first.y[:10], task=0)
    model = ewc.backend.model.module
    anchor = {k: v.detach().clone() for k, v in model.named_parameters()}
    total = {k: torch.zeros_like(v) for k, v in anchor.items()}
    for x, y in zip(torch.tensor(first.x), torch.tensor(first.y), strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[None]), y[None]).backward()
        for name, p in model.named_parameters():
            total[name] += p.grad**2 / len(first)
    ewc.observe(stream[1].train.x[:10], stream[1].train.y[:10], task=1)
    for name, value in anchor.items():
        assert torch.equal(ewc.backend.state["anchor"][name], value)
        torch.testing.assert_close(
            ewc.backend.state["omega"][name], total[name], rtol=1e-10, atol=1e-14
        )
    assert np.isfinite(ewc.matrix[0]).all()


def test_observed_tasks_fill_the_memory_and_end_task_closes_the_last() -> None:
    er = learner(sequel.ER(memory=20))
    feed(er, scenario())
    assert len(er.slots) == 10
    assert set(er.slots.task[er.slots.rows].tolist()) == {0}
    row = er.end_task()
    assert len(er.slots) == 20
    assert np.array_equal(er.matrix[1], row)
    assert len(er.result().losses) == 20
    with pytest.raises(ValueError, match=r"task must lie in \[2, 2\), .* got 2"):
        er.observe(X[:4], Y[:4])


@pytest.mark.parametrize(
    ("y", "task", "kind", "text"),
    [
        (np.array([0, 9]), 0, ValueError, r"y must lie in \[0, 4\), got 0 to 9"),
        (np.array([0.0, 1.0]), 0, TypeError, "y must be integer labels"),
        (np.array([0, 1]), 7, ValueError, "task must lie in"),
        (np.array([0, 1]), -1, ValueError, "task must lie in"),
    ],
)
def test_what_cannot_be_observed_is_named(y: Any, task: int, kind: Any, text: str) -> None:
    one = learner(sequel.Naive())
    one.setup(scenario())
    with pytest.raises(kind, match=text):
        one.observe(X[:2], y, task=task)


SKIPPING = {
    "si": sequel.SI(lam=0.05),
    "der": sequel.DER(memory=30),
    "reservoir": sequel.ER(memory=400, policy="reservoir"),
    "lamaml": sequel.LaMAML(memory=20, glances=1, inner_batch=5, alpha_init=0.05),
}


def fit_skipping(one: Any, stream: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return one.fit(stream, epochs=2)


@pytest.mark.parametrize("name", SKIPPING)
def test_a_skipped_step_leaves_no_trace(name: str) -> None:
    one = learner(SKIPPING[name], nan="skip")
    result = fit_skipping(one, scenario(bad=True))
    # Of the 10 batches of an epoch one holds the bad sample; no other step may be spoilt by it.
    assert np.isnan(result.losses).sum() == 4
    for tree in (one.backend.params, one.backend.state):
        for leaf in torch.utils._pytree.tree_leaves(tree):
            assert bool(torch.as_tensor(leaf).isfinite().all())
    if one.slots is not None:
        held = one.backend.state["memory"]["x"][torch.from_numpy(one.slots.rows)]
        assert bool((held.abs().sum(1) > 0).all())  # no row that was never written


@pytest.mark.parametrize("name", ["si", "reservoir"])
def test_both_backends_skip_alike(name: str) -> None:
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        a, b = (learner(SKIPPING[name], kind, nan="skip") for kind in ("torch", "jax"))
        first, second = (fit_skipping(one, scenario(bad=True)) for one in (a, b))
        np.testing.assert_allclose(first.losses, second.losses, rtol=0, atol=1e-10)
        assert np.array_equal(first.matrix, second.matrix)


def test_skipping_restores_running_statistics() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).double()
    one = sequel.Learner(
        model, torch.optim.SGD(model.parameters(), 0.05), sequel.Naive(), batch_size=10, nan="skip"
    )
    fit_skipping(one, scenario(bad=True))
    assert bool(model[1].running_mean.isfinite().all())
    assert int(model[1].num_batches_tracked) == 2 * 2 * 10 - 4


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_importances_that_are_not_finite_are_refused(backend: str) -> None:
    one = learner(sequel.EWC(), backend, nan="skip", dtype=torch.float32)
    with pytest.raises(FloatingPointError, match="importances of task 0 are not finite"):
        fit_skipping(one, scenario(bad=True))
