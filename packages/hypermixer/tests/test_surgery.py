"""convert() on torch, timm and Hugging Face models: what is replaced, what is not and why."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from hypermixer import HyperMixing, HyperMixingAttention, convert
from hypermixer.adapters.modules import padding_of


def torch_encoder(layers: int = 2) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, layers)


PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])


@pytest.mark.parametrize("training", [True, False])
def test_transformer_encoder_with_padding_in_train_and_eval(training):
    encoder = torch_encoder()
    assert encoder.use_nested_tensor  # the encoder would read in_proj_weight in eval mode
    report = convert(encoder.train(training))
    assert [name for name, _ in report.replaced] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert not report.skipped
    assert not encoder.use_nested_tensor
    x = torch.randn(2, 6, 16)
    with torch.set_grad_enabled(training):
        out = encoder(x, src_key_padding_mask=PADDING)
    short = encoder(x[1:, :4])
    torch.testing.assert_close(out[1, :4], short[0], rtol=1e-4, atol=1e-5)
    assert all(layer.self_attn.training is training for layer in encoder.layers)


def test_restore_puts_everything_back():
    encoder = torch_encoder().eval()
    x = torch.randn(2, 6, 16)
    expected = encoder(x)
    report = convert(encoder)
    assert not torch.allclose(encoder(x), expected)
    assert report.restore() is encoder
    assert torch.equal(encoder(x), expected)
    assert encoder.use_nested_tensor


def test_sizes_dtype_and_options_are_taken_over():
    encoder = torch_encoder(1).to(torch.bfloat16)
    convert(encoder, num_heads=4, hidden_dim=64, tied=True, bias=True)
    mixing = encoder.layers[0].self_attn.mixing
    assert (mixing.num_heads, mixing.hidden_dim, mixing.tied, mixing.bias) == (4, 64, True, True)
    assert mixing.w1.fc1_weight.dtype == torch.bfloat16
    assert encoder(torch.randn(1, 3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_which_chooses_by_name_or_by_module():
    encoder = torch_encoder()
    report = convert(encoder, which=r"layers\.1\.")
    assert [name for name, _ in report.replaced] == ["layers.1.self_attn"]
    assert report.skipped == [("layers.0.self_attn", "MultiheadAttention", "not chosen by which")]
    report = convert(encoder, which=lambda name, module: name.startswith("layers.0"))
    assert [name for name, _ in report.replaced] == ["layers.0.self_attn"]


def test_converting_twice_changes_nothing_more():
    encoder = torch_encoder()
    convert(encoder)
    before = encoder.layers[0].self_attn
    report = convert(encoder)
    assert not report.replaced
    assert encoder.layers[0].self_attn is before


def test_decoders_are_left_with_the_reason():
    model = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)
    report = convert(model)
    assert [name for name, _ in report.replaced] == ["encoder.layers.0.self_attn"]
    assert {name for name, _, _ in report.skipped} == {
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
    }
    assert all("decoder" in why for _, _, why in report.skipped)
    assert model(torch.randn(2, 5, 16), torch.randn(2, 3, 16)).shape == (2, 3, 16)


def test_attention_alone_and_cross_attention():
    model = nn.ModuleDict(
        {
            "own": nn.MultiheadAttention(16, 2),
            "cross": nn.MultiheadAttention(16, 2, kdim=8, vdim=8),
            "unknown": type("WeirdAttention", (nn.Module,), {})(),
        }
    )
    report = convert(copy.deepcopy(model))
    assert [name for name, _ in report.replaced] == ["own"]
    reasons = {name: why for name, _, why in report.skipped}
    assert "another width" in reasons["cross"]
    assert reasons["unknown"] == "an attention class that is not known"
    tied = convert(model, tied=True)
    assert "tied=True" in {name: why for name, _, why in tied.skipped}["own"]


def test_a_model_that_is_an_attention_itself():
    with pytest.raises(ValueError, match=r"make a hypermixer\.HyperMixingAttention"):
        convert(nn.MultiheadAttention(8, 2))


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="embed_dim=16 must be divisible by num_heads=3"):
        convert(torch_encoder(), num_heads=3)


def test_the_report_prints_as_a_table():
    text = str(convert(nn.Transformer(16, 2, 1, 1, 32, batch_first=True)))
    assert text.splitlines()[0] == "replaced 1, skipped 2"
    assert "  replaced  encoder.layers.0.self_attn (MultiheadAttention)" in text
    assert "decoder.layers.0.self_attn (MultiheadAttention): a decoder's" in text


# -- timm ----------------------------------------------------------------------------------------


@pytest.fixture
def timm():
    return pytest.importorskip("timm")


def small_mixer(timm) -> nn.Module:
    kind = timm.models.mlp_mixer.MlpMixer
    return kind(num_classes=3, img_size=32, patch_size=8, num_blocks=2, embed_dim=32)


def test_timm_mixer_runs_on_its_transposed_tokens(timm):
    model = small_mixer(timm).eval()
    report = convert(model)
    assert [name for name, _ in report.replaced] == ["blocks.0.mlp_tokens", "blocks.1.mlp_tokens"]
    block = model.blocks[0]
    x = torch.randn(1, 16, 32)
    expected = x + block.mlp_tokens.mixing(block.norm1(x))
    expected = expected + block.mlp_channels(block.norm2(expected))
    torch.testing.assert_close(block(x), expected)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_timm_mixer_then_takes_any_number_of_tokens(timm):
    model = small_mixer(timm)
    block = model.blocks[0]
    with pytest.raises(RuntimeError):
        block(torch.randn(1, 49, 32))
    convert(model)
    assert block(torch.randn(1, 49, 32)).shape == (1, 49, 32)


def test_timm_mixer_of_the_published_size(timm):
    with torch.device("meta"):
        model = timm.create_model("mixer_b16_224")
    assert len(convert(model).replaced) == 12
    assert model(torch.zeros(1, 3, 224, 224, device="meta")).shape == (1, 1000)


def test_timm_vit(timm):
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3)
    report = convert(model)
    assert [name for name, _ in report.replaced] == ["blocks.0.attn", "blocks.1.attn"]
    assert model.blocks[0].attn.mixing.num_heads == 3
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 3)
    with pytest.raises(NotImplementedError, match="attn_mask must be None"):
        model.blocks[0].attn(torch.randn(1, 4, 192), attn_mask=torch.zeros(4, 4))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}),
        ("beit_base_patch16_224", {"depth": 1}),
    ],
)
def test_timm_relative_positions_are_left(timm, name, options):
    report = convert(timm.create_model(name, **options))
    assert not report.replaced
    assert report.skipped
    assert all("relative-position bias" in why for _, _, why in report.skipped)


def test_timm_attention_of_other_kinds_is_left(timm):
    if not hasattr(timm.layers, "AttentionRope"):
        pytest.skip("this timm has no rotary attention to refuse")
    from timm.layers import Attention, AttentionRope

    model = nn.ModuleDict(
        {
            "rope": AttentionRope(16, num_heads=2),
            "narrow": Attention(16, num_heads=2, dim_out=8),
            "pool": timm.layers.AttentionPoolLatent(16, num_heads=2),
        }
    )
    report = convert(model)
    assert not report.replaced
    reasons = {name: why for name, _, why in report.skipped}
    assert "relative" in reasons["rope"]
    assert "another width" in reasons["narrow"]


# -- transformers --------------------------------------------------------------------------------

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
}


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_hugging_face_encoders_with_padding(transformers, family, implementation):
    config = getattr(transformers, f"{family}Config")(**TINY, attn_implementation=implementation)
    try:
        model = getattr(transformers, f"{family}Model")(config).eval()
    except ValueError as error:  # before version 5 not every model has every implementation
        pytest.skip(str(error).partition(". ")[0])
    report = convert(model)
    kinds = [kind.replace("Sdpa", "") for _, kind in report.replaced]
    assert kinds == [f"{family}SelfAttention"] * 2
    assert not report.skipped
    ids = torch.randint(5, 90, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    out = model(ids, attention_mask=mask).last_hidden_state
    short = model(ids[:1, :5]).last_hidden_state
    torch.testing.assert_close(out[0, :5], short[0], rtol=1e-4, atol=1e-5)
    model.train()(ids, attention_mask=mask).last_hidden_state.sum().backward()


def test_hugging_face_vit(transformers):
    config = transformers.ViTConfig(**{**TINY, "image_size": 16, "patch_size": 8})
    model = transformers.ViTModel(config)
    report = convert(model)
    assert len(report.replaced) == 2
    assert model(torch.randn(1, 3, 16, 16)).last_hidden_state.shape == (1, 5, 32)


def test_hugging_face_decoders_and_relative_positions_are_left(transformers):
    config = transformers.BertConfig(**TINY, is_decoder=True, add_cross_attention=True)
    report = convert(transformers.BertModel(config))
    assert not report.replaced
    reasons = {name.split(".")[-2]: why for name, _, why in report.skipped}
    assert "causal" in reasons["attention"]
    # before version 5 a decoder's cross-attention calls itself a decoder's too
    assert re.search("cross-attention|causal", reasons["crossattention"])
    deberta = transformers.DebertaV2Model(transformers.DebertaV2Config(**TINY))
    report = convert(deberta)
    assert not report.replaced
    assert all("relative positions" in why for _, _, why in report.skipped)


def test_unknown_hugging_face_attention_is_listed(transformers):
    model = transformers.DistilBertModel(
        transformers.DistilBertConfig(dim=32, n_heads=4, n_layers=1, hidden_dim=64, vocab_size=99)
    )
    report = convert(model)
    assert not report.replaced
    assert all("not known" in why for _, _, why in report.skipped)
    assert report.skipped


def test_replaced_layers_refuse_what_they_cannot_do(transformers):
    model = transformers.BertModel(transformers.BertConfig(**TINY))
    convert(model)
    attention = model.encoder.layer[0].attention.self
    x = torch.randn(1, 4, 32)
    with pytest.raises(NotImplementedError, match="past_key_values is for decoders"):
        attention(x, past_key_values=object())
    causal = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    with pytest.raises(NotImplementedError, match="which keys are padding"):
        attention(x, causal)


@pytest.mark.parametrize("rows", [1, 4])
def test_hugging_face_masks_of_every_form(rows):
    keep = torch.tensor([[True, True, False, True]])
    additive = torch.zeros(1, 1, rows, 4).masked_fill(~keep, torch.finfo(torch.float32).min)
    wide = keep[:, None, None].expand(1, 1, rows, 4)
    for mask in (keep.long(), keep, additive, wide):
        assert padding_of(mask).tolist() == [[False, False, True, False]]
    assert padding_of(None) is None


# -- SpeechBrain, whose modules are stood in for by classes of the same names ----------------------


def speechbrain_model() -> nn.Module:
    def attention(name: str) -> nn.Module:
        module = type(name, (nn.Module,), {"__module__": "speechbrain.nnet.attention"})()
        module.att = nn.MultiheadAttention(16, 2, batch_first=True)
        return module

    layer = nn.Module()
    layer.mha_layer = attention("MultiheadAttention")
    other = nn.Module()
    other.mha_layer = attention("RelPosMHAXL")
    strange = nn.Module()
    strange.mha_layer = attention("FancyAttention")
    return nn.ModuleList([layer, other, strange])


def test_speechbrain_layers():
    model = speechbrain_model()
    report = convert(model, which="mha_layer$")
    assert report.replaced == [("0.mha_layer", "MultiheadAttention")]
    reasons = {name: why for name, _, why in report.skipped}
    assert "relative positions" in reasons["1.mha_layer"]
    assert "not known" in reasons["2.mha_layer"]
    x = torch.randn(2, 5, 16)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    layer = model[0].mha_layer
    out, weights = layer(x, x, x, attn_mask=None, key_padding_mask=mask, pos_embs=None)
    assert out.shape == x.shape
    assert weights is None
    assert torch.equal(layer(x, x, x, return_attn_weights=False), out)
    with pytest.raises(NotImplementedError, match="attn_mask must be None"):
        layer(x, x, x, attn_mask=torch.zeros(5, 5))


def test_layers_of_this_package_are_not_touched():
    model = nn.Sequential(HyperMixing(8), HyperMixingAttention(8))
    report = convert(model)
    assert not report.replaced
    assert not report.skipped


class Holder(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x, x, x)[0]


def test_an_attention_that_two_parents_hold_stays_one():
    shared = nn.MultiheadAttention(16, 2, batch_first=True)
    model = nn.Sequential(Holder(shared), Holder(shared))
    report = convert(model)
    assert [name for name, _ in report.replaced] == ["0.attention", "1.attention"]
    assert isinstance(model[1].attention, HyperMixingAttention)
    assert model[0].attention is model[1].attention
    report.restore()
    assert model[0].attention is shared
    assert model[1].attention is shared


def test_a_second_conversion_leaves_trained_layers_alone():
    timm = pytest.importorskip("timm")
    for name, options in (
        ("mixer_s32_224", {"img_size": 64}),
        ("vit_tiny_patch16_224", {"depth": 2, "img_size": 32}),
    ):
        model = timm.create_model(name, **options)
        convert(model)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        again = convert(model)
        assert (again.replaced, again.skipped) == ([], [])
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(t, after[n]) for n, t in before.items())


def test_an_attention_module_by_itself_is_refused_not_passed_over():
    pytest.importorskip("timm")
    from timm.models.vision_transformer import Attention

    with pytest.raises(ValueError, match=r"is an attention module itself \(Attention\)"):
        convert(Attention(16, 2))


def test_which_must_be_a_regular_expression():
    with pytest.raises(ValueError, match=r"which='\(' is no regular expression"):
        convert(nn.Sequential(nn.TransformerEncoderLayer(16, 2)), which="(")


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_one_hugging_face_mask_for_the_whole_batch(dtype):
    from hypermixer.adapters.modules import HuggingFaceAttention

    layer = HuggingFaceAttention(HyperMixing(16, 32, 2))
    x = torch.randn(3, 5, 16)
    keep = torch.tensor([True, True, True, False, False])
    mask = keep if dtype == torch.bool else torch.where(keep, 0.0, torch.finfo(dtype).min)
    out, _ = layer(x, attention_mask=mask.view(1, 1, 1, 5))
    torch.testing.assert_close(out[:, :3], layer(x[:, :3])[0])
