from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import close, fill, naive_weight
from torch import nn

import palora

D = torch.float64
RAYS = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.1, 0.3], [0.1, 0.8, 0.1]])


def reference(plain: nn.MultiheadAttention, model: Any, lam: torch.Tensor) -> nn.MultiheadAttention:
    made = copy.deepcopy(plain)
    if model.palora_A is not None:
        made.in_proj_weight.data = naive_weight(model, lam)
    made.out_proj.weight.data = naive_weight(model.out_proj, lam)
    return made


@pytest.mark.parametrize("qkv", ["fused", "split"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 5, "vdim": 7}, {"bias": False}],
)
@pytest.mark.parametrize("path", ["auto", "activation", "weight"])
def test_attention_at_lambda_equals_torch_attention_at_the_mixed_weights(
    qkv: str, batch_first: bool, options: dict[str, Any], path: str
) -> None:
    plain = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options).double()
    model = fill(palora.inject(copy.deepcopy(plain), 3, rank=2, qkv=qkv, path=path))
    q = torch.randn(3, 4, 8, dtype=D)
    kdim, vdim = options.get("kdim", 8), options.get("vdim", 8)
    k = q if kdim == 8 else torch.randn(3, 4, kdim, dtype=D)
    v = q if vdim == 8 else torch.randn(3, 4, vdim, dtype=D)
    n, s = (3, 4) if batch_first else (4, 3)
    padding = torch.zeros(n, s, dtype=torch.bool)
    padding[0, -1] = True
    causal = torch.triu(torch.ones(s, s), 1).bool()
    for lam in RAYS:
        made = reference(plain, model, lam)
        for kw in (
            {},
            {"need_weights": False},
            {"key_padding_mask": padding, "attn_mask": causal, "average_attn_weights": False},
            {"attn_mask": torch.randn(n * 2, s, s, dtype=D), "need_weights": False},
            {"attn_mask": causal, "is_causal": True},
        ):
            with palora.preference(model, lam):
                out, weights = model(q, k, v, **kw)
            expected, expected_weights = made(q, k, v, **kw)
            close(out, expected)
            close(palora.merge(model, lam)(q, k, v, **kw)[0], expected)
            assert (weights is None) == (expected_weights is None)
            if weights is not None:
                close(weights, expected_weights)
        with palora.preference(model, lam):  # cross-attention and no batch
            close(model(q, k.clone(), v.clone())[0], made(q, k.clone(), v.clone())[0])
            out, weights = model(q[0], k[0], v[0])
        expected, expected_weights = made(q[0], k[0], v[0])
        close(out, expected)
        close(weights, expected_weights)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("qkv", ["fused", "split"])
def test_attention_takes_one_preference_per_sample(batch_first: bool, qkv: str) -> None:
    plain = nn.MultiheadAttention(8, 2, batch_first=batch_first).double()
    model = fill(palora.inject(plain, 3, rank=2, qkv=qkv))
    x = torch.randn((3, 4, 8) if batch_first else (4, 3, 8), dtype=D)
    with palora.preference(model, RAYS):
        out = model(x, x, x)[0]
    for i, lam in enumerate(RAYS):
        with palora.preference(model, lam):
            single = model(x, x, x)[0]
        close(out[i] if batch_first else out[:, i], single[i] if batch_first else single[:, i])


def test_causal_hint_without_a_mask_is_refused() -> None:
    model = palora.inject(nn.MultiheadAttention(8, 2), 2, rank=1)
    with palora.preference(model, [0.5, 0.5]), pytest.raises(RuntimeError, match="attn_mask"):
        model(torch.ones(2, 1, 8), torch.ones(2, 1, 8), torch.ones(2, 1, 8), is_causal=True)


def test_output_projection_alone_is_still_read_at_lambda() -> None:
    plain = nn.MultiheadAttention(8, 2, batch_first=True).double()
    model = fill(palora.inject(copy.deepcopy(plain), 2, rank=2, target="out_proj"))
    assert "palora_A" not in model._parameters or model.palora_A is None
    x = torch.randn(3, 4, 8, dtype=D)
    lam = torch.tensor([0.3, 0.7])
    made = copy.deepcopy(plain)
    made.out_proj.weight.data = naive_weight(model.out_proj, lam)
    with palora.preference(model, lam):
        close(model(x, x, x)[0], made(x, x, x)[0])
    with palora.disable(model):
        close(model(x, x, x)[0], plain(x, x, x)[0])


def test_encoder_layers_fast_path_does_not_bypass_the_adapters() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    encoder.eval()
    plain = copy.deepcopy(encoder)
    model = fill(palora.inject(encoder, 2, rank=2))
    x = torch.randn(3, 4, 8)
    lam = [0.3, 0.7]
    with torch.no_grad():
        with palora.preference(model, lam):
            out = model(x)
        merged = palora.merge(model, lam)
        torch.testing.assert_close(out, merged(x), rtol=0, atol=1e-5)
        assert not torch.allclose(out, plain(x), atol=1e-3)
        with palora.disable(model):
            torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-5)
    assert merged.layers[0].activation_relu_or_gelu == plain.layers[0].activation_relu_or_gelu


def test_padded_batches_pass_an_adapted_encoder_in_evaluation_mode() -> None:
    """Without gradients PyTorch's encoder packs a padded batch for kernels that skip the layers."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    encoder.eval()
    nested = encoder.use_nested_tensor
    plain = copy.deepcopy(encoder)
    model = fill(palora.inject(encoder, 2, rank=2))
    x, lam = torch.randn(3, 5, 8), [0.3, 0.7]
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    made = copy.deepcopy(plain)
    for layer, own in zip(made.layers, model.layers, strict=True):
        for name, module in own.named_modules():
            if getattr(module, "palora_A", None) is not None:
                weight = naive_weight(module, torch.tensor(lam)).float()
                target = layer.get_submodule(name)
                slot = "in_proj_weight" if name == "self_attn" else "weight"
                getattr(target, slot).data.copy_(weight)
    expected = made(x, src_key_padding_mask=padding)  # with gradients: no fused kernel
    with torch.no_grad(), palora.preference(model, lam):
        out = model(x, src_key_padding_mask=padding)
    keep = ~padding
    torch.testing.assert_close(out[keep], expected[keep], rtol=0, atol=1e-5)
    assert palora.unload(model).use_nested_tensor == nested


def test_attention_dropout_and_autocast() -> None:
    model = fill(
        palora.inject(nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True), 2, rank=2)
    )
    x = torch.randn(40, 40, 8)
    with palora.preference(model, [0.3, 0.7]):
        assert not torch.equal(model(x, x, x)[0], model(x, x, x)[0])
        model.eval()
        exact = model(x, x, x, need_weights=False)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x, x, x, need_weights=False)[0]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out.float(), exact, rtol=0, atol=2e-2 * float(exact.detach().abs().max())
    )
