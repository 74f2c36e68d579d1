"""Packed and jagged sequences equal the sequences one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hypermixer import HyperMixing
from hypermixer.packed import pack

F64 = torch.float64
OPTIONS = [
    {},
    {"tied": True},
    {"bias": True},
    {"causal": True},
    {"block_size": 3},
    {"length_scale": "mean"},
    {"head_hidden": "full"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_equals_one_by_one_with_gradients(options):
    layer = HyperMixing(8, 16, 2, init="xavier", dtype=F64, **options)
    lengths = [5, 0, 130, 1, 64]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    x = torch.randn(200, 8, dtype=F64, requires_grad=True)
    single = [layer(part.unsqueeze(0))[0] for part in x.split(lengths)]
    expected = torch.cat(single)
    probe = torch.randn_like(expected)
    inputs = [x, *layer.parameters()]
    wanted = torch.autograd.grad((expected * probe).sum(), inputs)
    for offset_dtype in (torch.int32, torch.int64):
        y = layer(x, cu_seqlens=offsets.to(offset_dtype))
        grads = torch.autograd.grad((y * probe).sum(), inputs)
        for a, b in zip([y, *grads], [expected, *wanted], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    batched = layer(x.unsqueeze(0), cu_seqlens=offsets)
    torch.testing.assert_close(batched[0], expected, rtol=0, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 5))
def test_every_token_lies_in_one_place_of_its_sequence(lengths, block):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    packing = pack(offsets, block)
    total = sum(lengths)
    assert packing.rows.flatten()[packing.place].tolist() == list(range(total))
    assert int((~packing.empty).sum()) == total
    assert packing.position.tolist() == [i for n in lengths for i in range(n)]
    assert packing.rows.numel() <= total + len(lengths) * block


def test_explicit_positions_of_packed_tokens():
    layer = HyperMixing(8, dtype=F64)
    x = torch.randn(5, 8, dtype=F64)
    offsets = torch.tensor([0, 2, 5])
    ids = torch.tensor([0, 1, 0, 1, 2])
    expected = layer(x, cu_seqlens=offsets)
    torch.testing.assert_close(
        layer(x, cu_seqlens=offsets, position_ids=ids), expected, rtol=0, atol=1e-10
    )
    moved = layer(x, cu_seqlens=offsets, position_ids=ids + 3)
    assert not torch.allclose(moved, expected)


def test_no_sequences_at_all():
    layer = HyperMixing(8)
    assert layer(torch.zeros(0, 8), cu_seqlens=torch.tensor([0])).shape == (0, 8)
    causal = HyperMixing(8, causal=True)
    assert causal(torch.zeros(0, 8), cu_seqlens=torch.tensor([0])).shape == (0, 8)


def test_jagged_nested_tensors_are_mixed_each_within_itself():
    layer = HyperMixing(8, 16, 2, dtype=F64)
    parts = [torch.randn(n, 8, dtype=F64) for n in (3, 70)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    out = layer(nested)
    assert out.is_nested
    for row, part in zip(out.unbind(), parts, strict=True):
        torch.testing.assert_close(row, layer(part[None])[0], rtol=0, atol=1e-10)


def test_one_long_sequence_among_short_ones_costs_no_padding():
    from hypermixer.analysis import measure_memory

    layer = HyperMixing(32, 64, 2)
    lengths = [4096, *[1] * 100]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    x = torch.randn(sum(lengths), 32)
    layer(x, cu_seqlens=offsets)
    with torch.no_grad():
        use = measure_memory(lambda: layer(x, cu_seqlens=offsets))
    padded = 101 * 4096 * 32
    assert use.largest_numel < padded / 8


def test_a_nan_stays_in_its_packed_sequence_and_its_gradient_too():
    layer = HyperMixing(8, 16, 2, dtype=F64)
    x = torch.randn(9, 8, dtype=F64)
    expected = layer(x, cu_seqlens=torch.tensor([0, 3, 9]))
    for bad, good in ((slice(0, 3), slice(3, 9)), (slice(3, 9), slice(0, 3))):
        spoilt = x.clone()
        spoilt[bad.start] = torch.nan
        spoilt.requires_grad_()
        out = layer(spoilt, cu_seqlens=torch.tensor([0, 3, 9]))
        torch.testing.assert_close(out[good], expected[good], rtol=0, atol=1e-12)
        out.sum().backward()
        assert spoilt.grad[good].isfinite().all()


def test_nothing_given_with_packed_or_jagged_tokens_is_ignored():
    layer = HyperMixing(8, 16, 2, dtype=F64)
    parts = [torch.randn(n, 8, dtype=F64) for n in (3, 5)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    ids = torch.arange(8) + 2
    moved = layer(nested, position_ids=ids).unbind()
    for row, part, where in zip(moved, parts, ids.split([3, 5]), strict=True):
        expected = layer(part[None], position_ids=where)[0]
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-10)
    other = torch.nested.nested_tensor([2 * p for p in parts], layout=torch.jagged)
    with pytest.raises(ValueError, match="neither key nor value"):
        layer(nested, nested, other)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="no mask"):
        layer(nested, query_padding_mask=mask)
    offsets = torch.tensor([0, 3, 8])
    x = torch.cat(parts)
    with pytest.raises(ValueError, match="not both"):
        layer(x, query_padding_mask=mask, cu_seqlens=offsets)
    with pytest.raises(ValueError, match="cannot be a pair"):
        layer(x, cu_seqlens=offsets, position_ids=(ids, ids + 1))
    with pytest.raises(ValueError, match="cu_seqlens must be an int32 or int64 tensor, got list"):
        layer(x, cu_seqlens=[0, 3, 8])
    with pytest.raises(TypeError, match="query must be a tensor, got list"):
        layer([[1.0] * 8])


@pytest.mark.skipif(
    torch.__version__ < (2, 6), reason="contiguous() of a jagged tensor keeps its gaps before 2.6"
)
def test_jagged_tensors_with_gaps_are_refused_until_contiguous():
    layer = HyperMixing(8, 16, 2, dtype=F64)
    x = torch.randn(2, 6, 8, dtype=F64)
    starts, lengths = torch.tensor([1, 0]), torch.tensor([3, 4])
    nested = torch.nested.narrow(x, 1, starts, lengths, layout=torch.jagged)
    with pytest.raises(ValueError, match="without gaps"):
        layer(nested)
    rows = layer(nested.contiguous()).unbind()
    for row, part in zip(rows, (x[0, 1:4], x[1, :4]), strict=True):
        torch.testing.assert_close(row, layer(part[None])[0], rtol=0, atol=1e-10)
