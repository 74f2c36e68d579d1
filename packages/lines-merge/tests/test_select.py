"""Exact selection by radix histograms, against sorting, torch.topk and torch.kthvalue."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lines_merge as lm
from lines_merge import bracket
from lines_merge import select as select_module
from lines_merge.cells import CELL
from lines_merge.engine import Engine
from lines_merge.select import cuts, keep_count
from lines_merge.sources import MemorySource

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def engine(values: torch.Tensor, parts: int = 1) -> Engine:
    """The values as one task vector, cut into tensors whose sorted names keep the order."""
    pieces = {f"t{i}": part for i, part in enumerate(values.tensor_split(parts))}
    zeros = {name: torch.zeros_like(part) for name, part in pieces.items()}
    return Engine(MemorySource(zeros), {"0": MemorySource(pieces)})


def inputs(kind: str, dtype: torch.dtype, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    values = torch.randn(size, generator=generator)
    if kind == "constant":
        values = torch.full((size,), -2.5)
    elif kind == "denormal":
        values = values * 2.0 ** (-145 if dtype == torch.float32 else -20)
    elif kind == "zero":
        values = torch.zeros(size)
    elif kind == "ties":
        values = torch.randint(-3, 4, (size,), generator=generator).float()
    elif kind == "wide":
        values = torch.exp(20 * values)
        values = values.clamp(max=6e4) if dtype == torch.float16 else values
    return values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["random", "constant", "denormal", "zero", "ties", "wide"])
@pytest.mark.parametrize(("size", "parts"), [(1, 1), (1000, 7), (CELL + 5, 2)])
def test_trim_keeps_exactly_the_largest(
    dtype: torch.dtype, kind: str, size: int, parts: int
) -> None:
    values = inputs(kind, dtype, size)
    scanner = engine(values, parts)
    for density in (0.001, 0.2, 0.5, 0.99, 1.0):
        keep = keep_count(size, density)
        (cut,) = cuts(scanner, [keep])
        kept = []
        for name, entry in scanner.entries.items():
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            part = scanner.models[0].read(name, 0, entry.info.numel).to(wide, copy=True)
            cut.apply(name, 0, part)
            kept.append(part)
        result = torch.cat(kept)
        magnitude = values.abs().to(result.dtype)
        top = torch.topk(magnitude, keep).values
        nonzero = result[result != 0].abs().sort(descending=True).values
        assert torch.equal(nonzero, top[top != 0])
        if keep and keep < size:
            assert cut.value == magnitude.kthvalue(size - keep + 1).values.item()
        # earlier entries first: a stable sort names the very positions
        order = np.argsort(-magnitude.numpy(), kind="stable")[:keep]
        expected = torch.zeros_like(result)
        expected[order] = values.to(result.dtype)[order]
        assert torch.equal(result, expected)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0, 1e-40, -3.5, 1e30]), min_size=1, max_size=60),
    st.integers(0, 60),
    st.integers(1, 5),
)
def test_any_rank_of_any_vector(values: list[float], rank: int, parts: int) -> None:
    tensor = torch.tensor(values)
    scanner = engine(tensor, min(parts, len(values)))
    (cut,) = cuts(scanner, [rank])
    result = []
    for name, entry in scanner.entries.items():
        part = scanner.models[0].read(name, 0, entry.info.numel).clone()
        cut.apply(name, 0, part)
        result.append(part)
    order = np.argsort(-tensor.abs().numpy(), kind="stable")[: min(rank, len(values))]
    expected = torch.zeros_like(tensor)
    expected[order] = tensor[order]
    assert torch.equal(torch.cat(result), expected)


def test_ties_across_cells_are_cut_at_the_right_element() -> None:
    values = torch.ones(3 * CELL + 100)
    values[::3] = 0.5
    keep = int((values == 1).sum()) + 12345
    (cut,) = cuts(engine(values), [keep])
    kept = torch.cat(
        [
            _applied(cut, start, part)
            for start, part in zip(range(0, len(values), CELL), values.split(CELL), strict=True)
        ]
    )
    half = (values == 0.5).nonzero().flatten()
    assert int((kept != 0).sum()) == keep
    assert torch.equal((kept == 0.5).nonzero().flatten(), half[:12345])


def _applied(cut: object, start: int, part: torch.Tensor) -> torch.Tensor:
    part = part.clone()
    cut.apply("t0", start, part)  # type: ignore[attr-defined]
    return part


def check_against_sorting(values: torch.Tensor, keep: int) -> None:
    (cut,) = cuts(engine(values), [keep])
    kept = torch.cat(
        [
            _applied(cut, start, part)
            for start, part in zip(range(0, len(values), CELL), values.split(CELL), strict=True)
        ]
    )
    order = np.argsort(-values.abs().numpy(), kind="stable")[:keep]
    expected = torch.zeros_like(values)
    expected[order] = values[order]
    assert torch.equal(kept, expected)


@pytest.fixture
def radix_used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    used: list[bool] = []
    real = select_module._Search.kth

    def kth(*arguments: object) -> object:
        used.append(True)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(select_module._Search, "kth", kth)
    return used


def large(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(3 * CELL + 100, generator=generator)
    if kind == "misleading":  # the sampled head of every cell is unlike the rest
        for start in range(0, len(values), CELL):
            values[start : start + CELL // bracket.SAMPLE] *= 1e-3
    elif kind == "ties":
        values = (4 * values).round() / 4
    return values


@pytest.mark.parametrize("kind", ["random", "ties", "misleading"])
@pytest.mark.parametrize("share", [0.001, 0.2, 0.9])
def test_a_bracket_is_enough_unless_the_sample_misleads(
    radix_used: list[bool], kind: str, share: float
) -> None:
    values = large(kind)
    check_against_sorting(values, int(share * len(values)))
    # the bracket of a very small share is wide enough for anything
    assert bool(radix_used) == (kind == "misleading" and share > 0.001)


@pytest.mark.parametrize("kind", ["random", "ties"])
def test_a_bracket_with_more_elements_than_are_remembered(
    radix_used: list[bool], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = large(kind)
    keep = int(0.2 * len(values))
    monkeypatch.setattr(bracket, "KEPT", 1000)
    monkeypatch.setattr(bracket, "WIDEST", 1 << 22)
    check_against_sorting(values, keep)
    assert not radix_used  # counted in a histogram
    monkeypatch.setattr(bracket, "WIDEST", 1 << 10)
    check_against_sorting(values, keep)
    assert radix_used  # too wide for a histogram


def test_mixed_precision_ranks_all_entries_together() -> None:
    fine = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    base = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(2)}
    tuned = {"a": fine, "b": torch.tensor([1.0, 3.0])}
    result = lm.merge(base, [tuned], "magnitude", density=0.5, lines=False)
    assert result["a"].tolist() == [0.0, 1.0 + 1e-12]
    assert result["b"].tolist() == [0.0, 3.0]


@given(st.integers(1, 10**9), st.integers(1, 100))
def test_keep_count_is_the_floor_of_what_was_meant(numel: int, percent: int) -> None:
    assert keep_count(numel, percent / 100) == math.floor(Fraction(percent, 100) * numel)


def test_a_density_that_keeps_nothing_returns_the_base() -> None:
    base = {"w": torch.zeros(4)}
    out = lm.merge(base, [{"w": torch.ones(4)}], "magnitude", density=0.2, lines=False)
    assert out["w"].tolist() == [0, 0, 0, 0]
