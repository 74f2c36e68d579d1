"""Depth from parameter names: every known family, the structural fallback, and refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import lines_merge as lm
from lines_merge.families import FAMILIES, strip_wrappers


def indices(names: list[str], **arguments: Any) -> dict[str, tuple[int, int] | None]:
    depth = lm.DepthMap.from_names(names, **arguments)
    return {n: (b.index, b.count) if (b := depth[n]) else None for n in names}


def flat(
    prefix: str, count: int, subs: tuple[str, ...] = ("attn.qkv.weight", "mlp.fc.bias")
) -> list[str]:
    return [f"{prefix}{i}.{sub}" for i in range(count) for sub in subs]


FLAT = {
    "timm ViT": ("blocks.", ["cls_token", "patch_embed.proj.weight", "norm.weight", "head.weight"]),
    "BERT": (
        "bert.encoder.layer.",
        ["bert.embeddings.word_embeddings.weight", "bert.pooler.dense.weight"],
    ),
    "HF ViT": ("vit.encoder.layer.", ["vit.embeddings.cls_token", "classifier.weight"]),
    "torchvision ViT": (
        "encoder.layers.encoder_layer_",
        ["class_token", "encoder.ln.weight", "heads.head.weight"],
    ),
    "LLaMA": (
        "model.layers.",
        ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"],
    ),
    "GPT-2": ("transformer.h.", ["transformer.wte.weight", "transformer.ln_f.weight"]),
    "GPT-2 bare": ("h.", ["wte.weight", "ln_f.weight"]),
    "GPT-NeoX": ("gpt_neox.layers.", ["gpt_neox.embed_in.weight", "embed_out.weight"]),
    "Mamba": ("backbone.layers.", ["backbone.embeddings.weight", "backbone.norm_f.weight"]),
    "MLP-Mixer": ("blocks.", ["stem.proj.weight", "norm.weight"]),
    "unknown container": ("trunk.units.", ["stem.weight", "out.weight"]),
}


@pytest.mark.parametrize("family", FLAT)
def test_flat_families(family: str) -> None:
    prefix, outside = FLAT[family]
    names = [*outside[:1], *flat(prefix, 12), *outside[1:]]
    found = indices(names)
    for name in names:
        if name in outside:
            assert found[name] is None
        else:
            assert found[name] == (int(name.removeprefix(prefix).split(".")[0]), 12)


@pytest.mark.parametrize(
    "wrapper",
    ["module.", "_orig_mod.", "base_model.model.", "_fsdp_wrapped_module.", "module._orig_mod."],
)
def test_prefixes_of_wrappers_are_ignored(wrapper: str) -> None:
    plain = [*flat("model.layers.", 12), "lm_head.weight"]
    inside = [name.replace(".mlp", "._fsdp_wrapped_module.mlp") for name in plain]
    wrapped = [wrapper + name for name in inside]
    found = indices(wrapped)
    assert list(found.values()) == list(indices(plain).values())


def test_strip_wrappers_leaves_names_that_merely_contain_them() -> None:
    assert strip_wrappers("submodule.weight") == "submodule.weight"
    assert strip_wrappers("base_model.model.model.norm.weight") == "model.norm.weight"


def test_lora_factors_belong_to_their_block() -> None:
    names = [
        f"base_model.model.model.layers.{i}.self_attn.q_proj.{part}"
        for i in range(11)
        for part in ("base_layer.weight", "lora_A.0.weight", "lora_B.0.weight")
    ]
    found = indices(names)
    assert found["base_model.model.model.layers.10.self_attn.q_proj.lora_A.0.weight"] == (10, 11)
    assert found["base_model.model.model.layers.1.self_attn.q_proj.lora_B.0.weight"] == (1, 11)


def test_layer_ten_is_not_layer_one() -> None:
    found = indices(flat("model.layers.", 11))
    assert found["model.layers.10.mlp.fc.bias"] == (10, 11)
    assert found["model.layers.1.mlp.fc.bias"] == (1, 11)


def test_experts_are_not_depth_even_when_the_first_layers_are_dense() -> None:
    names = [f"model.layers.{i}.self_attn.q.weight" for i in range(4)]
    names += [f"model.layers.{i}.mlp.experts.{j}.w.weight" for i in range(1, 4) for j in range(8)]
    names += ["model.layers.0.mlp.w.weight"]
    found = indices(names)
    assert found["model.layers.2.mlp.experts.7.w.weight"] == (2, 4)


def test_t5_counts_blocks_and_not_the_layers_inside() -> None:
    names = ["shared.weight"]
    for side, count, inner in (("encoder", 6, 2), ("decoder", 4, 3)):
        names += [
            f"{side}.block.{i}.layer.{j}.w.weight" for i in range(count) for j in range(inner)
        ]
        names += [f"{side}.final_layer_norm.weight"]
    names += ["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    depth = lm.DepthMap.from_names(names)
    assert depth.towers == {"encoder": 6, "decoder": 4}
    assert depth["encoder.block.5.layer.1.w.weight"] == ("encoder", 5, 6)
    assert depth["decoder.block.3.layer.2.w.weight"] == ("decoder", 3, 4)
    assert depth["encoder.final_layer_norm.weight"] is None


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("visual.transformer.resblocks.", "transformer.resblocks."),
        ("vision_model.encoder.layers.", "text_model.encoder.layers."),
        ("visual.trunk.blocks.", "text.transformer.resblocks."),
        ("model.vision_tower.encoder.layers.", "model.language_model.layers."),
    ],
)
def test_two_towers_have_their_own_depth(image: str, text: str) -> None:
    depth = lm.DepthMap.from_names([*flat(image, 24), *flat(text, 12), "logit_scale"])
    assert depth.towers == {"image": 24, "text": 12}
    assert depth[f"{image}23.mlp.fc.bias"] == ("image", 23, 24)
    assert depth[f"{text}11.mlp.fc.bias"] == ("text", 11, 12)


def test_towers_can_be_put_in_a_row_or_share_a_count() -> None:
    names = [*flat("decoder.layers.", 3), *flat("encoder.layers.", 2)]
    depth = lm.DepthMap.from_names(names)
    row, shared = depth.with_towers("sequential"), depth.with_towers("shared")
    assert row["encoder.layers.1.mlp.fc.bias"] == ("sequential", 1, 5)
    assert row["decoder.layers.0.mlp.fc.bias"] == ("sequential", 2, 5)
    assert shared["encoder.layers.1.mlp.fc.bias"] == ("encoder", 1, 3)
    factors = lm.scales(names, 0.0, 1.0, towers="sequential")
    assert factors["decoder.layers.2.mlp.fc.bias"] == 1
    assert factors["encoder.layers.1.mlp.fc.bias"] == 0.25
    with pytest.raises(ValueError, match="'separate', 'sequential' or 'shared'"):
        depth.with_towers("both")


def staged(pattern: str, counts: list[int], first: int = 0, step: int = 1) -> list[str]:
    return [
        pattern.format(s=first + step * s, i=i) + sub
        for s, count in enumerate(counts)
        for i in range(count)
        for sub in (".block.0.weight", ".norm.weight")
    ]


def check_staged(names: list[str], samplers: dict[str, int | None], outside: list[str]) -> None:
    found = indices([*outside, *names, *samplers])
    blocks = list(dict.fromkeys(n.removesuffix(".block.0.weight") for n in names if "block.0" in n))
    for rank, block in enumerate(blocks):
        assert found[f"{block}.norm.weight"] == (rank, len(blocks))
    for name, rank in samplers.items():
        assert found[name] == (None if rank is None else (rank, len(blocks)))
    for name in outside:
        assert found[name] is None


@pytest.mark.parametrize("counts", [[3, 3, 9, 3], [2, 2, 2, 2]])
def test_convnext(counts: list[int]) -> None:
    a, b, c = counts[0], sum(counts[:2]), sum(counts[:3])
    for pattern, sampler in (
        ("stages.{s}.blocks.{i}", "stages.{}.downsample.0.weight"),
        (
            "convnext.encoder.stages.{s}.layers.{i}",
            "convnext.encoder.stages.{}.downsampling_layer.1.bias",
        ),
    ):
        samplers = {sampler.format(s): rank for s, rank in ((1, a), (2, b), (3, c))}
        check_staged(staged(pattern, counts), dict(samplers), ["stem.0.weight", "head.fc.weight"])
    samplers = {f"features.{s}.1.weight": rank for s, rank in ((2, a), (4, b), (6, c))}
    outside = ["features.0.0.weight", "features.0.1.bias", "classifier.2.weight"]
    check_staged(staged("features.{s}.{i}", counts, 1, 2), dict(samplers), outside)


def test_swin() -> None:
    counts = [2, 2, 6, 2]
    timm = {f"layers.{s}.downsample.norm.weight": rank for s, rank in ((1, 2), (2, 4), (3, 10))}
    check_staged(staged("layers.{s}.blocks.{i}", counts), dict(timm), ["patch_embed.proj.weight"])
    # where the down-sampling closes its stage, it feeds the next one
    closing = {
        f"swin.encoder.layers.{s}.downsample.norm.weight": r for s, r in ((0, 2), (1, 4), (2, 10))
    }
    check_staged(staged("swin.encoder.layers.{s}.blocks.{i}", counts), dict(closing), [])
    torchvision = {f"features.{s}.reduction.weight": r for s, r in ((2, 2), (4, 4), (6, 10))}
    outside = ["features.0.0.weight", "features.0.2.weight", "norm.weight"]
    check_staged(staged("features.{s}.{i}", counts, 1, 2), dict(torchvision), outside)


def test_resnet() -> None:
    for pattern, first in (("layer{s}.{i}", 1), ("encoder.stages.{s}.layers.{i}", 0)):
        names = staged(pattern, [3, 4, 6, 3], first)
        shortcut = pattern.format(s=first + 1, i=0) + ".downsample.0.weight"
        check_staged(names, {shortcut: 3}, ["conv1.weight", "bn1.running_mean", "fc.weight"])


def test_stages_of_lists_are_blocks_even_under_flat_names() -> None:
    check_staged(
        staged("blocks.{s}.{i}", [1, 2, 2, 3]), {}, ["conv_stem.weight", "classifier.weight"]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_named_families_find_their_own_pattern(family: str) -> None:
    names = ["outside.weight"]
    for template in FAMILIES[family][:1]:
        first = 1 if family == "resnet" else 0
        for s in range(first, first + 2):
            for i in range(3):
                if "{s}" in template or s == first:
                    names += [template.format(s=s, i=i) + sub for sub in ("a.weight", "b.weight")]
    depth = lm.DepthMap.from_names(names, family)
    assert list(depth.towers.values()) == [6 if "{s}" in FAMILIES[family][0] else 3]
    assert depth["outside.weight"] is None


def test_a_named_family_that_is_absent_is_refused() -> None:
    with pytest.raises(lm.DepthError, match="no name matches family 't5'"):
        lm.DepthMap.from_names(flat("model.layers.", 3), "t5")
    with pytest.raises(lm.DepthError, match="no name matches family 'resnet'"):
        lm.DepthMap.from_names(flat("model.layers.", 3), "resnet")
    with pytest.raises(
        ValueError, match=r"unknown family 'lama'; allowed: auto, generic, open_clip"
    ):
        lm.DepthMap.from_names(flat("model.layers.", 3), "lama")


def test_generic_takes_the_largest_container_and_its_siblings_elsewhere() -> None:
    names = [*flat("left.cells.", 5), *flat("right.cells.", 3), *flat("out.small.", 2, ("weight",))]
    depth = lm.DepthMap.from_names(names)
    assert depth.towers == {"left.cells": 5, "right.cells": 3}
    assert depth["out.small.1.weight"] is None
    assert lm.DepthMap.from_names(flat("model.layers.", 3), "generic").towers == {"model.layers": 3}


def test_generic_stage_list_is_counted_through() -> None:
    names = staged("net.{s}.units.{i}", [1, 3, 2])
    assert indices(names)["net.2.units.1.norm.weight"] == (5, 6)


def test_a_sequential_around_the_model_is_looked_through() -> None:
    names = [*flat("0.auto_model.encoder.layer.", 6), "2.linear.weight"]
    assert indices(names)["0.auto_model.encoder.layer.5.mlp.fc.bias"] == (5, 6)


def test_small_heads_of_linear_layers_are_no_tower() -> None:
    names = [*flat("encoder.layers.", 4), *flat("bbox.layers.", 3, ("weight", "bias"))]
    depth = lm.DepthMap.from_names(names)
    assert list(depth.towers.values()) == [4]
    assert depth["bbox.layers.2.weight"] is None


def test_a_plain_mlp_is_a_stack() -> None:
    names = flat("hidden.", 4, ("weight", "bias"))
    assert indices([*names, "out.weight"])["hidden.3.weight"] == (3, 4)


@pytest.mark.parametrize(
    "names",
    [
        [*flat("conv.", 4, ("weight", "bias")), *flat("norm.", 4, ("weight", "bias"))],
        [*flat("stage1.", 4), *flat("stage2.", 4), *flat("stage3.", 4)],
        [*flat("blocks.", 4), *flat("extra.cells.", 4, ("a.b.weight", "c.d.weight"))],
        # stages hidden in a flat name, and a list of lists of unequal length (VOLO, EfficientNet)
        [f"encoder.layer.{s}.layer.{i}.w.weight" for s, n in ((0, 2), (1, 3)) for i in range(n)]
        + ["encoder.layer.2.conv.weight"],
        [f"network.{s}.{i}.mlp.weight" for s, n in ((0, 4), (2, 4), (3, 8)) for i in range(n)]
        + ["network.1.proj.weight"],
    ],
    ids=["parallel lists", "numbered stages", "known and unknown", "disguised", "list of lists"],
)
def test_ambiguous_names_are_refused_with_candidates_and_a_way_out(names: list[str]) -> None:
    with pytest.raises(
        lm.AmbiguousDepthError, match=r"(?s)candidates:.*\{i\}.*from_patterns"
    ) as info:
        lm.DepthMap.from_names(names)
    assert isinstance(info.value, ValueError)


@pytest.mark.parametrize("names", [["a.weight", "b.bias"], ["layer1.weight", "layer2.weight"], []])
def test_no_block_is_refused(names: list[str]) -> None:
    with pytest.raises(
        lm.DepthError, match=r"no stack of blocks found.*from_patterns|no stack"
    ) as info:
        lm.DepthMap.from_names(names)
    assert "from_patterns" in str(info.value)


def test_gaps_are_refused_unless_allowed() -> None:
    names = [n for n in flat("model.layers.", 6) if ".3." not in n]
    with pytest.raises(lm.DepthError, match=r"missing \[3\]; pass allow_gaps=True"):
        lm.DepthMap.from_names(names)
    found = indices(names, allow_gaps=True)
    assert found["model.layers.4.mlp.fc.bias"] == (3, 5)
    stages = [n for n in staged("stages.{s}.blocks.{i}", [2, 2, 2]) if "stages.1" not in n]
    with pytest.raises(lm.DepthError, match=r"gaps in the stages .*found \[0, 2\]"):
        lm.DepthMap.from_names(stages)
    assert indices(stages, allow_gaps=True)["stages.2.blocks.1.norm.weight"] == (3, 4)


def test_stacks_that_start_late_have_a_gap() -> None:
    with pytest.raises(lm.DepthError, match=r"missing \[0, 1\]"):
        lm.DepthMap.from_names([n for n in flat("model.layers.", 6) if n[13] not in "01"])
    late = staged("stages.{s}.blocks.{i}", [2, 2], first=2)
    with pytest.raises(lm.DepthError, match="gaps in the stages"):
        lm.DepthMap.from_names(late)


def test_a_single_block_is_the_deepest() -> None:
    names = flat("model.layers.", 1)
    assert lm.scales(names, 0.25, 0.75)[names[0]] == 1
    assert lm.scales(names, 0.25, 0.75, schedule="reverse")[names[0]] == 1


def test_patterns_select_blocks_by_hand() -> None:
    names = [f"net.part.{i}.w" for i in range(3)] + [f"net.other.{i}.w" for i in range(3)]
    depth = lm.DepthMap.from_patterns("net.part.{i}.", names)
    assert depth["net.part.2.w"] == ("net.part", 2, 3)
    assert depth["net.other.2.w"] is None
    both = lm.DepthMap.from_patterns(["net.part.{i}.", "net.other.{i}."], names)
    assert both.towers == {"net.part": 3, "net.other": 3}
    stages = lm.DepthMap.from_patterns("b{s}.{i}.", ["b0.0.w", "b0.1.w", "b1.0.w"])
    assert stages["b1.0.w"] == ("b", 2, 3)
    later = lm.DepthMap.from_patterns("net.part.{i}.")
    with pytest.raises(lm.DepthError, match="call resolve"):
        later["net.part.2.w"]
    assert later.resolve(names) == depth
    with pytest.raises(lm.DepthError, match="no name matches nothing"):
        lm.DepthMap.from_patterns("nothing.{i}.", names)
    for bad in ("layers.", "a.{i}.{i}.", "a.{s}.{s}.{i}"):
        with pytest.raises(lm.DepthError, match=r"needs \{i\} once"):
            lm.DepthMap.from_patterns(bad)


def test_a_map_refuses_names_that_it_was_not_built_from() -> None:
    depth = lm.DepthMap.from_names(flat("blocks.", 3))
    with pytest.raises(lm.DepthError, match=r"built without \['other'\]"):
        lm.scales(["other"], 0.0, 1.0, depth=depth)


def test_json_round_trip_and_identity() -> None:
    depth = lm.DepthMap.from_names([*flat("blocks.", 3), "head.weight"])
    again = lm.DepthMap.from_json(depth.to_json())
    assert again == depth
    assert hash(again) == hash(depth)
    assert (depth == 3) is False
    pattern = lm.DepthMap.from_patterns("blocks.{i}.", allow_gaps=True)
    assert lm.DepthMap.from_json(pattern.to_json()) == pattern
    assert repr(depth) == "DepthMap(blocks: 3)"
    assert repr(pattern) == "DepthMap(blocks.{i}.)"
    assert len(depth) == 7
    assert "head.weight" in depth
    for text in ("", "[]", "{}", json.dumps({"blocks": {"a": [1]}}), json.dumps({"blocks": 3})):
        with pytest.raises(lm.DepthError, match="not a depth map"):
            lm.DepthMap.from_json(text)


def test_describe_prints_tensor_tower_index_count_factor() -> None:
    depth = lm.DepthMap.from_names([*flat("blocks.", 3, ("fc.weight",)), "head.weight"])
    lines = depth.describe(alpha=0.2, beta=0.8).splitlines()
    assert lines[0].split() == ["tensor", "tower", "i", "L", "factor"]
    assert lines[2].split() == ["blocks.1.fc.weight", "blocks", "1", "3", "0.6"]
    assert lines[4].split() == ["head.weight", "-", "-", "-", "0.2"]


def test_from_model_weighs_unknown_containers_by_their_parameters() -> None:
    model = nn.Module()
    model.big = nn.ModuleList(nn.Linear(50, 50) for _ in range(4))
    model.tiny = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    assert lm.DepthMap.from_model(model).towers == {"big": 4}
    with pytest.raises(lm.AmbiguousDepthError):
        lm.DepthMap.from_names(model.state_dict())


def test_a_map_is_immutable_from_outside() -> None:
    blocks: dict[str, lm.Block | None] = {"a": None}
    depth = lm.DepthMap(blocks)
    blocks["b"] = None
    assert list(depth) == ["a"]
    with pytest.raises(TypeError):
        depth["a"] = None  # type: ignore[index]


class TestRealModels:
    """Key lists of libraries, from configurations without weights."""

    def test_transformers(self, torchvision_operators: None) -> None:
        transformers = pytest.importorskip("transformers")
        tiny: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 2,
        }
        cases: list[tuple[Any, dict[str, int]]] = [
            (transformers.LlamaConfig(num_hidden_layers=11, **tiny), {"layers": 11}),
            (transformers.BertConfig(num_hidden_layers=3, **tiny), {"encoder.layer": 3}),
            (transformers.GPT2Config(n_layer=3, n_embd=32, n_head=2), {"h": 3}),
            (
                transformers.ConvNextConfig(depths=[1, 1, 3, 1], hidden_sizes=[8] * 4),
                {"encoder.stages": 6},
            ),
            (
                transformers.ResNetConfig(depths=[1, 2, 2, 1], hidden_sizes=[8] * 4),
                {"encoder.stages": 6},
            ),
            (
                transformers.SwinConfig(depths=[2] * 4, embed_dim=8, num_heads=[1] * 4),
                {"encoder.layers": 8},
            ),
            (
                transformers.T5Config(num_layers=2, num_decoder_layers=3, d_model=32, d_ff=32),
                {"encoder": 2, "decoder": 3},
            ),
            (
                transformers.CLIPConfig(text_config=tiny, vision_config=tiny),
                {"text": 12, "image": 12},
            ),
            (
                transformers.MixtralConfig(num_hidden_layers=3, num_key_value_heads=2, **tiny),
                {"layers": 3},
            ),
        ]
        for config, towers in cases:
            model = transformers.AutoModel.from_config(config)
            assert lm.DepthMap.from_model(model).towers == towers, type(config).__name__

    def test_timm(self, torchvision_operators: None) -> None:
        timm = pytest.importorskip("timm")
        cases = {
            "vit_tiny_patch16_224": {"blocks": 12},
            "convnext_atto": {"stages": 12},
            "resnet18": {"layer": 8},
            "swin_tiny_patch4_window7_224": {"layers": 12},
            "mixer_s16_224": {"blocks": 8},
            "efficientnet_b0": {"blocks": 16},
        }
        for name, towers in cases.items():
            model = timm.create_model(name)
            assert lm.DepthMap.from_model(model).towers == towers, name

    def test_torchvision(self, torchvision_operators: None) -> None:
        models = pytest.importorskip("torchvision.models")
        cases = {"vit_b_16": 12, "convnext_tiny": 18, "swin_t": 12, "resnet18": 8}
        for name, count in cases.items():
            with torch.device("meta"):
                model = getattr(models, name)()
            assert list(lm.DepthMap.from_model(model).towers.values()) == [count], name
        with torch.device("meta"):
            model = models.efficientnet_b0()
        with pytest.raises(lm.AmbiguousDepthError):
            lm.DepthMap.from_model(model)


def test_a_stack_in_numbered_parts_is_weighed_whole(torchvision_operators: object) -> None:
    """CoaT: serial blocks in four lists beside the list of parallel blocks."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("coat_tiny")
    with pytest.raises(lm.AmbiguousDepthError, match="serial_blocks1"):
        lm.DepthMap.from_model(model)
