"""Task vectors, masks, soups and tuning against their formulas."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import State, make_finetuned
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import lines_merge as lm


def close(one: Any, two: Any, atol: float = 1e-6) -> None:
    assert set(one) == set(two)
    for name in one:
        np.testing.assert_allclose(np.asarray(one[name]), np.asarray(two[name]), rtol=0, atol=atol)


def test_task_vectors_are_linear(base: State, models: list[State]) -> None:
    taus = reference.task_vectors(base, models)
    one, two, three = (lm.TaskVector(base, model) for model in models)
    combination = 2 * one - two / 4 + (-three) * 0.5
    expected = 2 * taus[0] - taus[1] / 4 - taus[2] / 2
    close(combination, reference.unflatten(expected, base))
    close(sum([one, two, three]), reference.unflatten(taus.sum(axis=0), base))
    assert one.norm(1) == pytest.approx(np.abs(taus[0]).sum(), rel=1e-12)
    assert one.norm() == pytest.approx(np.linalg.norm(taus[0]), rel=1e-12)
    assert one.dot(two) == pytest.approx(taus[0] @ taus[1], rel=1e-12)
    close(one.apply(base), models[0])
    close(one.apply(base, scale=-1.0), {n: 2 * base[n] - models[0][n] for n in base})
    assert all(torch.equal(one.apply(base, 0.0)[name], base[name]) for name in base)


def test_lines_and_masks_on_task_vectors(base: State, models: list[State]) -> None:
    tau = lm.TaskVector(base, models[0])
    factors = lm.scales(base, 0.2, 0.8)
    close(tau.lines(0.2, 0.8), {name: factors[name] * tau[name] for name in tau})
    close(tau.lines(0.2, 0.8).apply(base), lm.edit(base, models[0], 0.2))
    mask = {name: torch.rand(value.shape) > 0.5 for name, value in base.items()}
    close(tau.mask(mask), {name: mask[name] * tau[name] for name in tau}, atol=0)
    with pytest.raises(lm.KeyMismatchError, match=r"the mask lacks \['embed.weight'\]"):
        tau.mask({name: value for name, value in mask.items() if name != "embed.weight"})


def test_task_vectors_are_lazy_mappings(tmp_path: Path, base: State, models: list[State]) -> None:
    base["steps"] = torch.tensor(1)
    models[0]["steps"] = torch.tensor(2)
    save_file(models[0], tmp_path / "tuned.safetensors")
    tau = lm.TaskVector(base, tmp_path / "tuned.safetensors")
    assert "steps" not in list(tau)
    assert len(tau) == len(base) - 1
    assert repr(2 * tau).startswith("TaskVector(2 * (")
    assert tau != lm.TaskVector(base, models[0])
    assert hash(tau) == hash(tau)
    (2 * tau).save(tmp_path / "tau.safetensors")
    close(load_file(tmp_path / "tau.safetensors"), {name: 2 * tau[name] for name in tau}, atol=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tau.safetensors", "tuned.safetensors"]


def test_task_vectors_refuse_what_does_not_fit(base: State, models: list[State]) -> None:
    tau = lm.TaskVector(base, models[0])
    with pytest.raises(lm.KeyMismatchError, match="'extra' is in one of"):
        lm.TaskVector(base, {**models[0], "extra": torch.ones(1)})
    with pytest.raises(lm.ShapeMismatchError, match=r"'pos' has shape \(4,\)"):
        lm.TaskVector(base, {**models[0], "pos": torch.ones(5)})
    other = {"w": torch.ones(1)}
    with pytest.raises(lm.KeyMismatchError, match="different parameters"):
        tau + lm.TaskVector(other, other)
    with pytest.raises(lm.KeyMismatchError, match="lacks"):
        tau.apply(other)
    with pytest.raises(ValueError, match="p must be 1 or 2"):
        tau.norm(3)
    with pytest.raises(ValueError, match="factor must be finite"):
        tau * float("nan")
    for wrong in (
        lambda: tau + 1,
        lambda: tau - "x",
        lambda: tau * tau,
        lambda: tau / "2",
        lambda: tau * True,
    ):
        with pytest.raises(TypeError):
            wrong()


def test_float64_task_vectors_stay_float64() -> None:
    base = {"w": torch.ones(1, dtype=torch.float64)}
    tau = lm.TaskVector(base, {"w": torch.tensor([1 + 1e-12], dtype=torch.float64)})
    assert tau["w"].item() == pytest.approx(1e-12, rel=1e-3)
    assert tau.apply(base)["w"].dtype == torch.float64


# TALL masks


def test_tall_masks_are_the_published_inequality(base: State, models: list[State]) -> None:
    taus = reference.task_vectors(base, models)
    masks = lm.tall_masks(base, models, 0.4)
    for t in range(3):
        expected = reference.tall_masks(taus, taus.sum(axis=0), 0.4)[t]
        close(masks[t], reference.unflatten(expected, base), atol=0)
        close(masks[str(t)], masks[t], atol=0)
    counts = reference.tall_masks(taus, taus.sum(axis=0), 0.4).sum(axis=0)
    for k in range(5):
        close(masks.consensus(k), reference.unflatten(counts >= k, base), atol=0)


def test_consensus_masks_shrink_with_k_and_have_the_stated_extremes(
    base: State, models: list[State]
) -> None:
    masks = lm.tall_masks(base, models, 0.4)
    kept = [sum(int(m.sum()) for m in masks.consensus(k).values()) for k in range(5)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == sum(value.numel() for value in base.values())
    assert kept[4] == 0
    counts = torch.cat([c.flatten() for c in masks.counts().values()])
    assert kept[1] == int((counts > 0).sum())  # k = 1 drops only what no task relies on
    with pytest.raises(ValueError, match="k must be an integer"):
        masks.consensus(-1)


def test_one_task_relies_on_what_it_changed(base: State) -> None:
    tuned = make_finetuned(base, 0)
    tuned["pos"][1:3] = base["pos"][1:3]
    (mask,) = (lm.tall_masks(base, [tuned], 0.6)[t] for t in range(1))
    assert all(torch.equal(mask[name], tuned[name] != base[name]) for name in base)


def test_masks_are_packed_and_saved(tmp_path: Path, base: State, models: list[State]) -> None:
    named = dict(zip("abc", models, strict=True))
    masks = lm.tall_masks(
        base, named, {"a": 0.2, "b": 0.4, "c": 0.6}, method="ties", density=0.5, merge="sum"
    )
    numel = sum(value.numel() for value in base.values())
    assert masks.nbytes <= 3 * (numel / 8 + len(base))
    masks.save(tmp_path / "masks.safetensors")
    again = lm.PackedMasks.load(tmp_path / "masks.safetensors")
    assert list(again) == list(masks) == ["a", "b", "c"]
    assert len(again) == 3
    assert again.lambdas == {"a": 0.2, "b": 0.4, "c": 0.6}
    for task in "abc":
        close(again[task], masks[task], atol=0)


def test_thresholds_are_chosen_by_accuracy_and_ties_keep_the_first(
    base: State, models: list[State]
) -> None:
    seen: list[tuple[str, State]] = []

    def evaluate(task: str, weights: State) -> float:
        seen.append((task, weights))
        return 1.0 if task == "0" else float(len(seen))

    masks = lm.tall_masks(base, models, (0.2, 0.6), evaluate=evaluate)
    assert masks.lambdas == {"0": 0.2, "1": 0.6, "2": 0.6}
    taus = reference.task_vectors(base, models)
    update = reference.tall_masks(taus, taus.sum(axis=0), 0.6)[2] * taus.sum(axis=0)
    close(seen[-1][1], reference.lines(base, update, dict.fromkeys(base, 1.0)))
    with pytest.raises(ValueError, match="candidates for evaluate="):
        lm.tall_masks(base, models, (0.2, 0.6))
    assert set(lm.tall_masks(base, models).lambdas.values()) == {0.4}
    seen.clear()
    lm.tall_masks(base, models, evaluate=evaluate)
    assert len(seen) == 5 * 3  # the paper's grid, for each task
    for wrong in (-0.1, float("nan"), float("inf"), (0.2, -1.0), {"0": 1.0, "1": -1.0, "2": 1.0}):
        with pytest.raises(ValueError, match="lambdas must be finite numbers of at least 0"):
            lm.tall_masks(base, models, wrong, evaluate=evaluate)
    with pytest.raises(KeyError):
        lm.tall_masks(base, models, {"0": 0.4})


# Soups


def test_wise_ft_scales_both_coefficients(base: State, models: list[State]) -> None:
    close(lm.wise_ft(base, models[0], 0.6), lm.edit(base, models[0], alpha=0.3, beta=0.3), atol=0)
    plain = {n: 0.4 * base[n] + 0.6 * models[0][n] for n in base}
    close(lm.wise_ft(base, models[0], 0.6, alpha=1.0, beta=0.0), plain)
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\], got 1.5"):
        lm.wise_ft(base, models[0], 1.5)


def test_uniform_soup_is_the_averaged_model(models: list[State]) -> None:
    modules = []
    for seed in range(3):
        torch.manual_seed(seed)
        modules.append(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)))
    averaged = AveragedModel(modules[0])
    for module in modules:
        averaged.update_parameters(module)
    start = {name: torch.zeros_like(value) for name, value in modules[0].state_dict().items()}
    close(lm.uniform_soup(start, modules), averaged.module.state_dict(), atol=1e-7)


def test_soups_with_lines(base: State, models: list[State]) -> None:
    taus = reference.task_vectors(base, models)
    factors = lm.scales(base, 0.6, 0.9)
    close(
        lm.uniform_soup(base, models, alpha=0.6, beta=0.9),
        reference.lines(base, taus.mean(axis=0), factors),
    )
    update = 0.3 * taus[0] + 0.7 * taus[1]
    rewarded = lm.rewarded_soup(base, models[0], models[1], 0.3)
    close(rewarded, reference.lines(base, update, lm.scales(base, 1.0, 1.0)))
    with pytest.raises(ValueError, match=r"lam must be in \[0, 1\]"):
        lm.rewarded_soup(base, models[0], models[1], -0.1)


def test_greedy_soup_adds_what_does_not_hurt() -> None:
    base = {"w": torch.zeros(1)}
    models = {
        name: {"w": torch.tensor([x])}
        for name, x in {"far": 4.0, "near": 1.0, "low": 0.0, "far2": 9.0}.items()
    }

    def evaluate(weights: State) -> float:
        return -abs(weights["w"].item() - 0.5)

    soup = lm.greedy_soup(base, models, evaluate)
    # near and low score alike and stand before far; their mean is perfect, and nothing else helps
    assert soup.members == ["near", "low"]
    assert soup.score == 0
    assert soup.weights["w"].item() == 0.5
    scaled = lm.greedy_soup(base, models, evaluate, alpha=0.0)
    assert scaled.score == -0.5
    equal = lm.greedy_soup(base, [models["near"], models["near"]], evaluate)
    assert equal.members == ["0", "1"]


# Tuning


def test_tune_keeps_the_first_of_equal_points() -> None:
    result = lm.tune(
        lambda gamma: gamma,
        lambda gamma: {"a": round(gamma, 1) // 0.5},
        lm.GAMMA_GRID,
        lambda s: min(s["a"], 1),
    )
    assert result.best == 1.0
    assert result.objective == 1
    assert len(result.trace) == 11
    assert result.trace[3] == (0.7, {"a": 1.0}, 1.0)
    with pytest.raises(ValueError, match="grid is empty"):
        lm.tune(lambda x: x, float, [])
    with pytest.raises(ValueError, match=r"objective is NaN at grid point 0.5"):
        lm.tune(lambda x: x, lambda x: float("nan"), [0.5])


def test_grids_and_objective_of_the_paper() -> None:
    assert lm.GAMMA_GRID == (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
    assert lm.BETA_GRID == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert lm.TIES_GRID[-1] == 1.5
    assert len(lm.TIES_GRID) == 15
    value = lm.forgetting_objective(0.9, 1.0, [0.3, 0.2], [0.5, 0.4])
    assert value == pytest.approx(2 * 0.9 + (0.6 + 0.5) / 2)
    assert lm.forgetting_objective(1, 1, [1], [1], weight=5) == 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3)) for _ in range(3))
        self.head = nn.Linear(3, 1)


def nets() -> tuple[Net, State, State]:
    torch.manual_seed(0)
    model = Net()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    return model, base, make_finetuned(base, 1)


@pytest.mark.parametrize("schedule", ["linear", "reverse"])
@pytest.mark.parametrize("outside", ["alpha", "depth"])
def test_scaled_model_is_edit_at_every_grid_point(schedule: str, outside: str) -> None:
    model, base, tuned = nets()
    scaled = lm.ScaledModel(
        model, base, lm.TaskVector(base, tuned), schedule=schedule, outside=outside
    )
    for alpha, beta in ((0.0, 1.0), (0.3, 0.5), (-1.0, 0.2)):
        assert scaled.set(alpha, beta) is model
        expected = lm.edit(base, tuned, alpha=alpha, beta=beta, schedule=schedule, outside=outside)
        close(model.state_dict(), expected, atol=3e-7)  # one rounding instead of two


def test_scaled_model_can_be_copied_and_pickled() -> None:
    model, base, tuned = nets()
    scaled = lm.ScaledModel(model, base, lm.TaskVector(base, tuned))
    for other in (copy.deepcopy(scaled), pickle.loads(pickle.dumps(scaled))):
        changed = other.set(0.5, 0.5)
        assert changed is other.model
        close(changed.state_dict(), lm.edit(base, tuned, alpha=0.5, beta=0.5), atol=3e-7)
        close(model.state_dict(), base, atol=0)


def test_scaled_half_precision_and_wrapped_model() -> None:
    model, base, tuned = nets()
    tau = lm.TaskVector(base, tuned)
    half = {name: value.bfloat16() for name, value in base.items()}
    wrapped = torch.compile(model.bfloat16(), backend="eager")
    lm.ScaledModel(wrapped, half, tau).set(0.25, 0.5)
    factors = lm.scales(base, 0.25, 0.5)
    for name, value in model.state_dict().items():
        exact = (half[name].double() + factors[name] * tau[name].double()).bfloat16()
        assert torch.equal(value, exact)


def test_tuner_refuses_what_does_not_fit() -> None:
    model, base, tuned = nets()
    tau = lm.TaskVector(base, tuned)
    with pytest.raises(ValueError, match="outside must be 'alpha' or 'depth'"):
        lm.ScaledModel(model, base, tau, outside=0.5)
    with pytest.raises(lm.KeyMismatchError, match=r"the model lacks \['blocks.0.0.weight'"):
        lm.ScaledModel(model.blocks, base, tau)
    with pytest.raises(lm.KeyMismatchError):
        lm.Tuner({}, tau, base)
    with pytest.raises(ValueError, match="beta must be finite"):
        lm.ScaledModel(model, base, tau).set(0.5, float("inf"))


@pytest.mark.gpu
def test_tuner_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model, base, tuned = nets()
    lm.ScaledModel(model.cuda(), base, lm.TaskVector(base, tuned)).set(0.5, 0.5)
    close(model.cpu().state_dict(), lm.edit(base, tuned, alpha=0.5, beta=0.5), atol=3e-7)
