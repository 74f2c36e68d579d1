"""Both initialisations have the distributions that their formulas say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hypermixer import HyperMixing
from hypermixer.hypernet import Hypernet, init_bound


def std_of(heads: int, out: int, inner: int, init: str) -> float:
    if init == "xavier":
        return math.sqrt(2.0) * math.sqrt(2.0 / (inner + out))
    return math.sqrt(2.0) * math.sqrt(2.0 / (inner * (out + heads)))


@pytest.mark.parametrize("init", ["reference", "xavier"])
@pytest.mark.parametrize(("d", "hidden", "heads"), [(512, 2048, 8), (256, 512, 1)])
def test_spread_of_the_weights(init, d, hidden, heads):
    layer = HyperMixing(d, hidden, heads, init=init)
    for weight in (layer.w1.fc1_weight.detach(), layer.w2.fc2_weight.detach()):
        _, out, inner = weight.shape
        # the standard error of a uniform's deviation is about 0.45/√n of it
        assert float(weight.std()) == pytest.approx(std_of(heads, out, inner, init), rel=0.01)
        assert abs(float(weight.mean())) < 0.01 * float(weight.std())
        assert float(weight.abs().max()) <= math.sqrt(3) * std_of(heads, out, inner, init)


def test_published_examples_of_the_reference_deviation():
    assert std_of(1, 16, 16, "reference") == pytest.approx(0.12, abs=0.005)
    assert std_of(1, 16, 16, "xavier") == pytest.approx(0.354, abs=0.001)
    assert std_of(1, 512, 512, "reference") == pytest.approx(0.0039, abs=0.0001)


@pytest.mark.parametrize("shape", [(8, 64, 32), (1, 16, 16), (8, 64)])
def test_reference_bound_is_what_torch_takes_on_the_stacked_tensor(shape):
    tensor = torch.empty(*shape)
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(tensor)
    expected = math.sqrt(2.0) * math.sqrt(6.0 / (fan_in + fan_out))
    assert init_bound(shape, "reference") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("init", ["reference", "xavier"])
def test_biases(init):
    layer = HyperMixing(512, 2048, 8, bias=True, init=init)
    bias = layer.w1.fc2_bias.detach()
    if init == "xavier":
        assert torch.equal(bias, torch.zeros_like(bias))
    else:
        bound = math.sqrt(2.0) * math.sqrt(6.0 / (8 + 256))
        assert 0.98 * bound < float(bias.abs().max()) <= bound


def test_hypernets_are_drawn_apart():
    layer = HyperMixing(8)
    assert not torch.equal(layer.w1.fc1_weight, layer.w2.fc1_weight)
    assert isinstance(layer.w1, Hypernet)
    assert HyperMixing(8, tied=True).w2 is None
