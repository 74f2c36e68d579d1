from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from denseformer import DWA, Geometry
from denseformer.core.geometry import describe_code
from denseformer.core.plan import Plan, plan_of


@pytest.mark.parametrize(
    ("depth", "k", "p", "count"),
    [
        (48, 1, 1, 1224), (48, 2, 1, 624), (48, 4, 1, 324), (48, 8, 1, 174), (48, 12, 1, 124),
        (48, 4, 3, 112), (48, 4, 4, 90), (48, 4, 5, 62), (48, 4, 8, 48), (48, 4, 10, 28),
        (48, 4, 15, 24), (48, 4, 20, 17), (72, 1, 1, 2700), (72, 4, 1, 702), (72, 4, 5, 140),
        (100, 1, 1, 5150),
    ],
)  # fmt: skip
def test_counts_of_the_paper(depth: int, k: int, p: int, count: int) -> None:
    assert Geometry(depth, k, p).nnz == count


@given(st.integers(1, 20), st.integers(1, 22), st.integers(1, 22))
def test_sources_are_those_of_the_definition(depth: int, k: int, p: int) -> None:
    g = Geometry(depth, k, p)
    for i in range(1, depth + 1):
        brute = [j for j in range(i + 1) if (i - j) % k == 0] if i % p == 0 else []
        assert list(g.sources(i)) == brute
        assert not brute or (brute[-1] == i and len(brute) == i // k + 1)
    assert g.rows == tuple(range(p, depth + 1, p))


@given(st.integers(1, 200))
def test_full_denseformer_has_the_closed_count(depth: int) -> None:
    assert Geometry(depth).nnz == depth * (depth + 3) // 2


def test_sparsities_are_exact() -> None:
    assert round(100 * Geometry(48, 12).sparsity, 1) == 89.9  # the paper prints 92
    assert round(100 * Geometry(48, 4, 5).sparsity, 1) == 94.9
    assert round(100 * Geometry(48, pattern="final").sparsity, 1) == 96.0


def test_interplay_of_dilation_and_period() -> None:
    """Row mp can read the first output computed from the average before it iff p = 1 (mod k)."""
    for k in range(1, 7):
        for p in range(1, 9):
            reads = (p + 1) in Geometry(4 * p, k, p).sources(2 * p)
            assert reads == (p % k == 1 % k)
    assert Geometry(48, 4, 4).sources(8) == (0, 4, 8)


def test_a_depth_that_the_period_does_not_divide_ends_without_an_average() -> None:
    assert Geometry(48, 4, 5).rows == (5, 10, 15, 20, 25, 30, 35, 40, 45)


def test_dilation_beyond_the_depth_leaves_one_gain_per_block() -> None:
    g = Geometry(3, dilation=4)
    assert [g.sources(i) for i in g.rows] == [(1,), (2,), (3,)]


def test_last_k_and_final() -> None:
    g = Geometry(48, pattern="last_k", last_k=4)
    assert g.sources(1) == (0, 1)
    assert g.sources(9) == (0, 6, 7, 8, 9)
    assert g.nnz == sum(1 + min(i, 4) for i in range(1, 49)) == 234
    g = Geometry(48, pattern="final")
    assert g.rows == (48,)
    assert g.nnz == 49


def test_groups_store_every_gth_output_and_dilate_in_groups() -> None:
    g = Geometry(12, dilation=2, groups=3)
    assert g.rows == (3, 6, 9, 12)
    assert g.sources(12) == (0, 6, 12)
    assert g.sources(9) == (3, 9)


def test_a_mask_is_read_row_by_row() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]], dtype=torch.bool)
    g = Geometry.build(3, pattern=mask)
    assert g.rows == (1, 3)
    assert g.sources(3) == (1, 3)
    other = mask.clone()
    other[2, 0] = True
    assert g.code() != Geometry.build(3, pattern=other).code()


def test_liveness_at_a_boundary() -> None:
    for k, p, live, pending in ((1, 1, 25, 24), (4, 5, 25, 5), (4, 10, 13, 2)):
        g = Geometry(48, k, p)
        assert (len(g.live(24)), len(g.pending(24))) == (live, pending)
    peaks = {}
    for k, p in ((1, 1), (4, 5), (4, 10)):
        g = Geometry(48, k, p)
        peaks[k, p] = max(min(len(g.live(i)), len(g.pending(i))) for i in range(49))
    assert peaks == {(1, 1): 24, (4, 5): 8, (4, 10): 4}


@pytest.mark.parametrize(
    ("depth", "k", "most"),
    [(24, 1, 196), (48, 1, 486), (72, 1, 836), (96, 1, 1256), (192, 1, 3276)],
)
def test_blocked_traffic_grows_as_depth_to_the_three_halves(depth: int, k: int, most: int) -> None:
    """Counted as in the plan's docstring; pull needs nnz + rows."""
    g = Geometry(depth, k)
    plan = plan_of(g)
    assert plan.traffic <= most
    assert Plan(plan.depth, 1, plan.sources, plan.steps, len(plan.sources)).traffic == g.nnz + depth


def test_sparse_geometries_use_plain_pull() -> None:
    plan = plan_of(Geometry(48, 4, 5))
    assert len(plan.groups) == 1
    assert plan.traffic == 62 + 9


@pytest.mark.parametrize("name", ["depth", "dilation", "period", "last_k", "groups"])
def test_bad_integers_are_named(name: str) -> None:
    for value, error in ((0, ValueError), (-2, ValueError), (True, TypeError), (2.0, TypeError)):
        arguments = {"depth": 4, name: value}
        with pytest.raises(error, match=rf"{name} must be .*{value}"):
            DWA(**arguments)


def test_other_bad_geometries() -> None:
    with pytest.raises(ValueError, match="groups=3 does not divide depth=4"):
        DWA(4, groups=3)
    with pytest.raises(ValueError, match=r"pattern must be .*'diagonal'"):
        DWA(4, pattern="diagonal")
    with pytest.raises(ValueError, match="pass the boolean mask itself"):
        DWA(4, pattern="mask")
    with pytest.raises(ValueError, match="belong to pattern='dilated', not to 'final'"):
        DWA(4, 2, pattern="final")
    mask = torch.ones(3, 4, dtype=torch.bool).tril(1)
    with pytest.raises(
        ValueError, match=r"must be boolean of shape \(4, 5\).*got torch.bool of shape \(3, 4\)"
    ):
        DWA(4, pattern=mask)
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        DWA(3, pattern=mask.float())
    bad = mask.clone()
    bad[0, 3] = True
    with pytest.raises(ValueError, match="mask row 1 reads X_3"):
        DWA(3, pattern=bad)
    bad = mask.clone()
    bad[1, 2] = False
    with pytest.raises(ValueError, match="mask row 2 must include its diagonal, X_2"):
        DWA(3, pattern=bad)
    with pytest.raises(ValueError, match="i must be a depth from 1 to 3, got 4"):
        DWA(3).sources(4)


def test_a_period_beyond_the_depth_warns_and_is_a_plain_network() -> None:
    with pytest.warns(UserWarning, match="period=5 is beyond depth=4"):
        dwa = DWA(4, period=5)
    run, x = dwa.begin(torch.ones(2)), torch.ones(2)
    for _ in range(4):
        y = x.sin()
        x = run(y)
        assert x is y
    assert dwa.matrix().shape == (4, 5)


def test_codes_are_described() -> None:
    assert "depth=4, dilation=2" in describe_code(Geometry(4, 2).code())
    assert "last_k=3" in describe_code(Geometry(4, pattern="last_k", last_k=3).code())
    assert "unknown format" in describe_code([9])
    assert str(Geometry(4, groups=2)) == "1x1, groups=2, depth 4, 2 rows, 5 weights"
    assert str(Geometry(4, pattern="last_k")) == "last_k, last_k=4, depth 4, 4 rows, 14 weights"
