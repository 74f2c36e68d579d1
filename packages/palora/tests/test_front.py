from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import close, fill
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from torch import nn

import palora
from palora.baselines import LinearScalarization, PaMaL
from palora.front import (
    Front,
    evaluate,
    hypervolume,
    nondominated,
    simplex_grid,
    spearman,
    uniformity,
    uniformity_entropy,
)


def inclusion_exclusion(points: np.ndarray, ref: np.ndarray) -> float:
    total = 0.0
    for size in range(1, len(points) + 1):
        for subset in itertools.combinations(range(len(points)), size):
            corner = points[list(subset)].max(0)
            total += (-1) ** (size + 1) * float(np.prod(np.maximum(ref - corner, 0)))
    return total


def test_worked_hypervolumes() -> None:
    assert hypervolume([[0.2, 0.8], [0.5, 0.5], [0.8, 0.2]], [1, 1]) == pytest.approx(
        0.37, abs=1e-15
    )
    for tasks in range(1, 7):
        point = np.linspace(0.1, 0.9, tasks)
        expected = math.prod(1.0 - point)
        assert hypervolume(point[None], np.ones(tasks)) == pytest.approx(expected, rel=1e-14)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_hypervolume_equals_inclusion_exclusion(data: Any) -> None:
    tasks, count = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 8))
    values = st.floats(0, 1.2) | st.sampled_from([0.0, 0.25, 0.5, 1.0])
    points = data.draw(hnp.arrays(np.float64, (count, tasks), elements=values))
    ref = np.ones(tasks)
    assert hypervolume(points, ref) == pytest.approx(inclusion_exclusion(points, ref), abs=1e-12)


def test_hypervolume_is_monotone_and_ignores_points_beyond_the_reference() -> None:
    rng = np.random.default_rng(0)
    for tasks in (2, 3, 4, 5):
        points, last = rng.random((8, tasks)), 0.0
        for k in range(1, 9):
            value = hypervolume(points[:k], np.ones(tasks))
            assert value >= last - 1e-15
            last = value
        outside = np.vstack([points, np.full(tasks, 1.5), np.append(np.zeros(tasks - 1), 1.0)])
        assert hypervolume(outside, np.ones(tasks)) == pytest.approx(last, rel=1e-14)
    assert hypervolume([[2.0, 2.0]], [1, 1]) == 0.0


@pytest.mark.parametrize("tasks", [2, 3, 4])
def test_five_hundred_points_agree_with_pymoo(tasks: int) -> None:
    pytest.importorskip("pymoo")
    rng = np.random.default_rng(tasks)
    points = np.abs(rng.standard_normal((500, tasks)))
    points = 1 - points / np.linalg.norm(points, axis=1, keepdims=True)
    ref = np.ones(tasks)
    other = hypervolume(points, ref, backend="pymoo")
    assert hypervolume(points, ref) == pytest.approx(other, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hypervolume([[float("nan"), 1]], [2, 2]), "points holds NaN"),
        (lambda: hypervolume([[0, 0]], [1, 1, 1]), "ref must be 2 numbers"),
        (lambda: hypervolume([[0, 0]], [1, float("nan")]), "ref must be 2 numbers"),
        (lambda: hypervolume([0, 0], [1, 1]), r"must be \(points, tasks\)"),
        (lambda: hypervolume([[0, 0]], [1, 1], backend="x"), "backend must be"),  # type: ignore[arg-type]
        (lambda: spearman([[1, 2]], [[1, 0]], "x"), "kind must be"),  # type: ignore[arg-type]
        (lambda: spearman([[1, 2]], [[1, 0], [0, 1]]), "must have one shape"),
        (lambda: uniformity([[1, 2]], [[1, 0], [0, 1]]), "must have one shape"),
        (lambda: uniformity([[-1, 2]], [[1, 0]]), "not negative"),
        (lambda: uniformity([[0, 2]], [[1, 0]]), "undefined"),
        (lambda: uniformity_entropy([[0, 2], [0, 1]]), "positive"),
    ],
)
def test_bad_points(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_nondominated_by_pairwise_comparison() -> None:
    rng = np.random.default_rng(1)
    points = rng.integers(0, 4, (30, 3)).astype(float)
    for i, keep in enumerate(nondominated(points)):
        dominated = any(
            (points[j] <= points[i]).all() and (points[j] < points[i]).any() for j in range(30)
        )
        assert keep == (not dominated)


def test_both_spearman_definitions_equal_scipy() -> None:
    rng = np.random.default_rng(0)
    losses, prefs = rng.integers(0, 5, (12, 3)) / 4.0, rng.random((12, 3))
    ours = spearman(losses, prefs)
    for t in range(3):
        assert ours[t] == pytest.approx(stats.spearmanr(prefs[:, t], losses[:, t])[0])
    pairs = spearman(losses, kind="losses")
    for value, (i, j) in zip(pairs, [(0, 1), (0, 2), (1, 2)], strict=True):
        assert value == pytest.approx(stats.spearmanr(losses[:, i], losses[:, j])[0])
    assert np.isnan(spearman([[1.0, 2.0], [1.0, 3.0]], [[1, 0], [0, 1]])[0])


def test_both_uniformities_by_hand() -> None:
    losses, prefs = np.array([[1.0, 4.0], [2.0, 2.0]]), np.array([[0.5, 0.5], [1.0, 0.0]])
    share = np.array([0.2, 0.8])
    expected = 1 - float((share * np.log(share * 2)).sum())
    assert uniformity(losses, prefs)[0] == pytest.approx(expected)
    assert uniformity(losses, prefs)[1] == pytest.approx(1 - math.log(2))
    p = losses / losses.sum(0)
    assert uniformity_entropy(losses) == pytest.approx(float((p * np.log(p * 2)).sum()))
    assert uniformity_entropy(np.ones((5, 2))) == pytest.approx(0.0, abs=1e-15)


def toy() -> tuple[nn.Module, list[Any], Any]:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).double()
    model = fill(palora.inject(net, ["a", "b"], rank=2))
    data = torch.randn(10, 4, dtype=torch.float64)
    loader = [(data[:7], torch.zeros(7)), ((data[7:],), torch.zeros(3))]

    def scores(out: torch.Tensor, target: torch.Tensor) -> Any:
        return [out[:, 0].square().mean(), out[:, 1].square().mean()], [out.abs().mean()]

    return model, loader, scores


@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_evaluate_is_the_sample_weighted_mean_in_evaluation_mode(chunk: int | None) -> None:
    model, loader, scores = toy()
    model[1].eval()
    front = evaluate(model, loader, scores, simplex_grid(2, 10), chunk=chunk)
    assert model.training
    assert not model[1].training  # modes are put back one by one
    assert int(model[1].num_batches_tracked) == 0
    assert front.tasks == ["a", "b"]
    everything = torch.cat([loader[0][0], loader[1][0][0]])
    model.eval()
    for i, lam in enumerate(simplex_grid(2, 10)):
        with torch.no_grad(), palora.preference(model, lam):
            out = model(everything)
        close(torch.from_numpy(front.losses[i]), out.square().mean(0))
        close(torch.tensor(front.metrics[i, 0]), out.abs().mean())
    with pytest.raises(ValueError, match="no batch"):
        evaluate(model, [], scores, simplex_grid(2, 2))


class Keyed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, labels: Any = None) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("form", ["dict", "dict of inputs", "keywords of a baseline"])
def test_evaluate_takes_the_batches_of_a_training_step(form: str) -> None:
    x, scale = torch.randn(6, 4, dtype=torch.float64), torch.ones(6)
    if form == "keywords of a baseline":
        model: nn.Module = LinearScalarization(Keyed().double())
        layer = model.model.layer
    else:
        model = palora.inject(Keyed().double(), ["a", "b"], rank=1)
        layer = model.layer
    inputs = {"x": x, "labels": scale}
    batch: Any = inputs if form == "dict" else (inputs, scale)

    def losses(out: torch.Tensor, last: Any) -> Any:
        assert last is (inputs if form == "dict" else scale)
        found = {"a": out[:, 0].square().mean(), "b": out[:, 1].square().mean()}
        return found, {"size": out.abs().mean()}

    found = evaluate(model, [batch], losses, [0.5, 0.5], tasks=["a", "b"])  # one preference
    out = x @ layer.weight.t() + layer.bias  # B = 0: the base alone
    assert found.prefs.tolist() == [[0.5, 0.5]]
    close(torch.from_numpy(found.losses[0]), out.square().mean(0).detach())
    close(torch.from_numpy(found.metrics[0]), out.abs().mean()[None].detach())


def test_evaluate_takes_baselines() -> None:
    model = PaMaL([nn.Linear(4, 2), nn.Linear(4, 2)])
    x = torch.randn(5, 4)

    def losses(out: torch.Tensor) -> list[torch.Tensor]:
        return [out[:, 0].square().mean(), out[:, 1].square().mean()]

    front = evaluate(model, [(x,)], losses, simplex_grid(2, 2), tasks=["p", "q"])
    assert front.metrics is None
    assert front.tasks == ["p", "q"]
    mixed = 0.5 * (model.members[0](x) + model.members[1](x))
    np.testing.assert_allclose(front.losses[1], mixed.square().mean(0).detach(), rtol=1e-5)
    assert evaluate(model, [(x,)], losses, simplex_grid(2, 2)).tasks == ["task0", "task1"]


def front() -> Front:
    return Front(
        [[1, 0], [0.5, 0.5], [0, 1]], [[1, 3], [2, 2], [3, 1.5]], [[0.9], [0.8], [0.7]], ["a", "b"]
    )


def test_front_measures_selection_and_files(tmp_path: Path) -> None:
    found = front()
    assert len(found) == 3
    assert found.hypervolume([4, 4]) == pytest.approx(3 * 1 + 2 * 1 + 1 * 0.5)
    assert found.nondominated().all()
    assert found.spearman().tolist() == [-1.0, -1.0]
    assert found.spearman("losses").tolist() == [-1.0]
    assert found.uniformity().shape == (3,)
    assert found.select({"a": 2.5}, "b") == 1
    assert found.select(lambda row: row[0] > 1.5) == 1
    with pytest.raises(ValueError, match="none of 3 points satisfies"):
        found.select({"a": 0.5})
    with pytest.raises(KeyError, match="unknown task 'x'"):
        found.select({"x": 0.5})
    with pytest.raises(KeyError, match="unknown task 'y'"):
        found.select({"a": 5.0}, "y")
    text = found.to_json(tmp_path / "f.json")
    again = Front.from_json((tmp_path / "f.json").read_text())
    assert again.to_json() == text
    lines = found.to_csv(tmp_path / "f.csv").splitlines()
    assert lines[0] == "lambda_a,lambda_b,loss_a,loss_b,metric_0"
    assert [float(v) for v in lines[2].split(",")] == [0.5, 0.5, 2.0, 2.0, 0.8]
    assert (tmp_path / "f.csv").read_text().splitlines() == lines
    with pytest.raises(ValueError, match=r"must be one \(m, T\)"):
        Front([[1, 0]], [[1, 2, 3]])


def test_plots_return_their_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = front()
    found.losses[1] = [3.5, 3.5]  # dominated: drawn hollow
    ax = found.plot()
    assert ax.get_xlabel() == "loss of a"
    assert len(ax.collections[0].get_offsets()) == 2
    assert found.plot(ax, task=1) is ax
    grid = simplex_grid(3, 4).numpy()
    assert not Front(grid, 1 - grid).plot().axison
    four = simplex_grid(4, 2).numpy()
    assert len(Front(four, 1 - four).plot().lines) == 10
    with pytest.raises(ValueError, match="task must be in"):
        found.plot(task=5)
    plt.close("all")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"palora\[plot\]"):
        found.plot()


def test_missing_pymoo_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymoo.indicators.hv", None)
    monkeypatch.setitem(sys.modules, "pymoo.util.ref_dirs", None)
    with pytest.raises(ImportError, match=r"palora\[moo\]"):
        hypervolume([[0.0, 0.0]], [1, 1], backend="pymoo")
    with pytest.raises(ImportError, match=r"palora\[moo\]"):
        palora.Schedule(3, layout="energy")
