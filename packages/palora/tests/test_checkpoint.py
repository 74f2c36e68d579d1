from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import fill
from torch import nn

import palora
from palora.core.checkpoint import atomically
from palora.examples.models import LeNet

pytest.importorskip("safetensors")


def lenet(rank: int = 2, **kw: object) -> nn.Module:
    return fill(palora.inject(LeNet(), ["a", "b"], rank=rank, **kw))


def outputs(model: nn.Module) -> list[torch.Tensor]:
    x = torch.linspace(-1, 1, 2 * 784).view(2, 1, 28, 28)
    model.eval()
    with torch.no_grad(), palora.preference(model, [0.3, 0.7]):
        found: list[torch.Tensor] = model(x)
    return found


def test_plain_checkpoints_load_strictly_into_an_injected_model() -> None:
    plain, model = LeNet(), lenet()
    before = palora.adapter_state_dict(model)["encoder.fc.palora_A"].clone()
    palora.load_base_state_dict(model, plain.state_dict())
    assert torch.equal(model.encoder.fc.weight, plain.encoder.fc.weight)
    assert torch.equal(model.encoder.fc.palora_A, before)
    with pytest.raises(RuntimeError, match="Missing key"):
        palora.load_base_state_dict(model, {"encoder.fc.bias": torch.zeros(50)})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        palora.load_base_state_dict(model, {**plain.state_dict(), "more": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*palora_A"):
        plain.load_state_dict(model.state_dict())


def test_adapters_alone_round_trip() -> None:
    model, other = lenet(), lenet()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    state = palora.adapter_state_dict(model)
    assert len(state) == 14
    palora.load_adapter_state_dict(other, state)
    for key, value in palora.adapter_state_dict(other).items():
        assert torch.equal(value, state[key])
    del state["encoder.fc.palora_A"]
    with pytest.raises(ValueError, match=r"missing \['encoder.fc.palora_A'\]"):
        palora.load_adapter_state_dict(other, state)
    palora.load_adapter_state_dict(other, state, strict=False)
    with pytest.raises(ValueError, match=r"unknown \['x'\]"):
        palora.load_adapter_state_dict(
            other, {**palora.adapter_state_dict(model), "x": torch.ones(1)}
        )


@pytest.mark.parametrize(
    "other",
    [
        lambda: palora.inject(LeNet(), 3, rank=2),
        lambda: palora.inject(LeNet(), 2, rank=3),
        lambda: palora.inject(LeNet(), 2, rank=2, conv="spatial"),
    ],
)
def test_adapters_of_other_tasks_rank_or_mode_are_refused_naming_both(other: object) -> None:
    with pytest.raises(ValueError, match=r"the model has .*\(.*the file \("):
        palora.load_adapter_state_dict(other(), palora.adapter_state_dict(lenet()))  # type: ignore[operator]


@pytest.mark.parametrize("train_base", [True, False])
def test_folders_round_trip_into_plain_and_injected_models(
    tmp_path: Path, train_base: bool
) -> None:
    model = lenet(
        rank={"fc": 3, ".*": 2}, alpha=2.0, scaling="rslora", train_base=train_base,
        layer_temperature=2.0, dropout=0.1,
    )  # fmt: skip
    palora.save(model, tmp_path)
    config = json.loads((tmp_path / "palora_config.json").read_text())
    assert config["format"] == 1
    assert config["tasks"] == ["a", "b"]
    assert config["rank"] == {"fc": 3, ".*": 2}
    assert config["conv"] == "folded"
    assert config["train_base"] is train_base
    assert "encoder.fc" in config["targets"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "palora.safetensors",
        "palora_config.json",
    ]
    plain = LeNet()
    if not train_base:
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if "palora" not in k})
    loaded = palora.load(plain, tmp_path)
    assert loaded is plain
    for a, b in zip(outputs(loaded), outputs(model), strict=True):
        assert torch.equal(a, b)
    assert loaded.encoder.fc._palora_spec == model.encoder.fc._palora_spec
    assert loaded.encoder.fc.weight.requires_grad is train_base
    palora.load(loaded, tmp_path)
    with pytest.raises(ValueError, match=r"rank is 2 in the model and \{'fc': 3"):
        palora.load(lenet(), tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "palora.safetensors", "pt") as file:
        assert json.loads(file.metadata()["palora_config"])["tasks"] == ["a", "b"]
        assert any("fc.weight" in k for k in file.keys()) is train_base  # noqa: SIM118


def test_options_of_single_layers_are_compared_and_the_default_kept(tmp_path: Path) -> None:
    model = lenet(layer_temperature=2.0, default=[0.25, 0.75])
    palora.save(model, tmp_path)
    with pytest.raises(ValueError, match=r"exponent of layer '.*' is 1.0 in the model and 1\."):
        palora.load(lenet(), tmp_path)
    loaded = palora.load(LeNet(), tmp_path).eval()
    found = palora.get_preference(loaded)
    assert found is not None
    assert found.tolist() == [0.25, 0.75]


def test_tied_weights_are_written(tmp_path: Path) -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = fill(palora.inject(nn.Sequential(first, second), 2, rank=1))
    palora.save(model, tmp_path)
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    other[1].weight = other[0].weight
    palora.load(other, tmp_path)
    assert torch.equal(other[1].weight, first.weight)


def test_unknown_formats_and_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="palora_config"):
        palora.load(LeNet(), tmp_path / "none")
    (tmp_path / "palora_config.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match="format 2; this version reads 1"):
        palora.load(LeNet(), tmp_path)


def test_an_interrupted_write_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def broken(name: str) -> None:
        Path(name).write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomically(path, broken)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_safetensors_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"palora\[safetensors\]"):
        palora.save(lenet(), tmp_path)


def test_param_groups_cover_every_parameter_once_with_the_adapters_faster() -> None:
    model = palora.inject(LeNet(), 3, rank=1)
    groups = palora.param_groups(model, 0.1, weight_decay=0.01)
    covered = [id(p) for g in groups for p in g["params"]]
    assert sorted(covered) == sorted(id(p) for p in model.parameters())
    assert [(g["name"], g["weight_decay"]) for g in groups] == [("base", 0.01), ("adapters", 0.0)]
    assert groups[1]["lr"] == pytest.approx(0.3)
    assert len(groups[1]["params"]) == 14  # two tensors a layer, whatever T
    decayed = palora.param_groups(model, 0.1, 5.0, 0.01, decay_adapters=True)[1]
    assert (decayed["lr"], decayed["weight_decay"]) == (0.5, 0.01)
    torch.optim.Adam(groups)
    palora.freeze_base(model)
    assert [g["name"] for g in palora.param_groups(model, 0.1)] == ["adapters"]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        palora.param_groups(model, 0.1)
    with pytest.raises(RuntimeError, match="not injected"):
        palora.param_groups(LeNet(), 0.1)
