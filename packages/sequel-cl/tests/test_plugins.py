"""L0 and L1 in a loop of one's own."""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import sequel
from sequel.fisher import fisher_diagonal
from sequel.testing import tiny_data

from .conftest import small_scenario


def batches(n: int = 48) -> Any:
    x, y, _, _ = tiny_data(n)
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    return [(x[i : i + 8], y[i : i + 8]) for i in range(0, n, 8)]


def train(model: nn.Module, plug: Any, how: str, opt: Any = None) -> None:
    opt = opt or torch.optim.SGD(model.parameters(), 0.05)
    for x, y in batches():
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        if how == "penalty":
            loss = loss + plug.penalty()
        loss.backward()
        if how == "add_grad":
            plug.add_grad_()
        opt.step()
        if how == "prox":
            plug.prox_(0.05)


@pytest.mark.parametrize("kind", [sequel.torch.EWC, sequel.torch.MAS])
def test_added_gradient_equals_the_penalty_in_the_loss(kind: Any) -> None:
    torch.manual_seed(0)
    base = sequel.nn.MLP(64, (12,), 6)
    results = []
    for how in ("penalty", "add_grad"):
        model = copy.deepcopy(base)
        plug = kind(model, lam=0.5)
        train(model, plug, "none")
        plug.consolidate(batches())
        assert plug.penalty().item() == 0.0
        train(model, plug, how)
        assert plug.penalty().item() > 0
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_plug_in_ewc_is_the_learners_ewc() -> None:
    """The same data order by hand: the plug-in and the Learner give the same parameters."""
    from sequel.rng import stream

    scenario = small_scenario(2)
    torch.manual_seed(0)
    model = sequel.nn.MLP(64, (16,), 6).double()
    mine = copy.deepcopy(model)
    learner = sequel.Learner(
        model, torch.optim.SGD(model.parameters(), 0.05), sequel.EWC(lam=2.0), batch_size=8
    )
    learner.fit(scenario)
    ewc, opt = sequel.torch.EWC(mine, lam=2.0), torch.optim.SGD(mine.parameters(), 0.05)
    for number, task in enumerate(scenario):
        x, y = torch.tensor(task.train.x), torch.tensor(task.train.y)
        order = torch.tensor(stream(0, "order", number, 0).permutation(len(y)))
        for at in range(0, len(y), 8):
            index = order[at : at + 8]
            opt.zero_grad()
            nn.functional.cross_entropy(mine(x[index]), y[index]).backward()
            ewc.add_grad_()
            opt.step()
        ewc.consolidate([(x, y)])
    for p, q in zip(model.parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_prox_is_stable_where_the_gradient_is_not() -> None:
    torch.manual_seed(0)
    model = sequel.nn.MLP(64, (12,), 6)
    ewc = sequel.torch.EWC(model, lam=1e6)
    train(model, ewc, "none")
    ewc.consolidate(batches())
    train(model, ewc, "prox")
    assert all(torch.isfinite(p).all() for p in model.parameters())
    with pytest.raises(ValueError, match="lr"):
        ewc.prox_(0.0)


def test_si_plug_in_is_the_learners_si() -> None:
    from sequel.rng import stream

    scenario = small_scenario(2)
    torch.manual_seed(0)
    model = sequel.nn.MLP(64, (16,), 6).double()
    mine = copy.deepcopy(model)
    learner = sequel.Learner(
        model, torch.optim.SGD(model.parameters(), 0.05), sequel.SI(lam=0.2), batch_size=8
    )
    learner.fit(scenario)
    si, opt = sequel.torch.SI(mine, lam=0.2), torch.optim.SGD(mine.parameters(), 0.05)
    with pytest.raises(RuntimeError, match="before_step"):
        si.after_step()
    for number, task in enumerate(scenario):
        x, y = torch.tensor(task.train.x), torch.tensor(task.train.y)
        order = torch.tensor(stream(0, "order", number, 0).permutation(len(y)))
        for at in range(0, len(y), 8):
            index = order[at : at + 8]
            opt.zero_grad()
            nn.functional.cross_entropy(mine(x[index]), y[index]).backward()
            si.before_step()
            si.add_grad_()
            opt.step()
            si.after_step()
        si.consolidate()
    for p, q in zip(model.parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    clipped = sequel.torch.SI(mine, clip_omega=1e-4)
    clipped.path.put({n: torch.ones_like(p) for n, p in clipped.current().items()})
    clipped.consolidate()
    assert max(float(w.max()) for w in clipped.omega.get().values()) == pytest.approx(1e-4)


def test_agem_plug_in_never_raises_the_replay_loss_to_first_order() -> None:
    torch.manual_seed(0)
    model = sequel.nn.MLP(64, (12,), 6)
    agem = sequel.torch.AGEM(model)
    (x, y), (xr, yr) = batches()[:2]

    def replay() -> torch.Tensor:
        return nn.functional.cross_entropy(model(xr), (yr + 1) % 6)

    nn.functional.cross_entropy(model(x), y).backward()
    agem.project_(replay)
    r = torch.autograd.grad(replay(), list(model.parameters()))
    inner = sum(float((p.grad * v).sum()) for p, v in zip(model.parameters(), r, strict=True))
    assert inner > -1e-6


def test_state_dict_names_and_round_trip() -> None:
    model = sequel.nn.MLP(64, (12,), 6)
    ewc = sequel.torch.EWC(model, lam=3.0)
    ewc.consolidate(batches())
    state = ewc.state_dict()
    assert "omega.encoder.1.weight" in state
    assert "anchor.classifier.bias" in state
    other = sequel.torch.EWC(copy.deepcopy(model), lam=3.0)
    other.load_state_dict(state)
    assert other.penalty().item() == ewc.penalty().item()
    assert "lam=3.0, 4 parameters" in repr(ewc)
    assert not any("encoder" in n for n, _ in ewc.named_parameters())  # the model is not inside


def test_growing_classifier_rows_get_no_importance() -> None:
    model = sequel.nn.MLP(64, (12,), 6)
    plugs = [sequel.torch.EWC(model, lam=1.0), sequel.torch.SI(model)]
    plugs[0].consolidate(batches())
    before = plugs[0].omega.get()["classifier.weight"].clone()
    wide = nn.Linear(12, 8)
    with torch.no_grad():
        wide.weight[:6], wide.bias[:6] = model.classifier.weight, model.classifier.bias
    model.classifier = wide
    for plug in plugs:
        assert plug.penalty().item() == 0.0
        model(torch.zeros(1, 64)).sum().backward()
        if isinstance(plug, sequel.torch.SI):
            plug.before_step()
        plug.add_grad_()
        omega = plug.omega.get()["classifier.weight"]
        assert omega.shape == (8, 12)
        assert float(omega[6:].abs().max()) == 0.0
    assert torch.equal(plugs[0].omega.get()["classifier.weight"][:6], before)
    plugs[0].consolidate(batches())
    plugs[1].consolidate()


def test_frozen_and_low_rank_parameters_only() -> None:
    class Lora(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(64, 6).requires_grad_(False)
            self.lora_A = nn.Parameter(0.1 * torch.randn(4, 64))
            self.lora_B = nn.Parameter(0.1 * torch.randn(6, 4))

        def forward(self, x: Any) -> Any:
            x = x.flatten(1)
            return self.base(x) + x @ self.lora_A.T @ self.lora_B.T

    model = Lora()
    ewc = sequel.torch.EWC(model, lam=1.0)
    assert ewc.names == ["lora_A", "lora_B"]
    only = sequel.torch.MAS(model, params=lambda n, p: n == "lora_B")
    ewc.consolidate(batches())
    only.consolidate(batches(), forward=lambda m, x: m(x))
    assert set(only.omega.get()) == {"lora_B"}
    assert float(ewc.omega.get()["lora_A"].max()) > 0
    with pytest.raises(ValueError, match="selects no parameter"):
        sequel.torch.EWC(model, params=lambda n, p: False)


def test_modes_of_consolidation() -> None:
    model = sequel.nn.MLP(64, (8,), 6)
    for mode in ("online", "last"):
        ewc = sequel.torch.EWC(model, mode=mode, gamma=0.5)
        ewc.consolidate(batches())
        first = ewc.omega.get()["classifier.bias"].clone()
        ewc.consolidate(batches())
        factor = 1.5 if mode == "online" else 1.0
        torch.testing.assert_close(ewc.omega.get()["classifier.bias"], factor * first)
    mas = sequel.torch.MAS(model, accumulate="ema", alpha=0.5)
    mas.consolidate(batches())
    full = sequel.torch.MAS(model)
    full.consolidate(batches())
    torch.testing.assert_close(
        2 * mas.omega.get()["classifier.bias"], full.omega.get()["classifier.bias"]
    )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda m: sequel.torch.EWC(m, lam=-1.0), "lam"),
        (lambda m: sequel.torch.EWC(m, gamma=2.0), "gamma"),
        (lambda m: sequel.torch.SI(m, xi=0.0), "xi"),
        (lambda m: sequel.torch.MAS(m, accumulate="max"), "accumulate"),
        (lambda m: fisher_diagonal(m, [], "empirical"), "no samples"),
        (lambda m: fisher_diagonal(m, [], "exact"), "kind"),
        (lambda m: fisher_diagonal(m, [], temperature=0.0), "temperature"),
    ],
)
def test_bad_input_is_named(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make(nn.Linear(2, 2))


def test_autocast_loop_stays_finite() -> None:
    model = sequel.nn.MLP(64, (12,), 6)
    ewc = sequel.torch.EWC(model, lam=1.0)
    ewc.consolidate(batches())
    opt = torch.optim.SGD(model.parameters(), 0.05)
    for x, y in batches():
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        (loss + ewc.penalty()).backward()
        opt.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert ewc.omega.get()["classifier.weight"].dtype == torch.float32


def test_gradient_accumulation_adds_the_penalty_once() -> None:
    model = sequel.nn.MLP(64, (12,), 6)
    ewc = sequel.torch.EWC(model, lam=1.0)
    ewc.consolidate(batches())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    for x, y in batches()[:2]:
        nn.functional.cross_entropy(model(x), y).backward()
    before = model.classifier.bias.grad.clone()
    ewc.add_grad_()
    expected = before + ewc.omega.get()["classifier.bias"] * 0.1
    torch.testing.assert_close(model.classifier.bias.grad, expected, rtol=1e-5, atol=1e-7)


def _finish(path: Path, value: Any) -> None:
    """Write a rank's result and leave at once: gloo's teardown may abort on a loaded machine."""
    torch.save(value, path)
    torch.distributed.barrier()
    os._exit(0)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(sequel.nn.MLP(64, (12,), 6).double())
    ewc = sequel.torch.EWC(model, lam=1.0)
    data = [(x.double(), y) for x, y in batches()]
    ewc.consolidate(data[rank::2])
    omega = {
        k.removeprefix("omega.module."): v
        for k, v in ewc.state_dict().items()
        if k.startswith("omega")
    }
    grads = _agem_grads(slice(rank, None, 2), parallel=True)
    _finish(Path(folder) / f"{rank}.pt", {"omega": omega, "grads": grads})


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two processes found: starting them is what takes the time."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_fisher_over_two_ranks_equals_one_process(ranks: Any) -> None:
    torch.manual_seed(0)
    model = sequel.nn.MLP(64, (12,), 6).double()
    alone = fisher_diagonal(model, [(x.double(), y) for x, y in batches()])
    for found in (rank["omega"] for rank in ranks):
        assert set(found) == set(alone)
        for name in alone:
            torch.testing.assert_close(found[name], alone[name], rtol=1e-12, atol=1e-15)


def test_channels_last_inputs_give_the_same_fisher() -> None:
    model = sequel.nn.CNN((3, 6, 6), 4, channels=(4,)).double()
    x, y = torch.randn(8, 3, 6, 6).double(), torch.arange(8) % 4
    a = fisher_diagonal(model, [(x, y)])
    b = fisher_diagonal(model, [(x.to(memory_format=torch.channels_last), y)])
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-12, atol=1e-15)


def test_gem_in_a_loop_of_its_own() -> None:
    rng = np.random.default_rng(0)
    g, G = torch.tensor(rng.standard_normal(30)), torch.tensor(rng.standard_normal((3, 30)))
    out = sequel.functional.gem_project(g, G, margin=0.0, ridge=0.0)
    assert float((G @ out).min()) > -1e-9


def _agem_grads(rows: slice, *, parallel: bool) -> Any:
    torch.manual_seed(0)
    net = nn.Linear(5, 3).double()
    x, y = torch.randn(16, 5).double(), torch.arange(16) % 3
    old = (y + 1) % 3  # labels that contradict those of the batch
    model: nn.Module = nn.parallel.DistributedDataParallel(net) if parallel else net
    nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
    sequel.torch.AGEM(net).project_(lambda: nn.functional.cross_entropy(net(x[rows]), old[rows]))
    return {name: p.grad for name, p in net.named_parameters()}


def test_agem_over_two_ranks_equals_one_process(ranks: Any) -> None:
    alone = _agem_grads(slice(None), parallel=False)
    for rank in ranks:
        for name, value in alone.items():
            torch.testing.assert_close(rank["grads"][name], value, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_importances_of_16_bit_models_are_float32(dtype: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).to(dtype)
    x, y = (1e-3 * torch.randn(40, 4)).to(dtype), torch.arange(40) % 3  # squares vanish in float16
    ewc = sequel.torch.EWC(model, lam=3.0)
    ewc.consolidate([(x, y)])
    omega = ewc.omega.get()["weight"]
    # The closed form in float64 from the same 16-bit weights: mean of (p - e_y)² x².
    p = (x.double() @ model.weight.double().T + model.bias.double()).softmax(-1)
    delta = p - nn.functional.one_hot(y, 3)
    exact = (delta**2).T @ (x.double() ** 2) / 40
    assert omega.dtype == torch.float32
    assert (omega > 0).all()
    torch.testing.assert_close(omega.double(), exact, rtol=0.02, atol=0)  # gradients have 8 bits
    with torch.no_grad():
        model.weight.add_(1.0)
    ewc.penalty().backward()
    wanted = model.weight.grad.clone()
    model.zero_grad()
    ewc.add_grad_()
    assert model.weight.grad.dtype == dtype
    torch.testing.assert_close(model.weight.grad, wanted)
    ewc.prox_(0.1)


@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize(
    "algorithm", [sequel.EWC(lam=2.0), sequel.SI(lam=0.1), sequel.EWC(lam=2.0, apply="prox")]
)
def test_learners_of_16_bit_models_keep_float32_importances(backend: str, algorithm: Any) -> None:
    x, y = np.random.default_rng(0).normal(size=(60, 4)), np.arange(60) % 4
    scenario = sequel.scenarios.class_incremental((x, y, x, y), 2)
    torch.manual_seed(0)
    model: Any = sequel.nn.MLP(4, (6,), 4)
    if backend == "jax":
        jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
        model = sequel.nn.to_jax(model)
        params = jax.tree_util.tree_map(lambda p: p.astype("bfloat16"), model.params)
        model = dataclasses.replace(model, params=params)
        one = sequel.Learner(model, optax.sgd(0.05, momentum=0.9), algorithm, lr=0.05)
    else:
        model = model.bfloat16()
        one = sequel.Learner(
            model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), algorithm
        )
    one.fit(scenario, epochs=2)
    for name in one.backend.params:
        assert "bfloat16" in str(one.backend.params[name].dtype)
        assert "float32" in str(one.backend.state["omega"][name].dtype)
        assert float(one.backend.state["omega"][name].sum()) > 0
    if backend == "jax":
        assert one.backend.traces == 1


def test_a_state_of_before_the_growth_is_loaded_after_it() -> None:
    model = nn.Linear(4, 3).double()
    ewc = sequel.torch.EWC(model, lam=2.0)
    ewc.consolidate([(torch.randn(12, 4).double(), torch.arange(12) % 3)])
    saved, omega = ewc.state_dict(), ewc.omega.get()["weight"]
    old = model.weight.detach().clone()
    model.weight = nn.Parameter(torch.cat([old + 1, torch.ones(2, 4).double()]))
    model.bias = nn.Parameter(torch.cat([model.bias.detach(), torch.ones(2).double()]))
    again = sequel.torch.EWC(model, lam=2.0)
    again.load_state_dict(saved)
    assert again.penalty().item() == pytest.approx(omega.sum().item(), rel=1e-12)
    model.weight = nn.Parameter(torch.zeros(2, 4).double())
    with pytest.raises(ValueError, match=r"weight has shape \(2, 4\), its importance \(5, 4\)"):
        again.penalty()


def test_the_gradient_is_added_in_place() -> None:
    model = nn.Linear(4, 3)
    ewc = sequel.torch.EWC(model)
    model(torch.ones(2, 4)).sum().backward()
    before = model.weight.grad
    ewc.add_grad_()
    assert model.weight.grad is before  # DDP's gradients are views of its buckets


def test_loaders_and_models_that_fisher_cannot_use_are_named() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"must yield \(x, y\) batches, got dict"):
        fisher_diagonal(model, [{"x": torch.ones(2, 2), "labels": torch.tensor([0, 1])}])
    with pytest.raises(ValueError, match="no parameter that requires gradients"):
        fisher_diagonal(model.requires_grad_(False), [(torch.ones(2, 2), torch.tensor([0, 1]))])
