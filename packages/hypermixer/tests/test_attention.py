"""The wrapper has nn.MultiheadAttention's signature, layouts and masks."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from hypermixer import HyperMixing, HyperMixingAttention

F64 = torch.float64


def test_the_call_signature_is_that_of_multihead_attention():
    def plain(function):
        parameters = list(inspect.signature(function).parameters.values())
        return [(p.name, p.kind) for p in parameters]

    assert plain(HyperMixingAttention.forward) == plain(nn.MultiheadAttention.forward)
    ours = inspect.signature(HyperMixingAttention.forward).parameters
    theirs = inspect.signature(nn.MultiheadAttention.forward).parameters
    for name in list(theirs)[4:]:
        assert ours[name].default == theirs[name].default


def test_layouts_agree():
    first = HyperMixingAttention(8, 2, 16, batch_first=True, dtype=F64)
    second = HyperMixingAttention(8, 2, 16, dtype=F64)
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, 5, 8, dtype=F64)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    expected = first.mixing(x, key_padding_mask=mask)
    out, weights = first(x, x, x, key_padding_mask=mask)
    assert weights is None
    assert torch.equal(out, expected)
    turned = x.transpose(0, 1)
    out, _ = second(turned, turned, turned, key_padding_mask=mask)
    torch.testing.assert_close(out, expected.transpose(0, 1), rtol=0, atol=1e-10)
    for layer in (first, second):
        out, _ = layer(x[0], x[0], x[0], key_padding_mask=mask[0])
        torch.testing.assert_close(out, expected[0], rtol=0, atol=1e-10)


def test_float_masks_as_torch_passes_them():
    layer = HyperMixingAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    additive = torch.zeros(2, 5).masked_fill(mask, float("-inf"))
    expected, _ = layer(x, x, x, key_padding_mask=mask)
    got, _ = layer(x, x, x, key_padding_mask=additive)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("batch_first", [False, True])
def test_tied_layers_know_self_attention_by_identity(batch_first):
    layer = HyperMixingAttention(8, 2, batch_first=batch_first, tied=True)
    x = torch.randn(4, 5, 8)
    out, _ = layer(x, x, x)
    assert out.shape == x.shape
    with pytest.raises(ValueError, match="tied=True"):
        layer(x, x.clone(), x)


def test_cross_mixing():
    layer = HyperMixingAttention(8, 2, batch_first=True, dtype=F64)
    q, k, v = (torch.randn(2, n, 8, dtype=F64) for n in (3, 6, 6))
    out, _ = layer(q, k, v)
    assert torch.equal(out, layer.mixing(q, k, v))
    assert torch.equal(layer(q, k, k)[0], layer.mixing(q, k))


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_causal_mask_is_accepted_by_a_causal_layer(kind, batch_first):
    layer = HyperMixingAttention(8, 2, batch_first=batch_first, causal=True)
    x = torch.randn(5, 5, 8)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    if kind == "float":
        mask = nn.Transformer.generate_square_subsequent_mask(5)
    expected, _ = layer(x, x, x)
    for options in ({}, {"is_causal": True}):
        assert torch.equal(layer(x, x, x, attn_mask=mask, **options)[0], expected)
    assert torch.equal(layer(x[0], x[0], x[0], attn_mask=mask)[0], layer.mixing(x[:1])[0])


def test_dropout_acts_on_the_output_while_training():
    layer = HyperMixingAttention(8, 2, dropout=0.5, batch_first=True)
    x = torch.randn(2, 50, 8)
    dropped = layer(x, x, x)[0] == 0
    assert 0.4 < dropped.float().mean() < 0.6
    layer.eval()
    assert torch.equal(layer(x, x, x)[0], layer.mixing(x))


def test_the_fast_path_is_kept_off():
    layer = HyperMixingAttention(8, 2, batch_first=True)
    assert layer.in_proj_bias is None
    assert layer._qkv_same_embed_dim is False
    assert layer.num_heads == 2
    assert isinstance(layer.mixing, HyperMixing)
    assert "batch_first=True, dropout=0.0" in repr(layer)


def test_jagged_tensors_pass_through():
    layer = HyperMixingAttention(8, 2, batch_first=True)
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=torch.jagged)
    out, _ = layer(nested, nested, nested)
    assert out.is_nested


def test_detached_values_take_no_gradient():
    layer = HyperMixingAttention(8, 2, batch_first=True, dtype=torch.float64)
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    gradients = []
    for make in (lambda t: t.detach(), lambda t: t.detach().clone()):
        query = x.clone().requires_grad_()
        layer(query, query, make(query))[0].square().cumsum(-1).sum().backward()
        gradients.append(query.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)
