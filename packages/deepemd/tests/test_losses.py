from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import lap, pair
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from deepemd import losses, metrics
from deepemd.core.distance import cost_matrix
from deepemd.solvers._exact import solve_exact


def by_hand(logits: Tensor, index: Tensor) -> float:
    """The two sums of cross-entropies, written out."""
    total, count = 0.0, 0
    for b in range(len(logits)):
        rows, columns = logits[b].log_softmax(1), logits[b].log_softmax(0)
        for i in range(logits.shape[1]):
            total -= float(rows[i, index[b, i]] + columns[i, index[b, i]]) / 2
            count += 1
    return total / count


def test_matching_loss_equals_the_sums_written_out() -> None:
    logits = torch.randn(3, 7, 7, dtype=torch.float64)
    index = torch.stack([torch.randperm(7) for _ in range(3)])
    assert float(losses.matching_loss(logits, index)) == pytest.approx(by_hand(logits, index))


def test_matching_loss_is_zero_on_a_sharp_match_and_log_n_on_none() -> None:
    index = torch.randperm(9)[None]
    sharp = 30 * torch.nn.functional.one_hot(index, 9).double()
    assert float(losses.matching_loss(sharp, index)) < 1e-11
    assert float(losses.matching_loss(0 * sharp, index)) == pytest.approx(math.log(9), rel=1e-12)


def test_matching_loss_of_both_directions_is_symmetric() -> None:
    logits = torch.randn(2, 6, 6, dtype=torch.float64)
    index = torch.stack([torch.randperm(6) for _ in range(2)])
    swapped = losses.matching_loss(logits.transpose(1, 2), losses.invert(index, 6))
    torch.testing.assert_close(losses.matching_loss(logits, index), swapped, rtol=1e-12, atol=0)
    rows = losses.matching_loss(logits, index, directions="rows")
    back = losses.matching_loss(logits.transpose(1, 2), losses.invert(index, 6), directions="rows")
    torch.testing.assert_close((rows + back) / 2, swapped, rtol=1e-12, atol=0)


def test_padding_rows_do_not_count() -> None:
    logits = torch.randn(1, 6, 6, dtype=torch.float64)
    index = torch.tensor([[2, 0, 1, 3, -1, -1]])
    masked = logits.clone()
    masked[:, 4:], masked[:, :, 4:] = -1e9, -1e9
    expected = losses.matching_loss(logits[:, :4, :4], index[:, :4])
    torch.testing.assert_close(losses.matching_loss(masked, index), expected, rtol=1e-9, atol=0)


def test_any_label_of_tied_points_is_accepted() -> None:
    x, y = pair(1, 5)
    y[:, 1] = y[:, 0]
    x[:, 3] = x[:, 2]
    logits = torch.randn(1, 5, 5, dtype=torch.float64)
    first, second = torch.tensor([[0, 1, 2, 3, 4]]), torch.tensor([[1, 0, 3, 2, 4]])
    options = {"x": x, "y": y, "tie_tolerance": 1e-9}
    a = losses.matching_loss(logits, first, **options)
    # swapping the labels of equal columns, and with them of equal rows, changes nothing
    b = losses.matching_loss(logits, torch.tensor([[1, 0, 2, 3, 4]]), **options)
    assert float(a) < float(losses.matching_loss(logits, first))
    torch.testing.assert_close(a, b, rtol=0, atol=0.2)
    rows = [
        losses.matching_loss(logits, i, y=y, tie_tolerance=1e-9, directions="rows")
        for i in (first, torch.tensor([[1, 0, 2, 3, 4]]))
    ]
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-12, atol=0)
    apart = losses.matching_loss(logits, second, x=x * 0 + torch.arange(5.0)[:, None], y=torch.arange(15.0).view(1, 5, 3), tie_tolerance=1e-9)  # fmt: skip
    torch.testing.assert_close(apart, losses.matching_loss(logits, second), rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match="needs the cloud y"):
        losses.matching_loss(logits, first, tie_tolerance=0.1)
    with pytest.raises(ValueError, match="directions must be one of"):
        losses.matching_loss(logits, first, directions="up")


def test_plan_loss_of_a_permutation_is_the_row_loss() -> None:
    logits = torch.randn(2, 6, 6, dtype=torch.float64)
    index = torch.stack([torch.randperm(6) for _ in range(2)])
    plan = torch.nn.functional.one_hot(index, 6).double() / 6
    expected = losses.matching_loss(logits, index, directions="rows")
    torch.testing.assert_close(losses.plan_loss(logits, plan), expected, rtol=1e-12, atol=0)


def test_dual_loss_is_minus_a_lower_bound_and_tight_at_the_optimum() -> None:
    x, y = pair(3, 12)
    cost = cost_matrix(x, y)
    exact = torch.from_numpy(lap(x, y))
    assert float(losses.dual_loss(torch.randn(3, 12, dtype=torch.float64), cost)) >= -float(
        exact.mean()
    )
    best = solve_exact(x, y, with_potentials=True)
    assert best.g is not None
    torch.testing.assert_close(losses.dual_loss(best.g, cost), -exact.mean(), rtol=1e-12, atol=0)
    g = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: losses.dual_loss(v, cost), (g,))


def test_distance_loss_is_the_mean_absolute_error() -> None:
    a, b = torch.rand(5), torch.rand(5, dtype=torch.float64)
    expected = sum(abs(float(u) - float(v)) for u, v in zip(a, b, strict=True)) / 5
    assert float(losses.distance_loss(a, b)) == pytest.approx(expected, rel=1e-6)


# --- metrics ---------------------------------------------------------------------------------------


def test_distance_metrics_equal_scipy_s_and_numpy_s(rng: np.random.Generator) -> None:
    from scipy import stats

    exact = rng.random(40) + 0.5
    estimate = exact * (1 + 0.1 * rng.standard_normal(40))
    found = metrics.distance_metrics(torch.from_numpy(estimate), torch.from_numpy(exact))
    error = np.abs(estimate - exact) / exact
    assert found["rel_err"] == pytest.approx(error.mean())
    assert found["rel_err_median"] == pytest.approx(np.median(error))
    assert found["rel_err_p95"] == pytest.approx(np.percentile(error, 95))
    assert found["bias"] == pytest.approx(((estimate - exact) / exact).mean())
    assert found["pearson"] == pytest.approx(stats.pearsonr(estimate, exact).statistic)
    assert found["r2"] == pytest.approx(found["pearson"] ** 2)
    assert found["spearman"] == pytest.approx(stats.spearmanr(estimate, exact).statistic)
    assert found["kendall"] == pytest.approx(stats.kendalltau(estimate, exact).statistic)
    zero = metrics.relative_error(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0]))
    assert zero.tolist() == [0.0, math.inf]


def test_matching_metrics_by_hand() -> None:
    index, exact = torch.tensor([[0, 0, 2, 3]]), torch.tensor([[0, 1, 2, 3]])
    assert metrics.accuracy(index, exact).item() == 0.75
    y = torch.tensor([[[0.0], [0.0], [1.0], [2.0]]])
    assert metrics.tolerant_accuracy(index, exact, y).item() == 1.0
    assert metrics.bijectivity(index).item() == 0.75
    assert metrics.bijectivity(torch.tensor([[0, 1]]), 5).item() == 1.0
    assert metrics.excess(torch.tensor([1.1]), torch.tensor([1.0])).item() == pytest.approx(0.1)


def test_gradient_cosine_counts_all_entries_or_each_point_alike() -> None:
    a = torch.tensor([[[10.0, 0.0], [0.0, 1.0]]])
    b = torch.tensor([[[1.0, 0.0], [0.0, -1.0]]])
    assert metrics.gradient_cosine(a, b).item() == pytest.approx(9 / math.sqrt(101 * 2))
    assert metrics.gradient_cosine(a, b, rows=True).item() == pytest.approx(0.0, abs=1e-12)


def test_labels_are_the_optimal_matching_in_any_number_of_processes() -> None:
    from deepemd.data import label

    x, y = pair(5, 20, dtype=torch.float32)
    index, distance = label(x, y)
    for b in range(5):
        cost = torch.cdist(x[b].double(), y[b].double()).numpy()
        assert index[b].tolist() == linear_sum_assignment(cost)[1].tolist()
    np.testing.assert_allclose(distance.numpy(), lap(x, y), rtol=1e-12)
    shared, _ = label(x, y, workers=1)
    assert shared.equal(index)
    assert label(x[:0], y[:0])[0].shape == (0, 20)
    with pytest.raises(ValueError, match=r"must both be \(B, N, D\)"):
        label(x, y[:, :5])
