"""LoRA adapters enter a merge as the products of their factors."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lines_merge as lm

State = dict[str, Tensor]
# the updates of these tests are as large as the weights, so that errors show
pytestmark = pytest.mark.filterwarnings("ignore::lines_merge.UnrelatedBaseWarning")


def make_base() -> State:
    torch.manual_seed(0)
    return {
        **{f"blocks.{i}.fc.weight": torch.randn(6, 4) for i in range(3)},
        "embed.weight": torch.randn(7, 4),
        "blocks.1.conv.weight": torch.randn(5, 3, 2, 2),
        "head.bias": torch.randn(3),
    }


def make_factors(seed: int, rank: int = 2) -> State:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    factors = {}
    for i in range(3):
        factors[f"base_model.model.blocks.{i}.fc.lora_A.weight"] = rand(rank, 4)
        factors[f"base_model.model.blocks.{i}.fc.lora_B.weight"] = rand(6, rank)
    factors["base_model.model.embed.lora_embedding_A"] = rand(rank, 7)
    factors["base_model.model.embed.lora_embedding_B"] = rand(4, rank)
    factors["base_model.model.blocks.1.conv.lora_A.weight"] = rand(rank, 3, 2, 2)
    factors["base_model.model.blocks.1.conv.lora_B.weight"] = rand(5, rank, 1, 1)
    factors["base_model.model.head.bias"] = rand(3)
    return factors


def dense(base: State, factors: State, scaling: float) -> State:
    """The adapted model by hand, in float64."""
    result = {name: value.double() for name, value in base.items()}
    key = "base_model.model.{}"
    for i in range(3):
        a, b = (factors[key.format(f"blocks.{i}.fc.lora_{x}.weight")].double() for x in "AB")
        result[f"blocks.{i}.fc.weight"] += scaling * b @ a
    a, b = (factors[key.format(f"embed.lora_embedding_{x}")].double() for x in "AB")
    result["embed.weight"] += scaling * (b @ a).T
    a, b = (factors[key.format(f"blocks.1.conv.lora_{x}.weight")].double() for x in "AB")
    result["blocks.1.conv.weight"] += scaling * torch.einsum("or,rikl->oikl", b[:, :, 0, 0], a)
    result["head.bias"] = factors[key.format("head.bias")].double()
    return result


def test_merge_adds_products_not_factors() -> None:
    base, tasks = make_base(), [make_factors(seed) for seed in (1, 2)]
    models = [lm.adapted(base, factors, lora_alpha=8) for factors in tasks]
    merged = lm.merge(base, models, alpha=0.7, beta=0.3, depth="timm_vit")
    wanted = [dense(base, factors, 8 / 2) for factors in tasks]
    factor = {"blocks.0": 0.7, "blocks.1": 0.85, "blocks.2": 1.0}
    for name, value in base.items():
        update = sum(model[name] - value.double() for model in wanted)
        expected = value.double() + factor.get(name[:8], 0.7) * update
        # base + BA is rounded once to float32, values are up to 100
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-6, atol=2e-5)


def test_adapter_folder_merges_out_of_core_as_in_memory(tmp_path: Path) -> None:
    base = {name: value.to(torch.bfloat16) for name, value in make_base().items()}
    save_file(base, tmp_path / "base.safetensors")
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(make_factors(3), folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "lora_alpha": 4,
        "alpha_pattern": {"1.fc": 6},
        "use_rslora": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model = lm.adapted(tmp_path / "base.safetensors", folder)
    lm.merge_files(
        tmp_path / "base.safetensors", [model], tmp_path / "out", alpha=1, beta=0, progress=False
    )
    written = load_file(tmp_path / "out" / "model.safetensors")
    in_memory = lm.edit(base, lm.adapted(base, folder), 1.0)
    wanted = dense(base, make_factors(3), 4 / math.sqrt(2))
    other = dense(base, make_factors(3), 6 / math.sqrt(2))
    wanted["blocks.1.fc.weight"] = other["blocks.1.fc.weight"]
    for name in base:
        assert torch.equal(written[name], in_memory[name])
        assert written[name].dtype == torch.bfloat16
        torch.testing.assert_close(written[name].double(), wanted[name], rtol=2**-8, atol=1e-6)


def test_adapted_weights_are_those_of_peft(torchvision_operators: object, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    base = copy.deepcopy(model.state_dict())
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["0", "1"], modules_to_save=["2"], rank_pattern={"1": 3}
    )
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                value.normal_()
    wrapped.save_pretrained(tmp_path / "adapter")
    source = lm.adapted(base, tmp_path / "adapter")
    expected = wrapped.merge_and_unload().state_dict()
    edited = lm.edit(base, source, alpha=1.0, beta=0.0)
    for name, value in expected.items():
        torch.testing.assert_close(edited[name], value, rtol=1e-6, atol=1e-6)


def test_fan_in_fan_out_transposes_the_product() -> None:
    base = {"h.0.c.weight": torch.zeros(4, 6), "h.1.c.weight": torch.zeros(4, 6)}
    a, b = torch.randn(2, 4), torch.randn(6, 2)
    factors = {"h.0.c.lora_A.default.weight": a, "h.0.c.lora_B.default.weight": b}
    source = lm.adapted(base, factors, lora_alpha=2, fan_in_fan_out=True)
    torch.testing.assert_close(lm.TaskVector(base, source)["h.0.c.weight"], (b @ a).T)
    source.close()


def test_factors_are_refused_where_weights_are_meant() -> None:
    base, factors = make_base(), make_factors(1)
    name = "base_model.model.blocks.0.fc.lora_A.weight"
    wrapped = {**base, name: factors[name]}
    for strict in (True, False):
        for pair in ((wrapped, wrapped), (base, wrapped)):
            with pytest.raises(ValueError, match=r"lines_merge\.adapted"):
                lm.merge(pair[0], [pair[1]], strict=strict)


def test_ties_of_the_base_survive_unless_the_adapter_changes_one() -> None:
    base = make_base()
    base["tied.weight"] = base["embed.weight"]
    without = {k: v for k, v in make_factors(1).items() if "embed" not in k}
    assert lm.adapted(base, without, lora_alpha=1).aliases == {"tied.weight": "embed.weight"}
    model = lm.adapted(base, make_factors(1), lora_alpha=4)
    edited = lm.edit(base, model, 1.0)
    wanted = dense(make_base(), make_factors(1), 4 / 2)["embed.weight"]
    torch.testing.assert_close(edited["embed.weight"].double(), wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(edited["tied.weight"], base["tied.weight"])


def test_what_is_no_product_is_refused(tmp_path: Path) -> None:
    base, factors = make_base(), make_factors(1)
    with pytest.raises(ValueError, match="lora_alpha is needed"):
        lm.adapted(base, factors)
    with pytest.raises(ValueError, match="DoRA"):
        lm.adapted(base, factors, lora_alpha=1, use_dora=True)
    with pytest.raises(ValueError, match="only LoRA adapters"):
        lm.adapted(base, factors, lora_alpha=1, peft_type="PeftType.IA3")
    half = {k: v for k, v in factors.items() if "blocks.0.fc.lora_B" not in k}
    with pytest.raises(lm.KeyMismatchError, match="only the factor A"):
        lm.adapted(base, half, lora_alpha=1)
    with pytest.raises(lm.KeyMismatchError, match="which the adapter changes"):
        lm.adapted({"blocks.0.fc.weight": torch.zeros(6, 4)}, factors, lora_alpha=1)
    with pytest.raises(lm.ShapeMismatchError, match="the product of"):
        lm.adapted({**base, "blocks.0.fc.weight": torch.zeros(3, 4)}, factors, lora_alpha=1)
    with pytest.raises(lm.ShapeMismatchError, match="has shape"):
        lm.adapted({**base, "head.bias": torch.zeros(4)}, factors, lora_alpha=1)
    with pytest.raises(lm.CheckpointError, match=r"adapter_config\.json"):
        lm.adapted(base, tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(lm.CheckpointError, match="holds no table"):
        lm.adapted(base, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(lm.CheckpointError, match="holds no adapter_model"):
        lm.adapted(base, tmp_path)
