from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import close, fill
from torch import nn

import palora

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*", "ignore::FutureWarning")

LAM = torch.tensor([0.3, 0.7])


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.fc, self.head = nn.Linear(6, 8), nn.ModuleDict({"fc": nn.Linear(8, 5)})
        self.conv = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.head["fc"](self.fc(self.embed(x)).tanh())
        return self.conv(y.unsqueeze(1))


def mixed(**kw: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = Mixed()
    model = palora.inject(
        copy.deepcopy(plain), ["a", "b"], conv="spatial", target=["embed", "fc", "conv"], **kw
    )
    return plain, fill(model)


X = torch.arange(12).view(3, 4) % 11


@pytest.mark.parametrize(
    "kw",
    [
        {"rank": 2},
        {"rank": 2, "alpha": 3.0, "scaling": "rslora"},
        {"rank": {"head.fc": 3, "conv": 1, ".*": 2}, "alpha": 2.0},
    ],
)
def test_task_adapters_in_peft_with_scaled_lambda_give_the_same_output(
    tmp_path: Path, kw: dict[str, Any]
) -> None:
    plain, model = mixed(train_base=False, **kw)
    palora.to_peft(model, tmp_path)
    wrapped = peft.PeftModel.from_pretrained(plain, tmp_path / "a", adapter_name="a")
    wrapped.load_adapter(tmp_path / "b", adapter_name="b")
    wrapped.base_model.set_adapter(["a", "b"])
    for module in wrapped.modules():
        if hasattr(module, "scaling"):
            for task, weight in zip("ab", LAM.tolist(), strict=True):
                module.scaling[task] *= weight
    with palora.preference(model, LAM):
        torch.testing.assert_close(wrapped(X), model(X), rtol=1e-5, atol=1e-5)


def test_a_vertex_is_the_lora_of_that_task(tmp_path: Path) -> None:
    plain, model = mixed(rank=2, train_base=False)
    palora.to_peft(model, tmp_path)
    wrapped = peft.PeftModel.from_pretrained(plain, tmp_path / "b").double()
    model.double()
    with palora.preference(model, [0.0, 1.0]):
        close(wrapped(X), model(X))


@pytest.mark.parametrize("temperature", [None, 2.0])
def test_one_preference_exports_as_one_exact_lora(
    tmp_path: Path, temperature: float | None
) -> None:
    plain, model = mixed(
        rank={"head.fc": 3, ".*": 2}, alpha=3.0, layer_temperature=temperature, train_base=False
    )
    palora.to_peft(model, tmp_path, LAM)
    wrapped = peft.PeftModel.from_pretrained(plain, tmp_path)
    ranks = {m.r["default"] for m in wrapped.modules() if hasattr(m, "lora_A") and hasattr(m, "r")}
    assert ranks == {4, 6}
    torch.testing.assert_close(wrapped(X), palora.merge(model, LAM)(X), rtol=1e-5, atol=1e-5)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(X), palora.merge(model, LAM)(X), rtol=1e-5, atol=1e-5)


def test_trained_base_is_written_beside_or_warned_about(tmp_path: Path) -> None:
    plain, model = mixed(rank=2)
    with torch.no_grad():
        model.fc.weight.add_(1.0)
    palora.to_peft(model, tmp_path, LAM)
    from safetensors.torch import load_file

    plain.load_state_dict(load_file(tmp_path / "base.safetensors"))
    wrapped = peft.PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(wrapped(X), palora.merge(model, LAM)(X), rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="base was trained"):
        palora.to_peft(model, tmp_path / "other", save_base=False)
    assert not (tmp_path / "other" / "base.safetensors").exists()


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_adapters_become_tasks(tmp_path: Path, rslora: bool) -> None:
    plain = Mixed()
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["fc", "conv", "embed"], use_rslora=rslora,
        rank_pattern={"conv": 1}, alpha_pattern={"conv": 3}, init_lora_weights=False,
    )  # fmt: skip
    wrapped = peft.get_peft_model(copy.deepcopy(plain), config, adapter_name="first")
    wrapped.add_adapter("second", config)
    wrapped.save_pretrained(tmp_path)
    model = palora.from_peft(copy.deepcopy(plain), [tmp_path / "first", tmp_path / "second"])
    assert model._palora.tasks == ["first", "second"]
    wrapped.base_model.set_adapter(["first", "second"])
    for module in wrapped.modules():
        if hasattr(module, "scaling"):
            for task, weight in zip(("first", "second"), LAM.tolist(), strict=True):
                module.scaling[task] *= weight
    with palora.preference(model, LAM):
        torch.testing.assert_close(model(X), wrapped(X), rtol=1e-5, atol=1e-5)
    assert not model.fc.weight.requires_grad


def test_an_alpha_of_its_own_survives_files_and_export(tmp_path: Path) -> None:
    plain = Mixed()
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["fc", "conv"], alpha_pattern={"conv": 24},
        init_lora_weights=False,
    )  # fmt: skip
    wrapped = peft.get_peft_model(copy.deepcopy(plain), config, adapter_name="first")
    wrapped.add_adapter("second", config)
    wrapped.save_pretrained(tmp_path)
    wrapped.set_adapter("second")
    model = palora.from_peft(copy.deepcopy(plain), [tmp_path / "first", tmp_path / "second"])
    palora.save(model, tmp_path / "saved", base=True)
    palora.to_peft(model, tmp_path / "again")
    loaded = palora.load(Mixed(), tmp_path / "saved")
    back = palora.from_peft(
        copy.deepcopy(plain), [tmp_path / "again" / t for t in ("first", "second")]
    )
    for found in (model, loaded, back):
        with palora.preference(found, [0.0, 1.0]):
            torch.testing.assert_close(found(X), wrapped(X), rtol=1e-5, atol=1e-5)
    peft_again = peft.PeftModel.from_pretrained(plain, tmp_path / "again" / "second")
    torch.testing.assert_close(peft_again(X), wrapped(X), rtol=1e-5, atol=1e-5)


def test_loras_of_layers_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    _, model = mixed(rank=2, train_base=False)
    palora.to_peft(model, tmp_path)
    small = nn.ModuleDict({"fc": nn.Linear(6, 8)})
    with pytest.raises(ValueError, match=r"no layer to take the LoRA of .*conv"):
        palora.from_peft(small, [tmp_path / "a", tmp_path / "b"])
    assert type(small["fc"]) is nn.Linear


def test_hf_conv1d_round_trip(tmp_path: Path) -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    plain = nn.Sequential(conv1d(6, 4), nn.Tanh(), conv1d(3, 6))
    model = fill(palora.inject(copy.deepcopy(plain), 2, rank=2, train_base=False))
    palora.to_peft(model, tmp_path, LAM)
    wrapped = peft.PeftModel.from_pretrained(plain, tmp_path)
    x = torch.randn(5, 4)
    torch.testing.assert_close(wrapped(x), palora.merge(model, LAM)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.Conv2d(2, 2, 3)), "a folded convolution adapter is no LoRA"),
        (nn.Sequential(nn.MultiheadAttention(4, 2)), "MultiheadAttention has no standard LoRA"),
    ],
)
def test_layers_without_a_lora_form_are_named(tmp_path: Path, net: Any, message: str) -> None:
    model = palora.inject(net, 2, rank=1)
    with pytest.raises(ValueError, match=f"layer '0': .*{message}"):
        palora.to_peft(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_grouped_convolutions_and_preferences_per_sample_are_refused(tmp_path: Path) -> None:
    model = palora.inject(nn.Sequential(nn.Conv2d(2, 2, 3, groups=2)), 2, rank=1, conv="spatial")
    with pytest.raises(ValueError, match="grouped convolutions"):
        palora.to_peft(model, tmp_path)
    with pytest.raises(ValueError, match="one per sample"):
        palora.to_peft(mixed(rank=1)[1], tmp_path, torch.full((2, 2), 0.5))


def test_adapters_that_do_not_go_together(tmp_path: Path) -> None:
    plain, model = mixed(rank=2, train_base=False)
    palora.to_peft(model, tmp_path)
    _, other = mixed(rank=1, train_base=False)
    palora.to_peft(other, tmp_path / "other")
    with pytest.raises(ValueError, match="r is 2 for a and 1 for b"):
        palora.from_peft(plain, {"a": tmp_path / "a", "b": tmp_path / "other" / "b"})
    small = fill(palora.inject(Mixed(), ["c", "d"], rank=2, target="fc", train_base=False))
    palora.to_peft(small, tmp_path / "small")
    with pytest.raises(ValueError, match="adapt different layers"):
        palora.from_peft(Mixed(), [tmp_path / "a", tmp_path / "small" / "c"])
    import json

    path = tmp_path / "b" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ValueError, match="DoRA"):
        palora.from_peft(Mixed(), [tmp_path / "a", tmp_path / "b"])
