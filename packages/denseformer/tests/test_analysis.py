from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from torch import Tensor, nn

from denseformer import DWA, DenseStack, analysis, densify
from denseformer.core.suggest import suggest

mpl.use("Agg")


def test_matrix_and_off_diagonal_are_the_rows() -> None:
    dwa = randomise(DWA(6, 2, 3))
    matrix = analysis.weight_matrix(dwa)
    assert matrix.shape == (2, 7)
    for n, i in enumerate(dwa.rows):
        assert torch.equal(matrix[n, list(dwa.sources(i))], dwa.row(i).detach())
    assert int((matrix != 0).sum()) == dwa.spec.nnz
    others = [float(matrix[n, j]) for n, i in enumerate(dwa.rows) for j in dwa.sources(i) if j != i]
    assert analysis.off_diagonal(dwa).tolist() == others


def test_plots_show_the_weights(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    dwa = randomise(DWA(6, 2))
    figure = analysis.plot_weights(dwa)
    figure.savefig(tmp_path / "alpha.png")
    assert (tmp_path / "alpha.png").stat().st_size > 0
    shown = figure.axes[0].images[0]
    assert (shown.norm.vmin, shown.norm.vmax, shown.norm.linthresh) == (-1, 1, 0.05)
    assert shown.get_array().shape == (6, 7)
    assert int(shown.get_array().count()) == dwa.spec.nnz
    own, mine = plt.subplots()
    assert analysis.plot_weights(dwa, mine) is own
    assert len(mine.images) == 1
    with pytest.warns(UserWarning, match="plain"):
        empty = DWA(3, period=4)
    with pytest.raises(ValueError, match="nothing to draw"):
        analysis.plot_weights(empty)
    history = analysis.WeightHistory(dwa)
    for step in (0, 5):
        history.record(step)
        with torch.no_grad():
            dwa.weight.add_(1.0)
    assert torch.equal(history.stacked()[1], history.stacked()[0] + 1)
    assert len(history.plot().lines) == dwa.spec.nnz
    plt.close("all")


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"denseformer\[plot\]"):
        analysis.plot_weights(DWA(2))


@pytest.mark.parametrize("keep", [False, True])
def test_pruning_zeroes_the_smallest(keep: bool) -> None:
    for fraction in (0.0, 0.3, 0.5, 1.0):
        dwa = randomise(DWA(5))
        before = dwa.weight.detach().clone()
        count = analysis.prune(dwa, fraction, keep_diagonal=keep)
        after = dwa.weight.detach()
        gone = (after == 0) & (before != 0)
        assert int(gone.sum()) == count == min(int(fraction * 20), 15 if keep else 20)
        assert torch.equal(after[~gone], before[~gone])
        candidates = torch.ones(20, dtype=torch.bool)
        if keep:
            candidates[[1, 4, 8, 13, 19]] = False
            assert not gone[~candidates].any()
        if count and (candidates & ~gone).any():
            assert before[gone].abs().max() <= before[candidates & ~gone].abs().min()
    for bad in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"fraction must be from 0 to 1, got {bad}"):
            analysis.prune(DWA(2), bad)


def test_a_pruning_curve_leaves_the_weights_as_they_were() -> None:
    dwa = randomise(DWA(5))
    before = dwa.weight.detach().clone()
    curve = analysis.pruning_curve(dwa, lambda: float((dwa.weight == 0).sum()), (0, 0.25, 1))
    assert curve == {0.0: 0.0, 0.25: 5.0, 1.0: 20.0}
    with pytest.raises(ValueError, match="fraction"):
        analysis.pruning_curve(dwa, lambda: 0.0, (0.5, 2))
    assert torch.equal(dwa.weight.detach(), before)


class Shift(nn.Module):
    def __init__(self, by: list[float]) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


def test_cosines_are_those_of_what_the_blocks_see() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    blocks = [Shift([0.0, 1.0]), Shift([3.0, 0.0]), Shift([0.0, 0.0])]
    want = [x, x + blocks[0].by, x + blocks[0].by + blocks[1].by]
    expected = [float(F.cosine_similarity(y, x, dim=-1).mean().detach()) for y in want]
    model = nn.ModuleDict({"stack": nn.ModuleList(blocks)})

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = model["stack"]

        def forward(self, x: Tensor) -> Tensor:
            for block in self.stack:
                x = block(x)
            return x

    plain = analysis.cosine_to_embedding(Chain(), x)
    assert plain.tolist() == pytest.approx(expected)
    assert analysis.cosine_to_embedding(densify(Chain()), x).tolist() == pytest.approx(expected)
    stack = DenseStack([Shift([0.0, 1.0]), Shift([3.0, 0.0])])
    with torch.no_grad():
        stack.dwa.weight.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0]))  # Y_1 = X_0
    assert analysis.cosine_to_embedding(stack, x).tolist() == pytest.approx([1.0, 1.0])


def test_singular_values_are_normalised() -> None:
    layer = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([4.0, -2.0, 1.0])))
    assert analysis.singular_values(layer)["weight"].tolist() == pytest.approx([1.0, 0.5, 0.25])


def test_suggestions_satisfy_the_rule_of_interplay() -> None:
    found = suggest(48)
    assert {(s.dilation, s.period) for s in found} == {
        (k, p) for k in range(1, 9) for p in range(1, 9) if p % k == 1 % k
    }
    by = {(s.dilation, s.period): s for s in found}
    assert (by[4, 5].weights, by[4, 5].rows, by[4, 5].traffic, by[4, 5].live) == (62, 9, 71, 8)
    assert [s.traffic for s in found] == sorted((s.traffic for s in found), reverse=True)
    with pytest.raises(ValueError, match="depth must be at least 1"):
        suggest(0)


def test_cosine_looks_at_the_blocks_that_were_densified() -> None:
    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.second = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.again = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            for layer in (*self.first, *self.second, self.again, self.again):
                x = layer(x)
            return x

    x = torch.randn(5, 4)
    for blocks, start in (("second", 3), (None, 6)):
        model = Twin()
        plain = [*model.first, *model.second, model.again, model.again]
        densify(model, blocks=blocks or [model.again] * 2)
        seen = [x]
        for layer in plain:
            seen.append(F.linear(seen[-1], layer.weight, layer.bias))
        depth = model.dwa.depth
        want = [F.cosine_similarity(y, seen[start], dim=-1).mean() for y in seen[start:][:depth]]
        found = analysis.cosine_to_embedding(model, x)
        torch.testing.assert_close(found, torch.stack(want))


def test_a_share_that_is_a_whole_number_of_weights_is_that_number() -> None:
    dwa = randomise(DWA(10, pattern="final"))  # 11 weights
    assert analysis.prune(dwa, 0.0) == 0
    hundred = randomise(DWA(99, pattern="final"))
    for percent in range(101):
        assert analysis.prune(hundred, percent / 100) == percent
