"""Options of a Learner: float16, where the data are, determinism, and learners made from files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sequel
from sequel import checkpoint
from sequel.backends.preload import wanted
from sequel.backends.scaling import LossScale, deterministic
from sequel.ops.torch import TorchOps
from sequel.testing import tiny_data

from .conftest import fit_quiet, small_learner, small_scenario


def weights(learner: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in learner.backend.params.values()])


# ---------------------------------------------------------------------- float16
@pytest.mark.parametrize(
    "algorithm", [sequel.EWC(lam=1.0), sequel.DERpp(memory=20), sequel.AGEM(per_task=10)], ids=str
)
def test_fp16_trains_as_float32_does_up_to_its_rounding(algorithm: Any) -> None:
    scenario, found = small_scenario(2), []
    for amp in (None, "fp16"):
        learner = small_learner(algorithm, scenario, amp=amp)
        fit_quiet(learner, scenario, epochs=2)
        found.append(weights(learner))
    start = weights(small_learner(algorithm, scenario))
    moved = (found[0] - start).norm()
    assert 0 < (found[1] - found[0]).norm() < 0.05 * moved  # 46 steps of rounding to 11 bits
    for tree in (v for k, v in learner.backend.state.items() if k in ("omega", "anchor")):
        assert {v.dtype for v in tree.values()} == {torch.float32}


def test_an_overflowing_fp16_step_is_left_out_and_halves_the_scale() -> None:
    scenario = small_scenario(2)
    learner = small_learner(sequel.ER(memory=20, policy="reservoir"), scenario, amp="fp16")
    learner.setup(scenario)
    learner.backend.scale.value = 2.0**40  # no float16 gradient survives it
    before = weights(learner)
    row = scenario[0].train
    loss = learner.observe(row.x[:8], row.y[:8])
    assert np.isfinite(loss)
    assert torch.equal(weights(learner), before)
    assert learner.backend.scale.value == 2.0**39
    assert len(learner.slots) == 0
    assert not learner.backend.state["memory"]["x"].any()
    learner.backend.scale.value = 2.0**10
    learner.observe(row.x[:8], row.y[:8])
    assert not torch.equal(weights(learner), before)
    assert len(learner.slots) == 8
    assert bool(learner.backend.state["memory"]["x"][:8].flatten(1).any(1).all())


def test_fp16_divides_the_scale_out_of_every_gradient() -> None:
    ops, params = TorchOps(), {"w": torch.tensor([1.5, -2.0], requires_grad=True)}
    ops.loss_scale = 2.0**20

    def fn(p: Any) -> Any:
        return (p["w"] ** 3).sum(), None

    (value, _), grads = ops.value_and_grad(fn, params)
    assert value.item() == 1.5**3 - 8.0
    assert grads["w"].tolist() == [3 * 1.5**2, 12.0]
    (_, _), unused = ops.value_and_grad(fn, {**params, "v": torch.zeros(2, requires_grad=True)})
    assert unused["v"].tolist() == [0.0, 0.0]


def test_loss_scale_follows_the_rule_of_torchs_scaler() -> None:
    ours, theirs = LossScale(), torch.amp.GradScaler("cpu")
    p = torch.nn.Parameter(torch.zeros(1))
    opt = torch.optim.SGD([p], 0.0)
    rng = np.random.default_rng(0)
    theirs.set_growth_interval(4)
    ours.every = 4  # type: ignore[misc]
    for _ in range(60):
        finite = rng.random() < 0.8
        theirs.scale(p.sum()).backward()
        assert theirs.get_scale() == ours.value
        if not finite:
            p.grad.fill_(float("inf"))  # type: ignore[union-attr]
        theirs.step(opt)
        theirs.update()
        ours.grow() if finite else ours.shrink()
        opt.zero_grad()
    assert theirs.get_scale() == ours.value
    ours.value = ours.least
    with pytest.raises(FloatingPointError, match="any loss scale"):
        ours.shrink()


def test_fp16_resumes_with_its_scale_bit_by_bit(tmp_path: Path) -> None:
    scenario = small_scenario(2)
    whole = small_learner(sequel.SI(lam=1.0), scenario, amp="fp16")
    whole.setup(scenario)
    whole.backend.scale.every = 5  # grows within the test
    fit_quiet(whole, scenario, epochs=1)
    first = small_learner(sequel.SI(lam=1.0), scenario, amp="fp16")
    first.setup(scenario)
    first.backend.scale.every = 5
    fit_quiet(first, scenario, epochs=1, stop_after=1)
    first.save(tmp_path / "a.safetensors")
    second = small_learner(sequel.SI(lam=1.0), scenario, amp="fp16")
    second.setup(scenario)
    second.backend.scale.every = 5
    second.load(tmp_path / "a.safetensors")
    assert second.backend.scale.value > 2.0**16
    fit_quiet(second, scenario, epochs=1)
    assert torch.equal(weights(second), weights(whole))
    assert second.backend.scale.array().tolist() == whole.backend.scale.array().tolist()


def test_amp_is_not_for_jax() -> None:
    pytest.importorskip("jax")
    import optax

    with pytest.raises(ValueError, match="amp='fp16' is PyTorch's"):
        sequel.Learner(
            sequel.nn.to_jax(sequel.nn.MLP(4, (4,), 2)), optax.sgd(0.1), sequel.Naive(), amp="fp16"
        )


@pytest.mark.gpu
def test_fp16_and_determinism_on_cuda() -> None:  # pragma: no cover - needs a GPU
    found = []
    for _ in range(2):
        scenario = small_scenario(2)
        learner = small_learner(sequel.DERpp(memory=20), scenario, amp="fp16", device="cuda")
        result = fit_quiet(learner, scenario, epochs=3)
        found.append(weights(learner))
    assert torch.equal(found[0], found[1])
    assert result.matrix.max() > 0.5


# ---------------------------------------------------------------------- preload
@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize(
    "algorithm", [sequel.ER(memory=20, policy="reservoir"), sequel.MCSGD(per_task=10)], ids=str
)
def test_rows_brought_step_by_step_change_nothing(backend: str, algorithm: Any) -> None:
    scenario, found = small_scenario(2), []
    for preload in (True, False):
        if backend == "torch":
            learner = small_learner(algorithm, scenario, preload=preload)
        else:
            optax = pytest.importorskip("optax")
            torch.manual_seed(0)
            model = sequel.nn.to_jax(sequel.nn.MLP(64, (16, 16), scenario.n_classes))
            learner = sequel.Learner(
                model, optax.sgd(0.05), algorithm, batch_size=8, preload=preload, scan_steps=4
            )
        fit_quiet(learner, scenario, epochs=1)
        assert (learner.backend.host is None) is preload
        assert bool(learner.backend.data) is preload
        found.append({k: np.asarray(v) for k, v in learner.backend.arrays()["params"].items()})
        if backend == "jax":
            assert learner.backend.traces <= 2
    for name in found[0]:
        np.testing.assert_array_equal(found[0][name], found[1][name])


def test_preload_auto_takes_at_most_half_of_what_is_free() -> None:
    data = small_scenario(1)[0].train
    size = data.x.nbytes + data.y.nbytes + data.t.nbytes
    assert wanted("auto", data, lambda: 2.0 * size)
    assert not wanted("auto", data, lambda: 2.0 * size - 1)
    assert wanted(True, data, lambda: 0.0)
    assert not wanted(False, data, lambda: float("inf"))
    with pytest.raises(ValueError, match="preload"):
        small_learner(sequel.Naive(), small_scenario(1), preload="disk")


# ---------------------------------------------------------------- deterministic
def test_deterministic_sets_pytorchs_switches_for_cuda_and_puts_them_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    def switches() -> tuple[bool, ...]:
        cudnn = torch.backends.cudnn
        on = torch.are_deterministic_algorithms_enabled()
        fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        return on, cudnn.deterministic, cudnn.benchmark, fill

    before = switches()
    with deterministic("cuda"):
        assert switches() == (True, True, False, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert switches() == before
    with pytest.raises(RuntimeError, match="inside"), deterministic("cuda"):
        raise RuntimeError("inside")
    assert switches() == before
    with deterministic("cpu"):
        assert switches() == before


def test_a_learner_asks_for_determinism_only_where_it_is_wanted() -> None:
    for wanted_, device in ((True, "cuda"), (False, "cuda"), (True, "cpu")):
        learner = small_learner(sequel.Naive(), small_scenario(1), deterministic=wanted_)
        learner.backend.ops.device = torch.device(device)
        with learner.reproducible():
            on = torch.are_deterministic_algorithms_enabled()
        assert on is (wanted_ and device == "cuda")


# ------------------------------------------------------------- learners of files
@dataclass(frozen=True)
class Mine(sequel.Algorithm):
    factor: float = 1.0


def test_a_learner_is_made_from_a_file_and_goes_on(tmp_path: Path) -> None:
    scenario = small_scenario(3)
    algorithm = sequel.DERpp(memory=15, alpha=0.3)
    options = {"grad_clip": 0.5, "lr_decay": 0.9, "seed": 4, "eval_every": 7}
    whole = small_learner(algorithm, scenario, **options)
    fit_quiet(whole, scenario, epochs=1)
    first = small_learner(algorithm, scenario, **options)
    fit_quiet(first, scenario, epochs=1, stop_after=1)
    first.save(tmp_path / "a.safetensors")

    model = sequel.nn.MLP(64, (16, 16), scenario.n_classes)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    made = sequel.Learner.load(tmp_path / "a.safetensors", model=model, optimizer=optimizer)
    assert made.algorithm == algorithm
    assert (made.grad_clip, made.lr_decay, made.seed, made.batch_size) == (0.5, 0.9, 4, 8)
    result = fit_quiet(made, scenario, epochs=1)
    assert torch.equal(weights(made), weights(whole))
    np.testing.assert_array_equal(result.matrix, whole.matrix)
    assert result.anytime == whole.anytime


def test_what_a_file_cannot_hold_must_be_given(tmp_path: Path) -> None:
    scenario = small_scenario(2)
    own = small_learner(Mine(2.0), scenario, loss=lambda ops, logits, y: ops.nll(logits, y))
    own.setup(scenario)
    own.save(tmp_path / "a.safetensors")
    model = sequel.nn.MLP(64, (16, 16), scenario.n_classes)
    given: dict[str, Any] = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.05)}
    with pytest.raises(ValueError, match="algorithm must be given: 'mine'"):
        sequel.Learner.load(tmp_path / "a.safetensors", **given)
    with pytest.raises(ValueError, match="loss must be given"):
        sequel.Learner.load(tmp_path / "a.safetensors", algorithm=Mine(2.0), **given)
    made = sequel.Learner.load(
        tmp_path / "a.safetensors", algorithm=Mine(3.0), loss="cross_entropy", **given
    )
    with pytest.raises(RuntimeError, match="of another run"):
        made.setup(scenario)


def test_the_best_task_is_kept_beside_the_newest_files(tmp_path: Path) -> None:
    scenario = sequel.scenarios.class_incremental(tiny_data(), 3)
    learner = small_learner(
        sequel.Naive(), scenario, callbacks=[sequel.Checkpoint(tmp_path, keep=1, best=True)]
    )
    result = fit_quiet(learner, scenario, epochs=4)
    means = [result.matrix[t, : t + 1].mean() for t in range(3)]
    tree, header = checkpoint.read(tmp_path / "best.safetensors")
    assert header["best"] == pytest.approx(max(means))
    assert header["position"]["task"] == int(np.argmax(means)) + 1 < 3  # fine-tuning forgets
    assert len(list(tmp_path.glob("step-*"))) == 1
    again = small_learner(sequel.Naive(), scenario)
    again.setup(scenario)
    again.restore(tree, header)
    np.testing.assert_allclose(again.evaluate()[: np.argmax(means) + 1].mean(), max(means))


def test_a_damaged_best_file_is_replaced_with_a_warning(tmp_path: Path) -> None:
    scenario, path = small_scenario(1), tmp_path / "best.safetensors"
    path.write_bytes(b"damaged")
    learner = small_learner(
        sequel.Naive(), scenario, callbacks=[sequel.Checkpoint(tmp_path, best=True)]
    )
    with pytest.warns(RuntimeWarning, match="not a whole checkpoint.*; it is replaced"):
        result = learner.fit(scenario)
    assert checkpoint.read(path)[1]["best"] == result.acc
