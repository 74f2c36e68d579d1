"""Encoder layers equal their formulas, alone and inside nn.TransformerEncoder, in train and eval."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hypermixer import (
    HyperConformerLayer,
    HyperMixerConfig,
    HyperMixerEncoder,
    HyperMixerEncoderLayer,
    HyperMixerForSequenceClassification,
)
from hypermixer.layers import ConvolutionModule

F64 = torch.float64


def manual(layer: HyperMixerEncoderLayer, x, mask=None):
    mixing = layer.self_attn.mixing

    def features(t):
        return layer.linear2(nn.functional.gelu(layer.linear1(t)))

    if layer.layout == "pre":
        x = x + mixing(layer.norm1(x), key_padding_mask=mask)
        return x + features(layer.norm2(x))
    if layer.layout == "post":
        x = layer.norm1(x + mixing(x, key_padding_mask=mask))
        return layer.norm2(x + features(x))
    x = x + layer.scale1 * mixing(x, key_padding_mask=mask)
    return x + layer.scale2 * features(x)


@pytest.mark.parametrize("layout", ["pre", "post", "rezero"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_inside_transformer_encoder_in_train_and_eval(layout, training, padded):
    layer = HyperMixerEncoderLayer(16, 4, 32, dropout=0.0, layout=layout, dtype=F64)
    if layout == "rezero":
        nn.init.constant_(layer.scale1, 0.7)
        nn.init.constant_(layer.scale2, -0.3)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    x = torch.randn(2, 7, 16, dtype=F64)
    mask = None
    if padded:
        mask = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    expected = x
    for own in encoder.layers:
        expected = manual(own, expected, mask)
    with torch.set_grad_enabled(training):  # torch's fast path needs gradients off
        out = encoder(x, src_key_padding_mask=mask)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


def test_encoders_made_with_nested_tensors_say_so_and_still_agree():
    layer = HyperMixerEncoderLayer(16, 4, 32, norm_first=False)
    with pytest.warns(UserWarning, match="enable_nested_tensor is True"):
        encoder = nn.TransformerEncoder(layer, 1).eval()
    x = torch.randn(2, 7, 16)
    mask = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    with torch.no_grad():
        out = encoder(x, src_key_padding_mask=mask)
        expected = manual(encoder.layers[0], x, mask)
    torch.testing.assert_close(out, expected)


def test_layouts_and_argument_order_follow_torch():
    assert HyperMixerEncoderLayer(8, norm_first=False).layout == "post"
    assert HyperMixerEncoderLayer(8).layout == "pre"
    layer = HyperMixerEncoderLayer(8, 2, 24, 48)
    assert layer.linear1.out_features == 24
    assert layer.self_attn.mixing.hidden_dim == 48
    with pytest.raises(ValueError, match="layout must be one of 'pre', 'post', 'rezero'"):
        HyperMixerEncoderLayer(8, layout="sandwich")
    with pytest.raises(ValueError, match="dim_feedforward must be a positive int, got 0"):
        HyperMixerEncoderLayer(8, dim_feedforward=0)


def test_rezero_starts_as_the_identity():
    layer = HyperMixerEncoderLayer(8, layout="rezero")
    x = torch.randn(2, 5, 8)
    assert torch.equal(layer(x), x)


def test_sequence_first_layers():
    layer = HyperMixerEncoderLayer(8, 2, batch_first=False, dropout=0.0)
    x = torch.randn(5, 3, 8)
    first = copy.deepcopy(layer)
    first.self_attn.batch_first = True
    torch.testing.assert_close(layer(x), first(x.transpose(0, 1)).transpose(0, 1))


def test_causal_layers_take_torchs_causal_mask():
    layer = HyperMixerEncoderLayer(8, 2, causal=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(1, 6, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    out = encoder(x, mask=mask, is_causal=True)
    shorter = encoder(x[:, :4])
    torch.testing.assert_close(out[:, :4], shorter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["pre", "rezero"])
def test_reset_parameters_after_the_meta_device(layout):
    layer = HyperMixerEncoderLayer(8, 2, layout=layout, device="meta")
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.isfinite(layer(torch.randn(1, 4, 8))).all()


def test_hyperconformer_equals_its_formula():
    layer = HyperConformerLayer(16, 2, 32, kernel_size=5, dropout=0.0, dtype=F64)
    x = torch.randn(2, 9, 16, dtype=F64)

    def features(net, t):
        norm, up, _, _, down, _ = net
        return down(nn.functional.silu(up(norm(t))))

    def convolution(net, t):
        t = nn.functional.glu(net.expand(net.norm(t)), dim=-1)
        padded = torch.cat([t.new_zeros(2, 2, 16), t, t.new_zeros(2, 2, 16)], 1)
        rows = [
            (padded[:, i : i + 5] * net.depthwise.weight[:, 0].T).sum(1) + net.depthwise.bias
            for i in range(9)
        ]
        return net.project(nn.functional.silu(net.inner_norm(torch.stack(rows, 1))))

    y = x + 0.5 * features(layer.features1, x)
    y = y + layer.mixing(layer.mixing_norm(y))
    y = y + convolution(layer.convolution, y)
    y = layer.norm(y + 0.5 * features(layer.features2, y))
    torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-10)


def test_hyperconformer_defaults_are_speechbrains():
    layer = HyperConformerLayer(16, 4)
    assert layer.mixing.hidden_dim == 64
    assert layer.mixing.bias
    assert not layer.mixing.tied
    assert layer.mixing.norm is not None
    assert layer.convolution.depthwise.kernel_size == (31,)


def test_hyperconformer_padding_does_not_leak():
    layer = HyperConformerLayer(16, 2, kernel_size=5, dropout=0.0, dtype=F64).eval()
    x = torch.randn(1, 6, 16, dtype=F64)
    padded = torch.cat([x, torch.full((1, 3, 16), float("nan"), dtype=F64)], 1)
    mask = torch.tensor([[False] * 6 + [True] * 3])
    out = layer(padded, key_padding_mask=mask)
    torch.testing.assert_close(out[:, :6], layer(x), rtol=0, atol=1e-10)
    assert torch.isfinite(out).all()


def test_causal_hyperconformer_does_not_see_the_future():
    layer = HyperConformerLayer(8, 2, kernel_size=4, causal=True, dropout=0.0, dtype=F64).eval()
    x = torch.randn(1, 7, 8, dtype=F64)
    torch.testing.assert_close(layer(x)[:, :4], layer(x[:, :4]), rtol=0, atol=1e-10)


def test_kernel_sizes():
    with pytest.raises(ValueError, match="kernel_size must be odd unless causal, got 4"):
        ConvolutionModule(8, 4)
    with pytest.raises(ValueError, match="kernel_size must be a positive int, got 0"):
        ConvolutionModule(8, 0)


def test_encoder_is_its_layers_and_a_norm():
    encoder = HyperMixerEncoder(8, 2, nhead=2, dropout=0.0, dtype=F64)
    x = torch.randn(2, 5, 8, dtype=F64)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = x
    for layer in encoder.layers:
        expected = manual(layer, expected, mask)
    torch.testing.assert_close(encoder(x, mask), encoder.norm(expected), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="num_layers must be a positive int"):
        HyperMixerEncoder(8, 0)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_classifier_ignores_padding(pooling):
    config = HyperMixerConfig(
        vocab_size=20, num_classes=3, d_model=16, num_layers=2, pooling=pooling, dropout=0.0
    )
    model = HyperMixerForSequenceClassification(config).eval()
    ids = torch.tensor([[4, 7, 9, 0, 0]])
    short = model(ids[:, :3])
    torch.testing.assert_close(model(ids), short, rtol=1e-5, atol=1e-5)
    other = ids.clone()
    other[0, 3:] = 11
    mask = torch.tensor([[False] * 3 + [True] * 2])
    torch.testing.assert_close(model(other, mask), short, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(other), short)


def test_classifier_without_a_padding_token():
    config = HyperMixerConfig(vocab_size=20, d_model=16, num_layers=1, pad_id=None)
    assert HyperMixerForSequenceClassification(config)(
        torch.zeros(2, 4, dtype=torch.long)
    ).shape == (2, 2)


def test_classifier_input():
    config = HyperMixerConfig(vocab_size=20, d_model=16, num_layers=1)
    with pytest.raises(TypeError, match="input_ids must be integers"):
        HyperMixerForSequenceClassification(config)(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="pooling must be one of 'mean', 'first'; got 'max'"):
        HyperMixerForSequenceClassification(HyperMixerConfig(pooling="max"))


def test_config_round_trip_and_the_papers_size():
    config = HyperMixerConfig()
    assert HyperMixerConfig(**config.to_dict()) == config
    with torch.device("meta"):
        model = HyperMixerForSequenceClassification(config)
    embeddings = model.embedding.weight.numel()
    total = sum(p.numel() for p in model.parameters())
    assert embeddings == 30_522 * 256
    assert 10.5e6 < total < 12e6  # the paper's models: 11 to 12 M, two thirds of them embeddings
    assert 0.6 < embeddings / total < 0.75


@pytest.mark.parametrize("layout", ["pre", "post", "rezero"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_padding_reaches_no_gradient_of_a_layer(layout, batch_first):
    layer = HyperMixerEncoderLayer(8, 2, layout=layout, dropout=0.0, batch_first=batch_first)
    if layout == "rezero":
        torch.nn.init.ones_(layer.scale1)
        torch.nn.init.ones_(layer.scale2)
    mask = torch.tensor([[False] * 3 + [True] * 2, [False] * 3 + [True] * 2])
    gradients = []
    for content in (0.0, torch.nan, torch.inf):
        torch.manual_seed(1)
        x = torch.randn(2, 5, 8).masked_fill(mask[..., None], content)
        turned = x if batch_first else x.transpose(0, 1)
        y = layer(turned, src_key_padding_mask=mask)
        y = y if batch_first else y.transpose(0, 1)
        layer.zero_grad()
        y[:, :3].square().sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
    for other in gradients[1:]:
        for mine, theirs in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(theirs, mine, rtol=0, atol=0)
    one = layer.eval()(x[0], src_key_padding_mask=mask[0])[:3]  # unbatched
    torch.testing.assert_close(one, y[0, :3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes must be a positive int, got 0"),
        ({"vocab_size": -1}, "vocab_size must be a positive int, got -1"),
        ({"pad_id": 20}, "pad_id must be None or an id below vocab_size=20, got 20"),
        ({"pad_id": -1}, "pad_id must be None or an id"),
    ],
)
def test_classifier_sizes(options, message):
    config = HyperMixerConfig(**{"vocab_size": 20, "d_model": 8, "num_layers": 1, **options})
    with pytest.raises(ValueError, match=message):
        HyperMixerForSequenceClassification(config)


def test_classifier_takes_a_batch_of_ids():
    model = HyperMixerForSequenceClassification(
        HyperMixerConfig(vocab_size=20, d_model=8, num_layers=1)
    )
    with pytest.raises(
        ValueError, match=r"input_ids must have shape \(batch, length\), got \(2,\)"
    ):
        model(torch.tensor([1, 2]))
