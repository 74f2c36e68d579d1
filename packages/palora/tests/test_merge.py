from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import close, fill, naive_weight
from torch import nn

import palora
from palora.core.layers import Switched
from palora.examples.models import LeNet


def test_merged_model_is_plain_with_the_original_keys_and_hooks() -> None:
    net = nn.Sequential(LeNet())
    keys = list(net.state_dict())
    calls: list[int] = []
    net[0].encoder.fc.register_forward_hook(lambda *a: calls.append(1))
    model = fill(palora.inject(net, 2, rank=2))
    merged = palora.merge(model, [0.3, 0.7])
    assert list(merged.state_dict()) == keys
    assert not any(isinstance(m, Switched) for m in merged.modules())
    assert not any(k.startswith("_palora") for m in merged.modules() for k in m.__dict__)
    x = torch.randn(2, 1, 28, 28)
    with palora.preference(model, [0.3, 0.7]):
        expected = model(x)
    for a, b in zip(merged(x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2
    assert isinstance(model[0].encoder.fc, Switched)
    nn.Sequential(LeNet()).load_state_dict(merged.state_dict())


def test_merging_in_place_keeps_the_parameters_objects() -> None:
    model = fill(palora.inject(nn.Sequential(nn.Linear(4, 4)), 2, rank=1, train_base=False))
    weight = model[0].weight
    expected = naive_weight(model[0], torch.tensor([0.3, 0.7]))
    assert palora.merge(model, [0.3, 0.7], inplace=True) is model
    assert model[0].weight is weight
    close(weight.detach().double(), expected, 1e-7)
    with pytest.raises(RuntimeError, match="not injected"):
        palora.merge(model, [0.3, 0.7])
    with pytest.raises(RuntimeError, match="not injected"):
        palora.unload(model)


def test_sharing_refers_to_what_is_not_adapted() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Embedding(5, 4))
    model = fill(palora.inject(net, 2, rank=1))
    shared, own = palora.merge(model, [0.5, 0.5], share=True), palora.merge(model, [0.5, 0.5])
    assert shared[1].weight is model[1].weight
    assert shared[1].running_mean is model[1].running_mean
    assert shared[2].weight is model[2].weight
    assert shared[0].weight is not model[0].weight
    assert shared[0].bias is model[0].bias
    assert own[1].weight is not model[1].weight
    assert torch.equal(own[0].weight, shared[0].weight)


def test_one_preference_per_sample_cannot_be_merged() -> None:
    model = palora.inject(nn.Linear(4, 4), 2, rank=1)
    with pytest.raises(ValueError, match=r"one preference \(2,\), got one per sample: \(3, 2\)"):
        palora.merge(model, torch.full((3, 2), 0.5))
    with pytest.raises(ValueError, match="must sum to 1"):
        palora.merge(model, [0.5, 0.6])


def test_half_precision_weights_are_merged_through_float64() -> None:
    model = fill(palora.inject(nn.Linear(8, 8).bfloat16(), 2, rank=2))
    merged = palora.merge(model, [0.3, 0.7])
    expected = naive_weight(model, torch.tensor([0.3, 0.7])).bfloat16()
    assert torch.equal(merged.weight, expected)


@pytest.mark.parametrize("kind", ["conv1d-hf", "attention"])
def test_other_layouts_merge_exactly(kind: str) -> None:
    if kind == "conv1d-hf":
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        plain: Any = conv1d(6, 4).double()
        x: Any = (torch.randn(3, 2, 4, dtype=torch.float64),)
    else:
        plain = nn.MultiheadAttention(4, 2, batch_first=True).double()
        x = (torch.randn(3, 2, 4, dtype=torch.float64),) * 3
    for path in ("auto", "activation", "weight"):
        model: Any = fill(palora.inject(plain, 3, rank=2, path=path))
        lam = torch.tensor([0.2, 0.3, 0.5])
        merged = palora.merge(model, lam)
        with palora.preference(model, lam):
            out = model(*x)
        expected = merged(*x)
        pairs = zip(out, expected, strict=True) if isinstance(out, tuple) else [(out, expected)]
        for a, b in pairs:
            close(a, b)
        weight = merged.weight if kind == "conv1d-hf" else merged.in_proj_weight
        close(weight, naive_weight(model, lam))
        with palora.preference(model, lam.expand(3, 3)):
            again = model(*x)
        close(
            again[0] if isinstance(again, tuple) else again,
            out[0] if isinstance(out, tuple) else out,
        )
        palora.unload(model)
