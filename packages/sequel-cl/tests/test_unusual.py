"""Models, optimizers and numbers that are not the usual ones."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import sequel
from sequel import checkpoint
from sequel.fisher import fisher_diagonal

from .conftest import fit_quiet, small_learner, small_scenario


# ---------------------------------------------------------------------- Fisher
def in_place() -> nn.Module:
    """Few units: on some seeds all are active on the samples of the check, and not on others."""
    return nn.Sequential(nn.Linear(5, 2), nn.ReLU(inplace=True), nn.Linear(2, 3))


class Named(nn.Module):
    """Calls its layer by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Any) -> Any:
        return self.layer(input=x)


def pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(1, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Any) -> Any:
        return self.head(self.cell(x[..., None])[0][:, -1])


@pytest.mark.parametrize("make", [in_place, Named, pruned, Recurrent])
@pytest.mark.parametrize("kind", ["empirical", "output"])
def test_fisher_of_unusual_models_is_the_per_sample_loops(make: Any, kind: str) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        model = make().double()
        x, y = torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 3
        expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        for i in range(12):
            out = model(x[i : i + 1])
            loss = nn.functional.cross_entropy(out, y[i : i + 1])
            if kind == "output":
                loss = out.pow(2).sum()
            grads = torch.autograd.grad(loss, list(model.parameters()))
            for total, g in zip(expected.values(), grads, strict=True):
                total += (g.abs() if kind == "output" else g**2) / 12
        found = fisher_diagonal(model, [(x, y)], kind)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-13)


# --------------------------------------------------------------------- penalty
class Shared(nn.Module):
    """Autograd gives ``a`` and ``b`` one gradient tensor, and ``c`` one number, expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 6)
        self.a, self.b = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6))
        self.c = nn.Parameter(torch.ones(2, 3))
        self.register_buffer("first", torch.eye(6)[0])

    def forward(self, x: Any) -> Any:
        return self.layer(x.flatten(1)) + (self.a + self.b) + self.c.sum() * self.first


def test_the_penaltys_gradient_is_right_where_parameters_share_one() -> None:
    torch.manual_seed(0)
    model, scenario = Shared().double(), small_scenario(2)
    lr, lam = 0.05, 2.0
    optimizer = torch.optim.SGD(model.parameters(), lr)
    learner = sequel.Learner(model, optimizer, sequel.EWC(lam=lam), batch_size=8)
    learner.fit(scenario, 1, stop_after=1)
    omega, anchor = (learner.backend.state[key] for key in ("omega", "anchor"))
    for name in omega:
        omega[name] += torch.rand_like(omega[name])
        anchor[name] += torch.randn_like(anchor[name])
    data = scenario[1].train[np.arange(8)]
    named = dict(model.named_parameters())
    loss = nn.functional.cross_entropy(model(torch.tensor(data.x).double()), torch.tensor(data.y))
    loss = loss + lam / 2 * sum((omega[n] * (p - anchor[n]) ** 2).sum() for n, p in named.items())
    grads = torch.autograd.grad(loss, list(named.values()))
    expected = {n: p.detach() - lr * g for (n, p), g in zip(named.items(), grads, strict=True)}
    learner.observe(data.x, data.y, task=1)
    for name, value in expected.items():
        torch.testing.assert_close(named[name].detach(), value, rtol=1e-9, atol=1e-12)


# -------------------------------------------------------------------------- SI
class Changes(sequel.Callback):
    """Changes the optimizer's groups, or nothing, after the fifth step."""

    every_steps = 1

    def __init__(self, optimizer: Any, key: str, value: Any) -> None:
        self.optimizer, self.key, self.value = optimizer, key, value

    def on_after_training_step(self, learner: Any, **info: Any) -> None:
        if learner.global_step == 5:
            self.optimizer.param_groups[-1][self.key] = self.value


class KeepsOld(Changes):
    """The same; and SI keeps the old parameters and subtracts."""

    def on_before_optimizer_step(self, learner: Any, **info: Any) -> None: ...


@pytest.mark.parametrize(
    ("key", "value"), [("lr", 0.01), ("weight_decay", 0.3), ("nesterov", True), ("hook", None)]
)
def test_si_follows_an_optimizer_that_is_changed_within_a_task(key: str, value: Any) -> None:
    found = []
    for kind in (Changes, KeepsOld):
        torch.manual_seed(0)
        model = sequel.nn.MLP(64, (8,), 6).double()
        groups = [{"params": list(m.parameters())} for m in (model.encoder, model.classifier)]
        optimizer = torch.optim.SGD(groups, 0.05, momentum=0.9)
        if key == "hook":

            def limit(*_: Any, model: nn.Module = model) -> None:
                with torch.no_grad():
                    for p in model.parameters():
                        p.clamp_(-0.1, 0.1)

            optimizer.register_step_post_hook(limit)
        callback = kind(optimizer, key, value)
        learner = sequel.Learner(
            model, optimizer, sequel.SI(lam=5.0), batch_size=8, callbacks=[callback]
        )
        fit_quiet(learner, small_scenario(1), epochs=1)
        found.append(learner.backend.state["omega"])
    for name, omega in found[1].items():
        assert omega.max() > 0
        torch.testing.assert_close(found[0][name], omega, rtol=1e-9, atol=1e-12)


# ----------------------------------------------------------------- checkpoints
def test_numpys_numbers_survive_a_file(tmp_path: Path) -> None:
    scenario = small_scenario(2)
    algorithm = sequel.ER(memory=np.int64(20), policy="reservoir")
    assert algorithm == sequel.ER(memory=20, policy="reservoir")
    options: dict[str, Any] = {"seed": np.int64(3), "grad_clip": np.float32(1.5)}
    learner = small_learner(algorithm, scenario, **options)
    learner.fit(scenario, 1, stop_after=1)
    learner.save(tmp_path / "a.safetensors")
    model = small_learner(algorithm, scenario).backend.model.module
    again = sequel.Learner.load(
        tmp_path / "a.safetensors", model=model, optimizer=torch.optim.SGD(model.parameters(), 0.05)
    )
    again.setup(scenario)
    assert (again.seed, again.grad_clip, again.global_step) == (3, 1.5, learner.global_step)


def test_every_kind_of_array_is_read_back_by_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    rng = np.random.default_rng(0)
    tree: dict[str, Any] = {
        "scalar": np.array(2.5),
        "empty": np.zeros((3, 0, 2), np.float16),
        "bool": np.array([True, False, True]),
        "half": rng.normal(size=(3, 5)).astype(np.float16),
        "turned": rng.normal(size=(4, 6)).T,
        "every third": np.arange(20, dtype=np.int32)[::3],
        "bytes": np.arange(7, dtype=np.uint8),
        "big-endian": np.arange(4, dtype=">f8"),
        'quote " and ü': np.broadcast_to(np.float32(2), (3, 3)),
    }
    checkpoint.write(tmp_path / "a.safetensors", tree, {})
    for found in (
        load_file(tmp_path / "a.safetensors"),
        checkpoint.read(tmp_path / "a.safetensors")[0],
    ):
        assert set(found) == set(tree)
        for name, value in tree.items():
            assert found[name].dtype == value.dtype.newbyteorder("=")
            assert found[name].shape == value.shape
            assert np.array_equal(found[name], value)
    for bad in (np.array(1j), np.array(["a"]), np.array(1, dtype=np.longdouble)):
        if bad.dtype.kind == "f" and bad.dtype.itemsize == 8:
            continue  # a platform whose long double is a double
        with pytest.raises(TypeError, match=r"x has dtype .*, which a checkpoint cannot hold"):
            checkpoint.write(tmp_path / "b.safetensors", {"x": bad}, {})
    with pytest.raises(TypeError, match="a header holds JSON's types"):
        checkpoint.write(tmp_path / "b.safetensors", {}, {"x": object()})
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


# ----------------------------------------------------------------------- rest
@pytest.mark.parametrize("algorithm", [sequel.LwF(), sequel.GEM(per_task=5)], ids=str)
def test_bf16_models_train_with_methods_that_ask_the_host(algorithm: Any) -> None:
    torch.manual_seed(0)
    model, scenario = sequel.nn.MLP(64, (8,), 6).bfloat16(), small_scenario(2)
    learner = sequel.Learner(
        model, torch.optim.SGD(model.parameters(), 0.05), algorithm, batch_size=8
    )
    fit_quiet(learner, scenario, epochs=1)
    assert np.isfinite(learner.losses).all()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_evaluation_before_setup_says_what_is_missing() -> None:
    model = sequel.nn.MLP(64, (8,), 6)
    learner = sequel.Learner(model, torch.optim.SGD(model.parameters(), 0.05), sequel.Naive())
    for scenario in (None, small_scenario(2)):
        with pytest.raises(RuntimeError, match=r"call setup\(scenario\) before evaluate"):
            learner.evaluate(scenario)


@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize(
    "make", [lambda **k: sequel.EWC(3.0, **k), lambda **k: sequel.SI(3.0, **k),
             lambda **k: sequel.MAS(0.3, **k)], ids=["ewc", "si", "mas"],
)  # fmt: skip
def test_excluded_parameters_have_no_importance(make: Any, backend: str) -> None:
    found = []
    for exclude in (None, "bias|^classifier"):
        torch.manual_seed(0)
        model: Any = sequel.nn.MLP(64, (8,), 6)
        optimizer: Any = torch.optim.SGD(model.parameters(), 0.05)
        if backend == "jax":
            optax = pytest.importorskip("optax")
            model, optimizer = sequel.nn.to_jax(model), optax.sgd(0.05)
        learner = sequel.Learner(model, optimizer, make(exclude=exclude), batch_size=8)
        scenario = small_scenario(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            learner.fit(scenario, 1, stop_after=1)
        found.append({n: np.asarray(w) for n, w in learner.backend.state["omega"].items()})
    free = {n for n in found[0] if "bias" in n or n.startswith("classifier")}
    assert free
    assert len(free) < len(found[0])
    for name, omega in found[1].items():
        assert np.array_equal(omega, 0 * omega if name in free else found[0][name])
        assert found[0][name].max() > 0


def test_exclude_must_be_found_somewhere() -> None:
    with pytest.raises(ValueError, match="exclude must be a regular expression"):
        sequel.EWC(exclude="(")
    learner = small_learner(sequel.EWC(exclude="norm"), small_scenario(2))
    with pytest.raises(ValueError, match="exclude='norm' is found in no parameter's name"):
        learner.setup(small_scenario(2))
