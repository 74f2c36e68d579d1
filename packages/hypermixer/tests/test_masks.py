"""Padding leaks nowhere: not into valid outputs, not into gradients, whatever it holds."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hypermixer import HyperMixing

F64 = torch.float64
VARIANTS = [
    {},
    {"tied": True},
    {"bias": True},
    {"algorithm": "direct"},
    {"algorithm": "factored"},
    {"chunk_size": 2},
    {"causal": True},
    {"causal": True, "chunk_size": 2},
    {"block_size": 3},
    {"length_scale": "mean"},
    {"token_info": "idiap"},
]


def make(**options) -> HyperMixing:
    layer = HyperMixing(8, 16, 2, **{"init": "xavier", "dtype": F64, **options})
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "bias" in name:
                parameter.normal_()
    return layer


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("content", [0.0, 1e30, float("inf"), float("nan")])
def test_padding_content_reaches_no_output_and_no_gradient(options, content):
    layer = make(**options)
    mask = torch.tensor([[False] * 5 + [True] * 2, [True] * 7])
    results = []
    for filler in (0.0, content):
        x = torch.randn(2, 7, 8, dtype=F64, generator=torch.Generator().manual_seed(1))
        x = x.masked_fill(mask.unsqueeze(-1), filler).requires_grad_()
        y = layer(x, key_padding_mask=mask)
        grads = torch.autograd.grad(y[~mask].square().sum(), [x, *layer.parameters()])
        results.append([y, *grads])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
        assert torch.isfinite(dirty).all()
    padded_grad = results[1][1][mask]
    assert torch.equal(padded_grad, torch.zeros_like(padded_grad))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_padded_equals_unpadded_and_padding_rows_are_the_norm_bias(options):
    layer = make(**options)
    x = torch.randn(2, 7, 8, dtype=F64)
    mask = torch.tensor([[False] * 5 + [True] * 2, [True] * 7])
    y = layer(x, key_padding_mask=mask)
    torch.testing.assert_close(y[0, :5], layer(x[:1, :5])[0], rtol=0, atol=1e-10)
    assert torch.equal(y[mask], layer.norm.bias.expand(9, 8))


# blocks are counted from the first column, padding included, so block-causal mixing is left out
@pytest.mark.parametrize("options", [o for o in VARIANTS if "block_size" not in o], ids=str)
def test_left_padding_with_positions_equals_right_padding(options):
    layer = make(**options)
    x = torch.randn(1, 5, 8, dtype=F64)
    pad = torch.randn(1, 2, 8, dtype=F64)
    right = layer(torch.cat([x, pad], 1), key_padding_mask=torch.tensor([[False] * 5 + [True] * 2]))
    left = layer(
        torch.cat([pad, x], 1),
        key_padding_mask=torch.tensor([[True] * 2 + [False] * 5]),
        position_ids=torch.tensor([[0, 0, 0, 1, 2, 3, 4]]),
    )
    torch.testing.assert_close(left[:, 2:], right[:, :5], rtol=0, atol=1e-10)


def test_key_mask_alone_equals_both_masks_at_valid_positions():
    layer = make()
    x = torch.randn(1, 6, 8, dtype=F64)
    mask = torch.tensor([[False, True, False, False, True, False]])
    one = layer(x, key_padding_mask=mask)
    both = layer(x, key_padding_mask=mask, query_padding_mask=mask.clone())
    assert torch.equal(one, both)


def test_query_mask_apart_from_the_key_mask():
    layer = make()
    x = torch.randn(1, 6, 8, dtype=F64)
    keys = torch.tensor([[False, False, False, False, True, True]])
    queries = torch.tensor([[True, False, False, False, False, False]])
    y = layer(x, key_padding_mask=keys, query_padding_mask=queries)
    state = oracle.state_of(layer)
    expected = oracle.mix(state, x[0], x[0, :4])
    torch.testing.assert_close(y[0, 1:], expected[1:], rtol=0, atol=1e-10)
    assert torch.equal(y[0, 0], layer.norm.bias)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_cross_mixing_with_both_masks(chunk_size):
    layer = make(chunk_size=chunk_size, bias=True)
    q, k = torch.randn(2, 3, 8, dtype=F64), torch.randn(2, 5, 8, dtype=F64)
    key_mask = torch.tensor([[False, False, True, True, True], [True] * 5])
    query_mask = torch.tensor([[False, False, True], [False] * 3])
    q[0, 2], k[0, 2:] = float("nan"), float("inf")
    y = layer(q, k, None, key_mask, query_mask)
    value = k.clone()
    assert torch.equal(layer(q, k, value, key_mask, query_mask), y)
    expected = layer(q[:1, :2], k[:1, :2])
    torch.testing.assert_close(y[0, :2], expected[0], rtol=0, atol=1e-10)
    assert torch.equal(y[0, 2], layer.norm.bias)
    assert torch.isfinite(y).all()
    # No keys at all: S = 0 and σ(0) = 0, so every query reads zero.
    torch.testing.assert_close(y[1], layer.norm.bias.expand(3, 8), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.float64])
def test_mask_dtypes_mean_the_same(dtype):
    layer = make()
    x = torch.randn(1, 4, 8, dtype=F64)
    mask = torch.tensor([[False, True, False, True]])
    given_mask = mask.to(dtype)
    if dtype.is_floating_point:
        given_mask = torch.zeros(1, 4, dtype=dtype).masked_fill(mask, float("-inf"))
    assert torch.equal(layer(x, key_padding_mask=given_mask), layer(x, key_padding_mask=mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"tied": True}, {"causal": True}, {"chunk_size": 16}], ids=str
)
def test_sixteen_bit_modules_take_masks(dtype, options):
    layer = HyperMixing(16, 32, 4, dtype=dtype, bias=True, **options)
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[0, 30:] = True
    x = torch.randn(2, 40, 16, dtype=dtype)
    x[0, 30:] = float("nan")
    x.requires_grad_()
    y = layer(x, key_padding_mask=mask)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    wide = HyperMixing(16, 32, 4, bias=True, **options)
    wide.load_state_dict(layer.state_dict())
    expected = wide(x.detach().float(), key_padding_mask=mask)
    # 8 bits of mantissa, outputs of size about 1 after LayerNorm
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.08)


def test_float16_does_not_overflow_before_the_norm():
    layer = HyperMixing(16, 32, dtype=torch.float16, init="xavier")
    x = 30 * torch.randn(1, 400, 16, dtype=torch.float16)
    wide = HyperMixing(16, 32, norm=False)
    wide.load_state_dict({k: v for k, v in layer.state_dict().items() if "norm" not in k})
    assert wide(x.float()).abs().max() > torch.finfo(torch.float16).max
    assert torch.isfinite(layer(x)).all()
    assert layer(x).dtype == torch.float16


def test_float16_with_another_norm_or_none_keeps_its_dtype():
    x = torch.randn(1, 10, 16, dtype=torch.float16)
    for norm in (False, torch.nn.RMSNorm(16, dtype=torch.float16)):
        y = HyperMixing(16, norm=norm, dtype=torch.float16)(x)
        assert y.dtype == torch.float16
        assert torch.isfinite(y).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_sums_in_float32(dtype):
    layer = HyperMixing(16, 32, 4)
    x = torch.randn(2, 50, 16)
    expected = layer(x)
    with torch.autocast("cpu", dtype):
        y = layer(x)
        layer.chunk_size = 8
        chunked = layer(x)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(chunked.float(), y.float(), rtol=0.02, atol=0.02)
    # backward outside the autocast region recomputes inside it
    chunked.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**31))


@settings(max_examples=25, deadline=None)
@given(shapes)
def test_batch_rows_do_not_see_each_other(shape):
    batch, length, seed = shape
    generator = torch.Generator().manual_seed(seed)
    layer = make(bias=True)
    x = torch.randn(batch, length, 8, dtype=F64, generator=generator)
    alone = torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(layer(x), alone, rtol=0, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(shapes)
def test_without_positions_the_layer_is_permutation_equivariant(shape):
    batch, length, seed = shape
    generator = torch.Generator().manual_seed(seed)
    layer = make(token_info=None, tied=seed % 2 == 0)
    x = torch.randn(batch, length, 8, dtype=F64, generator=generator)
    order = torch.randperm(length, generator=generator)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], rtol=0, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(shapes)
def test_cross_mixing_does_not_depend_on_the_order_of_the_keys(shape):
    batch, length, seed = shape
    generator = torch.Generator().manual_seed(seed)
    layer = make()
    q = torch.randn(batch, 4, 8, dtype=F64, generator=generator)
    k = torch.randn(batch, length, 8, dtype=F64, generator=generator)
    order = torch.randperm(length, generator=generator)
    ids = (torch.arange(4), torch.arange(length))
    moved = (ids[0], order)
    torch.testing.assert_close(
        layer(q, k[:, order], position_ids=moved), layer(q, k, position_ids=ids), rtol=0, atol=1e-10
    )


@settings(max_examples=25, deadline=None)
@given(shapes)
def test_tokens_and_positions_permuted_together(shape):
    batch, length, seed = shape
    generator = torch.Generator().manual_seed(seed)
    layer = make(token_info="idiap")
    x = torch.randn(batch, length, 8, dtype=F64, generator=generator)
    order = torch.randperm(length, generator=generator)
    moved = layer(x[:, order], position_ids=order)
    torch.testing.assert_close(moved, layer(x)[:, order], rtol=0, atol=1e-10)


def test_heads_see_their_slice_only():
    layer = make(norm=False, token_info=None)
    x = torch.randn(1, 6, 8, dtype=F64)
    changed = x.clone()
    changed[..., :4] += torch.randn(1, 6, 4, dtype=F64)
    before, after = layer(x), layer(changed)
    assert torch.equal(before[..., 4:], after[..., 4:])
    assert not torch.allclose(before[..., :4], after[..., :4])
