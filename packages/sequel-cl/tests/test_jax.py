"""JAX's side alone: flax models, one program for all seeds, no transfers inside the scan."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import sequel

from .conftest import small_scenario

jax = pytest.importorskip("jax")
import optax
from flax import linen, nnx

from sequel.nn.jax import FunctionalModel, from_linen

jnp = jax.numpy


class NNX(nnx.Module):
    def __init__(self, rngs: Any) -> None:
        self.encoder = nnx.Linear(64, 12, rngs=rngs)
        self.norm = nnx.BatchNorm(12, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.classifier = nnx.Linear(12, 6, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = x.reshape(len(x), -1)
        return self.classifier(self.drop(nnx.relu(self.norm(self.encoder(x)))))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = linen.Dense(12)(x.reshape(len(x), -1))
        x = linen.BatchNorm(use_running_average=not train)(x)
        return linen.Dense(6)(linen.Dropout(0.2, deterministic=not train)(linen.relu(x)))


class Plain(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        return linen.Dense(6)(x.reshape(len(x), -1))


@pytest.mark.parametrize(
    "algorithm",
    [sequel.EWC(lam=1.0), pytest.param(sequel.ER(memory=20), marks=pytest.mark.slow)],
    ids=lambda a: a.name,
)
def test_flax_models_with_running_statistics(algorithm: Any) -> None:
    scenario = small_scenario(2)
    x = jnp.zeros((1, 64))
    variables = Linen().init(jax.random.key(0), x)
    plain = Plain().init(jax.random.key(0), x)
    for model in (
        NNX(nnx.Rngs(0)),
        from_linen(Linen(), variables, dropout=True),
        (Plain(), plain),
    ):
        learner = sequel.Learner(model, optax.adam(1e-2), algorithm, batch_size=9)
        learner.setup(scenario)
        before = jax.tree_util.tree_map(np.asarray, learner.backend.arrays()["buffers"])
        result = learner.fit(scenario, epochs=4)
        assert result.losses[-1] < result.losses[0]
        assert learner.backend.traces == 1
        after = learner.backend.arrays()["buffers"]
        if before:
            assert any(not np.array_equal(before[k], after[k]) for k in before)


def test_nnx_features_serve_algorithms_that_need_an_encoder() -> None:
    class Small(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.encoder = nnx.Linear(64, 12, rngs=rngs)
            self.classifier = nnx.Linear(12, 6, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.classifier(nnx.relu(self.encoder(x)))

    x, y, xt, yt = sequel.testing.tiny_data()
    flat = (x.reshape(len(x), -1), y, xt.reshape(len(xt), -1), yt)
    scenario = sequel.scenarios.permuted(flat, 2)
    learner = sequel.Learner(Small(nnx.Rngs(0)), optax.sgd(0.05), sequel.LFL(), batch_size=8)
    assert learner.fit(scenario).matrix.shape == (2, 2)


def test_images_can_be_handed_over_as_nhwc() -> None:
    def apply(p: Any, x: Any) -> Any:
        assert x.shape[1:] == (8, 8, 1)
        return x.reshape(len(x), -1) @ p["w"]

    model = FunctionalModel(apply, {"w": jnp.zeros((64, 6))}, layout="NHWC")
    learner = sequel.Learner(model, optax.sgd(0.1), sequel.Naive())
    assert learner.fit(small_scenario(2)).acc > 0.3


def test_nothing_crosses_to_the_host_inside_the_scan() -> None:
    scenario = small_scenario(2)
    model = sequel.nn.to_jax(sequel.nn.MLP(64, (8,), 6))
    learner = sequel.Learner(model, optax.sgd(0.05), sequel.DERpp(memory=20), batch_size=8)
    learner.fit(scenario, stop_after=1)
    backend = learner.backend
    compiled = backend.compiled

    def guarded(*args: Any) -> Any:
        with jax.transfer_guard("disallow"):
            return compiled(*args)

    backend.compiled = guarded
    learner.fit(scenario)
    assert backend.traces == 1


@pytest.mark.parametrize(
    "algorithm",
    [
        sequel.DER(memory=20),
        pytest.param(sequel.EWC(lam=1.0), marks=pytest.mark.slow),
        pytest.param(sequel.ICaRL(memory=12), marks=pytest.mark.slow),
    ],
    ids=lambda a: a.name,
)
def test_seeds_in_one_program_equal_the_seeds_own_runs(algorithm: Any) -> None:
    scenario = small_scenario(2)

    def model(seed: int) -> Any:
        return sequel.nn.jax.MLP(64, (8,), 6, seed=seed)

    together = sequel.fit_seeds(
        model, optax.sgd(0.05), algorithm, scenario, 1, seeds=[0, 1, 2], batch_size=8
    )
    for seed, result in enumerate(together):
        learner = sequel.Learner(model(seed), optax.sgd(0.05), algorithm, batch_size=8, seed=seed)
        alone = learner.fit(scenario)
        np.testing.assert_allclose(result.losses, alone.losses, rtol=2e-3, atol=1e-5)  # float32
    assert together[0].losses != together[1].losses


def test_seeds_report_a_loss_that_is_not_finite() -> None:
    x, y, xt, yt = sequel.testing.tiny_data()
    scenario = sequel.scenarios.permuted((x * np.nan, y, xt, yt), 1)
    with pytest.raises(FloatingPointError, match="task 0"):
        sequel.fit_seeds(
            lambda s: sequel.nn.jax.MLP(64, (4,), 6),
            optax.sgd(0.1),
            sequel.Naive(),
            scenario,
            seeds=[0],
        )


def test_learning_rate_decay_and_prox_need_the_rate() -> None:
    model = sequel.nn.jax.MLP(64, (8,), 6)
    with pytest.raises(ValueError, match="lr must be given"):
        sequel.Learner(model, optax.sgd(0.1), sequel.Naive(), lr_decay=0.5)
    with pytest.raises(ValueError, match="lr must be given"):
        sequel.Learner(model, optax.sgd(0.1), sequel.EWC(apply="prox"))
    with pytest.raises(TypeError, match="must be an optax"):
        sequel.Learner(model, torch.optim.SGD([torch.zeros(1)], 0.1), sequel.Naive())
    with pytest.raises(TypeError, match="model must be a"):
        sequel.Learner(object(), optax.sgd(0.1), sequel.Naive())
    bare = FunctionalModel(lambda p, x: x.reshape(len(x), -1) @ p, jnp.zeros((64, 6)))
    with pytest.raises(TypeError, match="needs an encoder"):
        sequel.Learner(bare, optax.sgd(0.1), sequel.ICaRL()).fit(small_scenario(2))


def test_zoo_models_agree_between_the_backends() -> None:
    torch.manual_seed(0)
    x = np.random.default_rng(0).standard_normal((3, 2, 8, 8)).astype(np.float32)
    for model in (sequel.nn.MLP(128, (9, 7), 5), sequel.nn.CNN((2, 8, 8), 5, channels=(3, 4))):
        other = sequel.nn.to_jax(model)
        out = other.apply(other.params, jnp.asarray(x))
        np.testing.assert_allclose(out, model(torch.tensor(x)).detach().numpy(), atol=1e-5)
        back = sequel.nn.params_to_torch(model, other.params)
        for name, p in model.named_parameters():
            assert np.array_equal(back[name], p.detach().numpy())


def test_dropout_runs_under_jax() -> None:
    model = sequel.nn.to_jax(sequel.nn.MLP(64, (32,), 6, dropout=0.3))
    learner = sequel.Learner(model, optax.sgd(0.1), sequel.GEM(per_task=8), batch_size=8)
    result = learner.fit(small_scenario(2), epochs=3)
    assert result.losses[-1] < result.losses[0]
    again = sequel.Learner(model, optax.sgd(0.1), sequel.GEM(per_task=8), batch_size=8)
    assert again.fit(small_scenario(2), epochs=3).losses == result.losses
