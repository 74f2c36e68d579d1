"""The split-digits experiment: its parts, and the paper's forgetting claim on five seeds."""

from __future__ import annotations

import sys

import pytest
import torch

import lines_merge as lm
from lines_merge.recipes import split_digits as sd


@pytest.fixture(scope="module")
def experiment() -> sd.Experiment:
    return sd.prepare(3)


def test_parts_are_disjoint_and_complete() -> None:
    digits = sd.load_digits(0)
    parts = [digits.base, digits.finetune, digits.validation, digits.test]
    assert [len(labels) for _, labels in parts] == [400, 600, 200, 597]
    pixels = torch.cat([x for x, _ in parts])
    assert pixels.shape == (1797, 64)
    assert pixels.min() == 0
    assert pixels.max() == 1
    other = sd.load_digits(1)
    assert not torch.equal(digits.test[0], other.test[0])


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"lines-merge\[data\]"):
        sd.load_digits(0)


def test_subset_keeps_only_the_named_digits() -> None:
    x, y = torch.arange(6).float().view(6, 1), torch.tensor([0, 1, 2, 0, 6, 9])
    kept, labels = sd.subset((x, y), (0, 6))
    assert labels.tolist() == [0, 0, 6]
    assert kept.flatten().tolist() == [0, 3, 4]


def test_fine_tuning_moves_every_parameter_but_not_the_frozen_head(
    experiment: sd.Experiment,
) -> None:
    for copy in experiment.finetuned:
        assert torch.equal(copy["head"], experiment.base["head"])
        moved = [name for name in copy if not torch.equal(copy[name], experiment.base[name])]
        assert set(moved) == set(copy) - {"head"}


def test_gamma_one_is_the_fine_tuned_network(experiment: sd.Experiment) -> None:
    tuned = sd.target_control(experiment, experiment.finetuned)
    assert sd.trade_off(experiment, "linear", [1.0]) == [tuned]
    assert sd.trade_off(experiment, "uniform", [1.0]) == [tuned]


def test_uniform_zero_is_the_base(experiment: sd.Experiment) -> None:
    base = sd.target_control(experiment, [experiment.base] * 5)
    assert sd.trade_off(experiment, "uniform", [0.0]) == [base]


def test_accuracy_counts_hits(experiment: sd.Experiment) -> None:
    x, y = experiment.digits.test
    model = sd.ResidualMLP()
    model.load_state_dict(experiment.base)
    with torch.no_grad():
        hits = sum(
            int(model(row[None]).argmax()) == int(label) for row, label in zip(x, y, strict=True)
        )
    assert sd.accuracy(experiment.base, (x, y)) == pytest.approx(100 * hits / len(y), abs=1e-9)


def test_a_shift_changes_the_input_and_keeps_all_digits() -> None:
    seen: list[tuple[int, int]] = []

    def shift(x: torch.Tensor, task: int) -> torch.Tensor:
        seen.append((task, len(x)))
        return x.flip(1)

    sd.prepare(0, shift=shift)
    assert seen == [(task, 600) for task in range(5)]


@pytest.mark.parametrize("lines", [True, False])
def test_merged_network_was_chosen_on_validation_rows(
    experiment: sd.Experiment, lines: bool
) -> None:
    value, accuracy = sd.merged_accuracy(experiment, lines=lines)
    scaling = {"beta": value} if lines else {"alpha": value, "beta": 0.0}
    merged = lm.merge(experiment.base, list(experiment.finetuned), **scaling)
    assert value in sd.GRID[1:]
    assert accuracy == sd.accuracy(dict(merged), experiment.digits.test)


@pytest.mark.slow
def test_lines_restores_what_fine_tuning_forgot_and_reverse_does_not() -> None:
    """Section 4 of the paper in kind, on the mean of five seeds."""
    tuned, lines, reverse = torch.zeros(2), torch.zeros(2), torch.zeros(2)
    for seed in range(20, 25):
        experiment = sd.prepare(seed)
        (low, high) = sd.trade_off(experiment, "linear", [0.0, 1.0])
        lines += torch.tensor(low) / 5
        tuned += torch.tensor(high) / 5
        reverse += torch.tensor(sd.trade_off(experiment, "reverse", [0.0])[0]) / 5
    assert lines[1] - tuned[1] >= 40
    assert tuned[0] - lines[0] <= 1.2
    assert lines[1] - reverse[1] >= 6
