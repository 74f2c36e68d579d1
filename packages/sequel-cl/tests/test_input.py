"""Input that used to be taken in silence, or refused without a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sequel
from sequel import metrics, scenarios
from sequel.callbacks import Callback

X, Y = np.random.default_rng(0).normal(size=(40, 6)), np.arange(40) % 4


def learner(model: Any = None, **options: Any) -> Any:
    model = sequel.nn.MLP(6, (8,), 4) if model is None else model
    return sequel.Learner(
        model, torch.optim.SGD(model.parameters(), 0.05), sequel.EWC(), batch_size=10, **options
    )


def two_tasks() -> Any:
    return scenarios.class_incremental((X, Y, X, Y), 2)


def test_float_labels_of_torch_datasets_are_refused() -> None:
    data = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y) * 1.5)
    with pytest.raises(TypeError, match="y_train must be integer labels, got dtype float"):
        scenarios.permuted(data, 2)


def test_labels_outside_of_a_tasks_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"train labels \[2, 3\] outside its classes \(0, 1\)"):
        scenarios.from_datasets([(X, Y, X, Y)], kind="task", classes=[[0, 1]])
    with pytest.raises(ValueError, match=r"classes \(0, 1, 2, 3, 9\) outside \[0, 4\)"):
        scenarios.from_datasets([(X, Y, X, Y)], classes=[[0, 1, 2, 3, 9]])


def test_training_and_test_inputs_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"differ in shape: \(6,\) and \(4,\)"):
        scenarios.permuted((X, Y, X[:, :4], Y), 2)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_model_with_too_few_outputs_is_refused(backend: str) -> None:
    model = sequel.nn.MLP(6, (8,), 3)
    if backend == "torch":
        one = learner(model)
    else:
        optax = pytest.importorskip("optax")
        one = sequel.Learner(sequel.nn.to_jax(model), optax.sgd(0.05), sequel.EWC())
    with pytest.raises(ValueError, match="the model has 3 outputs, the scenario 4 classes"):
        one.fit(two_tasks())


def test_a_penalty_attached_after_the_learner_was_made_is_found() -> None:
    model = sequel.nn.MLP(6, (8,), 4)
    one = learner(model)
    sequel.torch.EWC(model)
    with pytest.raises(RuntimeError, match="already carries a penalty"):
        one.fit(two_tasks())


def test_a_list_of_tasks_can_be_gone_on_with() -> None:
    tasks = list(two_tasks())
    one = learner()
    one.fit(tasks, stop_after=1)
    assert np.isfinite(one.fit(tasks).matrix).all()


def test_numpys_numbers_are_numbers() -> None:
    assert sequel.EWC(lam=np.float32(2.0)).lam == 2.0
    assert len(scenarios.permuted((X, Y), np.int64(2))) == 2
    assert learner().fit(two_tasks(), epochs=np.int64(1)).matrix.shape == (2, 2)
    assert sequel.functional.herding(np.eye(3), np.int64(2)).tolist() == [0, 1]


def test_metrics_name_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"at least one task, got shape \(0, 0\)"):
        metrics.acc(np.zeros((0, 0)))
    with pytest.raises(ValueError, match="before must hold 3 accuracies"):
        metrics.fwt(np.eye(3), [0.1, 0.1])  # once broadcast to a wrong number
    with pytest.raises(ValueError, match="at least one number"):
        metrics.confidence([])


def test_evaluation_steps_have_their_hooks() -> None:
    seen: list[tuple[str, int]] = []

    class Steps(Callback):
        def on_before_val_step(self, learner: Any, **info: Any) -> None:
            seen.append(("before", info["step"]))

        def on_after_val_step(self, learner: Any, **info: Any) -> None:
            seen.append(("after", info["step"]))

    one = learner(callbacks=[Steps()], eval_batch_size=30)  # 40 test samples: two steps
    one.fit(two_tasks(), stop_after=1)
    assert seen == [("before", 0), ("after", 0), ("before", 1), ("after", 1)] * 2


def test_a_run_that_fails_closes_its_files_and_restores_the_generator(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    one = sequel.Learner(
        model,
        torch.optim.SGD(model.parameters(), 1e30),
        sequel.Naive(),
        callbacks=[sequel.CSVLogger(tmp_path)],
    )
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with pytest.raises(FloatingPointError):
        one.fit(two_tasks(), epochs=5)
    assert torch.equal(before, torch.get_rng_state())
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert rows[1].startswith("1,train/loss,")
    assert not (tmp_path / "result.json").exists()


def test_bf16_models_keep_their_momentum_over_a_checkpoint(tmp_path: Path) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        model = sequel.nn.MLP(6, (8,), 4).bfloat16()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        return sequel.Learner(
            model, optimizer, sequel.Naive(), batch_size=10, reset_optimizer=False
        )

    whole, first, second = make(), make(), make()
    whole.fit(two_tasks(), 2)
    first.fit(two_tasks(), 2, stop_after=1)
    first.save(tmp_path / "a.safetensors")
    stream = two_tasks()
    second.setup(stream)
    second.load(tmp_path / "a.safetensors")
    second.fit(stream, 2)
    for a, b in zip(whole.backend.params.values(), second.backend.params.values(), strict=True):
        assert torch.equal(a, b)


def test_numbers_out_of_their_range_are_named() -> None:
    with pytest.raises(ValueError, match=r"min_lr must be a finite number >= 0.0, got -1"):
        learner(min_lr=-1)
    with pytest.raises(ValueError, match="eval_every must be an integer >= 1, got 0"):
        learner(eval_every=0)
    mine = learner()
    mine.setup(two_tasks())
    with pytest.raises(ValueError, match=r"number must lie in \[0, 2\), got 2"):
        mine.fit_task(2)
    for task in (-1, 2):  # -1 would have been the last row of the mask
        with pytest.raises(ValueError, match=rf"task must lie in \[0, 2\), got {task}"):
            mine.predict(mine.scenario[0].test.x, task=task)


def test_data_in_the_place_of_a_scenario() -> None:
    x, y = np.zeros((20, 3)), np.arange(20) % 4
    pieces = sequel.scenarios.data_incremental((x, y, x, y), batch=8)
    assert sorted(np.concatenate([t.train_index for t in pieces]).tolist()) == list(range(20))
    assert [len(t.train_index) for t in pieces] == [8, 8, 4]
    with pytest.raises(TypeError, match="scenario must be a Scenario or tasks, not data"):
        sequel.scenarios.blurry((x, y), 0.5)
    with pytest.raises(TypeError, match="scenario must be a Scenario or tasks, not data"):
        learner().fit((x, y))
