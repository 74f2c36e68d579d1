"""The loop: bad input, hooks, online use, options, results."""

from __future__ import annotations

import copy
import io
import json
import pickle
import shutil
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sequel
from sequel import metrics
from sequel.callbacks import HOOKS
from sequel.testing import tiny_data

from .conftest import fit_quiet, small_learner, small_scenario


def test_training_learns_and_the_matrix_has_its_shape() -> None:
    scenario = small_scenario(3)
    result = small_learner(sequel.Naive(), scenario).fit(scenario, epochs=9)
    assert result.matrix.shape == (3, 3)
    assert np.diag(result.matrix).min() > 0.8
    assert result.summary()["acc"] == round(metrics.acc(result.matrix), 12)
    assert len(result.losses) == 3 * 9 * 12
    assert result.fwt == pytest.approx(metrics.fwt(result.matrix, result.initial))


def test_same_seed_same_run_and_evaluation_changes_nothing() -> None:
    def run(eval_every: int | None, seed: int = 0) -> Any:
        scenario = small_scenario(2)
        torch.manual_seed(0)
        model = sequel.nn.MLP(64, (16,), 6, dropout=0.3)
        learner = sequel.Learner(
            model, torch.optim.SGD(model.parameters(), 0.05), sequel.ER(memory=20),
            batch_size=8, eval_every=eval_every, seed=seed,
        )  # fmt: skip
        result = learner.fit(scenario, epochs=1)
        return torch.cat([p.detach().flatten() for p in model.parameters()]), result

    a, _ = run(None)
    b, result = run(5)
    c, _ = run(None, seed=1)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert len(result.anytime) == 4
    assert 0 <= result.summary()["min_acc"] <= 1


def test_fit_leaves_the_global_generator_alone() -> None:
    scenario = small_scenario(2)
    learner = small_learner(sequel.Naive(), scenario)
    before = torch.get_rng_state()
    learner.fit(scenario)
    assert torch.equal(before, torch.get_rng_state())


def test_stop_after_and_going_on_equals_one_run() -> None:
    scenario = small_scenario(3)
    one, two = (small_learner(sequel.SI(lam=0.1), scenario) for _ in range(2))
    a = one.fit(scenario, epochs=[1, 2, 1])
    part = two.fit(scenario, epochs=[1, 2, 1], stop_after=2)
    assert part.done.shape == (2, 2)
    b = two.fit(scenario, epochs=[1, 2, 1])
    assert (a.matrix == b.matrix).all()
    assert a.losses == b.losses


def test_hooks_are_called_in_order() -> None:
    seen: list[str] = []

    class Spy(sequel.Callback):
        pass

    for hook in HOOKS:
        setattr(Spy, hook, lambda self, learner, _h=hook, **info: seen.append(_h))
    scenario = small_scenario(2, n=16)
    small_learner(sequel.Naive(), scenario, callbacks=[Spy()]).fit(scenario)
    assert seen[:3] == ["on_before_setup", "on_after_setup", "on_before_fit"]
    at = seen.index("on_before_training_step")
    assert seen[at : at + 6] == [
        "on_before_training_step", "on_before_backward", "on_after_backward",
        "on_before_optimizer_step", "on_after_optimizer_step", "on_after_training_step",
    ]  # fmt: skip
    assert seen[-1] == "on_after_teardown"
    assert seen.count("on_after_training_step") == 4
    with pytest.raises(AttributeError):
        _ = sequel.Callback().on_no_such_hook


def test_default_callbacks_are_not_shared() -> None:
    scenario = small_scenario(2)
    one, two = (small_learner(sequel.Naive(), scenario) for _ in range(2))
    one.callbacks.append(sequel.Progress())
    assert two.callbacks == []


def test_progress_draws_a_line_per_task() -> None:
    scenario, stream = small_scenario(2), io.StringIO()
    learner = small_learner(sequel.Naive(), scenario, callbacks=[sequel.Progress(stream, 10)])
    learner.fit(scenario)
    assert stream.getvalue().count("accuracy") == 2
    assert "task 2/2 [##########]" in stream.getvalue()


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_observe_is_online_training(backend: str) -> None:
    scenario = sequel.scenarios.task_incremental(tiny_data(), 3)
    torch.manual_seed(0)
    model = sequel.nn.MLP(64, (16,), 6)
    if backend == "jax":
        optax = pytest.importorskip("optax")
        learner = sequel.Learner(
            sequel.nn.to_jax(model), optax.sgd(0.1), sequel.DER(memory=20), batch_size=8
        )
    else:
        learner = small_learner(sequel.DER(memory=20), scenario)
    with pytest.raises(RuntimeError, match="setup"):
        learner.observe(np.zeros((1, 64)), [0])
    learner.setup(scenario)
    data = scenario[1].train
    losses = [learner.observe(data.x[:8], data.y[:8], task=1) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(ValueError, match="task must be given"):
        learner.observe(data.x[:8], data.y[:8])
    with pytest.raises(ValueError, match="batch_size=8, got 9"):
        learner.observe(data.x[:9], data.y[:9], task=1)
    scores = learner.predict(data.x[:4], task=1)
    assert set(scores.argmax(1).tolist()) <= set(scenario[1].classes)
    with pytest.raises(ValueError, match="task must be given"):
        learner.predict(data.x[:4])


@pytest.mark.parametrize("mode", ["raise", "warn", "skip"])
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_loss_that_is_not_finite_is_told(mode: str, backend: str) -> None:
    x, y, xt, yt = tiny_data()
    x = x.copy()
    x[5] = np.nan
    scenario = sequel.scenarios.permuted((x, y, xt, yt), 2)
    model = sequel.nn.MLP(64, (8,), 6)
    if backend == "jax":
        optax = pytest.importorskip("optax")
        learner = sequel.Learner(
            sequel.nn.to_jax(model), optax.sgd(0.05), sequel.Naive(), batch_size=8, nan=mode
        )
    else:
        learner = small_learner(sequel.Naive(), scenario, nan=mode)
    if mode == "raise":
        with pytest.raises(FloatingPointError, match=r"loss is nan in task 0, epoch 0, step \d+"):
            learner.fit(scenario)
        return
    with pytest.warns(RuntimeWarning, match="the loss is nan"):
        learner.fit(scenario)
    finite = all(
        np.isfinite(np.asarray(v)).all() for v in learner.backend.arrays()["params"].values()
    )
    assert finite == (mode == "skip")


def test_bad_input_is_named() -> None:
    scenario = small_scenario(2)
    model = sequel.nn.MLP(64, (8,), 6)

    def make(algorithm: Any = sequel.Naive(), optimizer: Any = None, **kw: Any) -> Any:  # noqa: B008
        return sequel.Learner(
            model, optimizer or torch.optim.SGD(model.parameters(), 0.1), algorithm, **kw
        )

    other = nn.Linear(2, 2)
    part = list(model.parameters())[:1]
    with pytest.raises(ValueError, match="exactly the model's trainable parameters"):
        make(optimizer=torch.optim.SGD(other.parameters(), 0.1))
    with pytest.raises(ValueError, match="missing"):
        make(optimizer=torch.optim.SGD(part, 0.1))
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got 0"):
        make(batch_size=0)
    with pytest.raises(ValueError, match="nan must be one of"):
        make(nan="ignore")
    with pytest.raises(ValueError, match="loss must be"):
        make(loss="mse")
    with pytest.raises(TypeError, match="must be a sequel Algorithm, got str"):
        make("ewc")
    with pytest.raises(ValueError, match="grad_clip"):
        make(grad_clip=-1.0)
    with pytest.raises(ValueError, match="epochs must be"):
        make().fit(scenario, epochs=[1])
    learner = make()
    learner.setup(scenario)
    learner.setup(scenario)
    with pytest.raises(RuntimeError, match="another scenario"):
        learner.setup(small_scenario(2))
    for call in ("fit_task", "predict", "restore"):
        with pytest.raises(RuntimeError, match="setup"):
            getattr(make(), call)(*([{}, {}] if call == "restore" else [0]))
    with pytest.raises(RuntimeError, match="setup"):
        make().state_dict()
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 6))
    with pytest.raises(TypeError, match="needs an encoder"):
        sequel.Learner(plain, torch.optim.SGD(plain.parameters(), 0.1), sequel.LFL()).fit(scenario)
    named = sequel.Learner(
        plain, torch.optim.SGD(plain.parameters(), 0.1), sequel.LFL(), features="0"
    )
    assert named.fit(scenario).matrix.shape == (2, 2)
    sequel.torch.EWC(model)
    with pytest.raises(RuntimeError, match="already carries a penalty"):
        make()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: sequel.EWC(lam=-1.0), "lam must be a finite number >= 0"),
        (lambda: sequel.EWC(lam=float("nan")), "lam"),
        (lambda: sequel.EWC(gamma=1.5), r"gamma must lie in \[0.0, 1.0\], got 1.5"),
        (lambda: sequel.EWC(temperature=0.0), "temperature"),
        (lambda: sequel.EWC(n_samples=0), "n_samples"),
        (lambda: sequel.EWC(mode="all"), "mode"),
        (lambda: sequel.EWC(fisher="exact"), "fisher"),
        (lambda: sequel.SI(xi=0.0), "xi must be a finite number > 0"),
        (lambda: sequel.SI(clip_omega=-1.0), "clip_omega"),
        (lambda: sequel.MAS(alpha=-0.1), "alpha"),
        (lambda: sequel.LwF(temperature=0.0), "temperature"),
        (lambda: sequel.LwF(alpha=-1.0), "alpha"),
        (lambda: sequel.LFL(lam=-1.0), "lam"),
        (lambda: sequel.ER(memory=0), "memory must be an integer >= 1, got 0"),
        (lambda: sequel.ER(replay_batch=0), "replay_batch"),
        (lambda: sequel.ER(policy="lifo"), "policy"),
        (lambda: sequel.DER(alpha=-1.0), "alpha"),
        (lambda: sequel.DER(replay_batch=0), "replay_batch"),
        (lambda: sequel.DERpp(beta=-1.0), "beta"),
        (lambda: sequel.AGEM(per_task=0), "per_task"),
        (lambda: sequel.AGEM(clip="never"), "clip"),
        (lambda: sequel.GEM(margin=-1.0), "margin"),
        (lambda: sequel.MCSGD(init_position=2.0), "init_position"),
        (lambda: sequel.LaMAML(glances=0), "glances"),
        (lambda: sequel.ICaRL(memory=0), "memory"),
        (lambda: sequel.KCL(kernel="cubic"), "kernel"),
        (lambda: sequel.functional.gem_dual(np.eye(1), np.ones(1), margin=-1.0), "margin"),
        (lambda: sequel.functional.herding(np.eye(2), 0), "k"),
        (lambda: sequel.functional.reservoir_slots(0, 1, 0, np.random.default_rng()), "capacity"),
    ],
)  # fmt: skip
def test_hyper_parameters_are_checked(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_memory_larger_than_the_data_warns_and_keeps_all() -> None:
    scenario = small_scenario(2)
    learner = small_learner(sequel.ER(memory=1000), scenario)
    with (
        pytest.warns(UserWarning, match="larger than the 180"),
        pytest.warns(UserWarning, match="keeps them all"),
    ):
        learner.fit(scenario)
    assert len(learner.slots) == 180


def test_a_coreset_that_leaves_nothing_is_refused() -> None:
    scenario = sequel.scenarios.task_incremental(tiny_data(), 3)
    with pytest.raises(ValueError, match="coreset=30 leaves nothing of a task of 30"):
        small_learner(sequel.KCL(coreset=30, features=8), scenario).fit(scenario)


def test_large_lam_warns_once_and_prox_is_stable() -> None:
    scenario = small_scenario(3)
    learner = small_learner(sequel.EWC(lam=1e6), scenario, nan="warn")
    with pytest.warns(RuntimeWarning, match=r"lr \* lam \* max\(omega\)"):
        learner.fit(scenario, epochs=1, stop_after=1)
    result = small_learner(sequel.EWC(lam=1e6, apply="prox"), scenario).fit(scenario, epochs=2)
    assert np.isfinite(result.losses).all()
    assert result.forgetting < 0.05  # nothing important moves


def test_algorithms_survive_pickle_deepcopy_and_hash() -> None:
    for kind in sequel.ALGORITHMS.values():
        algorithm = kind()
        assert pickle.loads(pickle.dumps(algorithm)) == algorithm == copy.deepcopy(algorithm)
        assert isinstance(hash(algorithm), int)
        assert all(not hasattr(getattr(algorithm, f.name), "shape") for f in fields(algorithm))  # type: ignore[arg-type]


def test_current_model_keeps_its_mode_under_lfl() -> None:
    model = nn.Module()
    model.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.5))  # type: ignore[assignment]
    model.classifier = nn.Linear(8, 6)  # type: ignore[assignment]
    model.forward = lambda x: model.classifier(model.encoder(x))  # type: ignore[method-assign, operator]
    scenario = small_scenario(2)
    learner = sequel.Learner(model, torch.optim.SGD(model.parameters(), 0.1), sequel.LFL())
    learner.fit(scenario)
    assert all(m.training for m in model.modules())


def test_classifier_is_frozen_from_the_second_task_under_lfl() -> None:
    scenario = small_scenario(2)
    learner = small_learner(sequel.LFL(), scenario)
    learner.fit(scenario, stop_after=1)
    before = learner.backend.params["classifier.weight"].detach().clone()
    learner.fit(scenario)
    assert torch.equal(before, learner.backend.params["classifier.weight"])


class Batchy(nn.Module):
    """BatchNorm, a frozen layer, and a tuple as output."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU())
        self.fixed = nn.Linear(12, 12).requires_grad_(False)
        self.classifier = nn.Linear(12, 6)

    def forward(self, x: Any) -> Any:
        return self.classifier(self.fixed(self.encoder(x))), None


@pytest.mark.parametrize(
    "algorithm", [sequel.EWC(), sequel.SI(), sequel.LwF(), sequel.DERpp(memory=20), sequel.ICaRL(memory=20)],
    ids=lambda a: a.name,
)  # fmt: skip
def test_models_with_batch_norm_frozen_parts_and_tuples(algorithm: Any) -> None:
    scenario, model = small_scenario(2), Batchy()
    before = model.fixed.weight.clone()
    learner = sequel.Learner(
        model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05),
        algorithm, batch_size=9,
    )  # fmt: skip
    result = fit_quiet(learner, scenario, epochs=3)
    assert np.isfinite(result.losses).all()
    assert torch.equal(before, model.fixed.weight)


def test_bf16_autocast_keeps_importance_in_float32() -> None:
    scenario = small_scenario(2)
    learner = small_learner(sequel.EWC(), scenario, amp="bf16")
    result = learner.fit(scenario, epochs=5)
    assert np.isfinite(result.losses).all()
    assert all(v.dtype == torch.float32 for v in learner.backend.state["omega"].values())
    assert result.matrix[0, 0] > 0.5


def test_bf16_models_are_checkpointed(tmp_path: Path) -> None:
    scenario = small_scenario(2)
    learner = small_learner(sequel.EWC(), scenario)
    learner.backend.model.module.bfloat16()
    learner.fit(scenario, stop_after=1)
    learner.save(tmp_path / "a.safetensors")
    other = small_learner(sequel.EWC(), scenario)
    other.backend.model.module.bfloat16()
    other.setup(scenario)
    other.load(tmp_path / "a.safetensors")
    assert all(
        torch.equal(a, b)
        for a, b in zip(learner.backend.params.values(), other.backend.params.values(), strict=True)
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_compiled_model_trains_alike() -> None:
    scenario = small_scenario(2, n=24)

    def run(**options: Any) -> Any:
        return small_learner(sequel.EWC(), scenario, **options).fit(scenario).losses

    np.testing.assert_allclose(run(compile=True), run(), rtol=1e-5)


def test_custom_loss_and_iterable_of_tasks() -> None:
    tasks = list(small_scenario(2))
    learner = small_learner(
        sequel.Naive(), small_scenario(2),
        loss=lambda ops, logits, y: ((logits - ops.one_hot(y, 6, logits)) ** 2).sum(-1),
    )  # fmt: skip
    result = learner.fit(iter(tasks), epochs=3)
    assert result.losses[-1] < result.losses[0]
    assert learner.evaluate(small_scenario(3)).shape == (3,)


def test_images_as_uint8_train_in_both_backends() -> None:
    optax = pytest.importorskip("optax")
    x, y, xt, yt = tiny_data()
    scale = [((a * 20 + 128).clip(0, 255)).astype(np.uint8) for a in (x, xt)]
    source = sequel.scenarios.Dataset(scale[0], y, scale[1], yt, mean=0.5, std=0.08)
    scenario = sequel.scenarios.class_incremental(source, 2)
    model = sequel.nn.CNN((1, 8, 8), 6, channels=(4,))
    other = sequel.nn.to_jax(model)
    one = sequel.Learner(model, torch.optim.SGD(model.parameters(), 0.05), sequel.ER(memory=20))
    two = sequel.Learner(other, optax.sgd(0.05), sequel.ER(memory=20))
    a, b = one.fit(scenario, 2), two.fit(scenario, 2)
    np.testing.assert_allclose(a.losses, b.losses, rtol=1e-3)
    assert one.backend.state["memory"]["x"].dtype == torch.uint8
    assert two.backend.state["memory"]["x"].dtype == np.uint8


def test_result_as_json_and_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    scenario = small_scenario(2)
    result = small_learner(sequel.Naive(), scenario).fit(scenario)
    result.to_json(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["acc"] == round(result.acc, 12)
    ax = result.plot(tmp_path / "m.png")
    assert ax.get_xlabel() == "tested on task"
    curves = sequel.plot.plot_curves({"naive": [result.matrix]}, path=tmp_path / "c.png", title="t")
    assert len(curves.lines) == 1
    assert (tmp_path / "m.png").stat().st_size > 1000
    assert sequel.plot.plot_matrix(result.matrix, ax=ax) is ax


def test_confidence_interval_covers_the_mean() -> None:
    out = metrics.confidence([0.5, 0.6, 0.7, 0.8])
    assert out["low"] < out["mean"] == pytest.approx(0.65)
    assert out["high"] > 0.65
    assert out["std"] == pytest.approx(np.std([0.5, 0.6, 0.7, 0.8], ddof=1))
    assert metrics.min_acc([[0.5]], [0]) == 1.0


def test_loggers_write_the_same_names(tmp_path: Path) -> None:
    scenario = small_scenario(2)

    class Writer:
        def __init__(self) -> None:
            self.names: set[str] = set()

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.names.add(name)

        def log(self, values: dict[str, float], step: int) -> None:
            self.names |= set(values)

        def close(self) -> None:
            self.names.add("closed")

        finish = close

    board, bias = Writer(), Writer()
    callbacks = [
        sequel.CSVLogger(tmp_path),
        sequel.TensorBoardLogger(tmp_path, writer=board),
        sequel.WandbLogger(tmp_path, run=bias),
    ]
    result = small_learner(sequel.Naive(), scenario, callbacks=callbacks).fit(scenario)
    names = {
        "train/loss",
        "val/acc/task-0",
        "val/acc/task-1",
        "avg/acc",
        "avg/forgetting",
        "closed",
    }
    assert board.names == bias.names == names
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/loss"] for line in lines if "train/loss" in line] == result.losses
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert rows[0] == "step,name,value"
    assert len(rows) == 1 + len(result.losses) + 2 * 4
    assert (
        json.loads((tmp_path / "result.json").read_text())["fingerprint"] == scenario.fingerprint()
    )


@pytest.mark.parametrize("name", ["TensorBoardLogger", "WandbLogger"])
def test_loggers_without_their_package_say_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install sequel-cl\["):
        getattr(sequel, name)(tmp_path)


def test_import_and_a_run_without_jax_or_any_extra() -> None:
    code = """
    import sys
    import torch, torch._dynamo, numpy as np
    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("jax", "jaxlib", "optax", "flax", "matplotlib", "sklearn", "wandb"):
                raise ImportError(name + " is blocked")
    sys.meta_path.insert(0, Block())
    import sequel
    from sequel.testing import tiny_data
    scenario = sequel.scenarios.permuted(tiny_data(), 2)
    model = sequel.nn.MLP(64, (8,), 6)
    learner = sequel.Learner(model, torch.optim.SGD(model.parameters(), .05), sequel.EWC())
    assert learner.fit(scenario).matrix.shape == (2, 2)
    try:
        sequel.Learner(object(), None, sequel.Naive(), backend="jax")
    except ImportError as error:
        assert "pip install sequel-cl[jax]" in str(error), error
    else:
        raise SystemExit("no ImportError")
    for call, extra in ((sequel.data.digits, "digits"), (lambda: sequel.plot.plot_matrix([[1.0]]), "plot")):
        try:
            call()
        except ImportError as error:
            assert f"sequel-cl[{extra}]" in str(error), error
    print("ok")
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert out.stdout.strip() == "ok", out.stderr


def test_import_loads_nothing_optional() -> None:
    code = (
        "import sys, sequel; sequel.Learner; "
        "print([m for m in ('jax', 'optax', 'flax', 'matplotlib', 'sklearn', 'wandb', 'torchvision', "
        "'tensorboard') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_abandoned_namesake_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0.2")
    with pytest.raises(ImportError, match="pip uninstall sequel-core"):
        sequel._refuse_namesake()
    assert "EWC" in dir(sequel)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sequel.nothing
