"""The compared mixers are what they are called, and stand on equal footing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hypermixer.baselines import (
    Attention,
    FourierMixing,
    GatedMLPMixing,
    LinearAttention,
    MixerClassifier,
    MixerLayer,
    MLPMixing,
    StaticMixing,
    count_parameters,
    make_mixer,
    match_parameters,
    mixer_names,
)
from hypermixer.experiments.classification import build

F64 = torch.float64
PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])


@pytest.mark.parametrize("name", mixer_names())
def test_padding_holds_nothing_for_any_mixer(name):
    mixer = make_mixer(name, 8, max_length=6, num_heads=2).double().eval()
    x = torch.randn(2, 6, 8, dtype=F64)
    y = mixer(x, PADDING)
    dirty = x.masked_fill(PADDING.unsqueeze(-1), float("nan"))
    assert y.shape == x.shape
    valid = ~PADDING
    torch.testing.assert_close(mixer(dirty, PADDING)[valid], y[valid], rtol=0, atol=1e-10)
    assert mixer(x).shape == x.shape


def test_attention_equals_torchs():
    ours = Attention(8, 2)
    theirs = nn.MultiheadAttention(8, 2, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.out.weight,
            "out_proj.bias": ours.out.bias,
        }
    )
    x = torch.randn(2, 6, 8)
    expected, _ = theirs(x, x, x, key_padding_mask=PADDING)
    torch.testing.assert_close(ours(x, PADDING)[~PADDING], expected[~PADDING], rtol=1e-4, atol=1e-5)


def test_linear_attention_equals_its_quadratic_form():
    layer = LinearAttention(8, 2).double()
    x = torch.randn(1, 5, 8, dtype=F64)
    q, k, v = layer.heads(x)
    scores = (nn.functional.elu(q) + 1) @ (nn.functional.elu(k) + 1).transpose(-1, -2)
    mixed = scores / scores.sum(-1, keepdim=True) @ v
    expected = layer.out(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-10)


def test_mlp_mixing_is_one_mlp_over_positions_for_every_channel():
    layer = MLPMixing(6, 10).double()
    x = torch.randn(1, 6, 3, dtype=F64)
    columns = [layer.fc2(nn.functional.gelu(layer.fc1(x[0, :, c]))) for c in range(3)]
    torch.testing.assert_close(layer(x)[0], torch.stack(columns, 1), rtol=0, atol=1e-10)
    short = torch.cat([x[:, :4], x.new_zeros(1, 2, 3)], 1)
    torch.testing.assert_close(layer(x[:, :4]), layer(short)[:, :4], rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="7 tokens, but the weights were made for max_length=6"):
        layer(torch.randn(1, 7, 3, dtype=F64))


def test_gated_mixing_starts_without_mixing():
    layer = GatedMLPMixing(8, 6).double()
    nn.init.zeros_(layer.spatial.weight)
    x = torch.randn(1, 6, 8, dtype=F64)
    content, _ = nn.functional.gelu(layer.up(x)).chunk(2, -1)
    torch.testing.assert_close(layer(x), layer.down(content), rtol=0, atol=1e-10)


def test_fourier_mixing_is_the_transform_written_out():
    x = torch.randn(1, 5, 4, dtype=F64)

    def matrix(n):
        i = torch.arange(n, dtype=F64)
        return torch.exp(-2j * torch.pi * i[:, None] * i / n)

    expected = (matrix(5) @ x[0].to(torch.complex128) @ matrix(4)).real / 20**0.5
    torch.testing.assert_close(FourierMixing()(x)[0], expected, rtol=0, atol=1e-10)


def test_static_mixing_gives_every_token_the_same():
    layer = StaticMixing(4, 6).double()
    x = torch.randn(1, 5, 4, dtype=F64)
    y = layer(x)
    assert torch.equal(y[:, :1].expand_as(y), y)
    assert torch.equal(layer(x[:, [3, 1, 0, 2, 4]])[0, 0], y[0, 0]) or torch.allclose(
        layer(x[:, [3, 1, 0, 2, 4]]), y
    )


def test_without_a_mixer_tokens_do_not_meet():
    layer = MixerLayer(make_mixer("none", 4, max_length=5), 4, 8)
    x = torch.randn(1, 5, 4)
    torch.testing.assert_close(layer(x)[:, :1], layer(x[:, :1]))


def test_token_mixing_only():
    layer = MixerLayer(make_mixer("fnet", 4, max_length=5), 4, 0)
    x = torch.randn(1, 5, 4)
    torch.testing.assert_close(layer(x), x + layer.mixer(layer.norm1(x)))


def test_unknown_mixer():
    with pytest.raises(ValueError, match=r"name must be one of hypermixer, .*; got 'mamba'"):
        make_mixer("mamba", 8, max_length=4)


@pytest.mark.parametrize("name", mixer_names())
def test_classifiers_have_equal_parameter_counts(name):
    options = {"num_classes": 3, "vocab_size": 50, "max_length": 32, "pairs": True}
    target = count_parameters(build("hypermixer", options))
    model = build(name, options)
    # one unit of the feature mixing more or less, in each of two layers
    assert abs(count_parameters(model) - target) <= 2 * (2 * 64 + 1)
    tokens = torch.tensor([[3, 4, 5, 0], [6, 0, 0, 0]])
    model.eval()
    assert model(tokens, torch.zeros_like(tokens)).shape == (2, 3)


def test_classifier_of_features_and_of_short_texts():
    model = MixerClassifier("hypermixer", 3, num_features=4, embed_dim=16).eval()
    assert model(torch.randn(2, 9, 4)).shape == (2, 3)
    text = MixerClassifier("hypermixer", 3, vocab_size=9, embed_dim=16).eval()
    whole = text(torch.tensor([[3, 4, 0, 0]]))
    torch.testing.assert_close(whole, text(torch.tensor([[3, 4]])), rtol=1e-5, atol=1e-5)


def test_matching_finds_the_nearest_width():
    def model(width):
        return nn.Sequential(nn.Linear(5, width), nn.Linear(width, 5))

    sizes = {w: count_parameters(model(w)) for w in range(1, 60)}
    for target in (100, 317, 500):
        best = min(sizes, key=lambda w: abs(sizes[w] - target))
        assert match_parameters(model, target) == best
    assert match_parameters(model, 1) == 1
