"""The examples run on a few samples, and what they write is what they print."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import lcnn

FOLDER = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(example: ModuleType, out: Path, capsys: pytest.CaptureFixture[str], *options: str) -> Any:
    assert example.main([*options, "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((out / "result.json").read_text(encoding="utf-8")) == printed
    return printed


def test_every_example_is_named_in_the_readme() -> None:
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    for path in FOLDER.glob("*.py"):
        assert f"examples/{path.name}" in readme


@pytest.mark.slow
def test_timm_example_trains_both_networks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    few = ["--epochs", "1", "--samples", "64", "--probes", "4", "--quiet"]
    result = run(load("timm_digits"), tmp_path, capsys, *few)
    assert list(result) == ["standard", "lcnn"]
    for row in result.values():
        assert set(row) == {"accuracy", "grad_norm", "hessian_norm", "curvature", "robust"}
        assert row["hessian_norm"] >= 0


@pytest.mark.filterwarnings("ignore")  # Lightning's own, about its workers and torch's pytrees
def test_lightning_example_logs_its_terms_and_probes_in_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pytorch_lightning")
    example = load("lightning_module")
    few = ["--epochs", "2", "--samples", "128"]
    result = run(example, tmp_path, capsys, *few)
    assert len(result["curvature"]) == len(result["accuracy"]) == 2
    assert all(value > 0 for value in result["curvature"])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert not any(name.startswith("criterion") for name in saved)  # nothing is registered twice
    again = example.LowCurvature(example.network(), torch.zeros(2, 1, 8, 8))
    again.load_state_dict(saved)
    terms: dict[str, float] = {}
    again.log_dict = terms.update
    again.training_step([torch.rand(4, 1, 8, 8), torch.arange(4)])
    assert {"train/beta", "train/lipschitz", "train/gradnorm"} <= set(terms)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_hugging_face_example_converts_every_layer_and_restores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    example = load("huggingface")
    result = run(example, tmp_path, capsys, "--epochs", "1", "--samples", "128", "--quiet")
    assert result["restored"] < 1e-5
    assert result["curvature"] > 0
    model = lcnn.convert(example.build(), torch.zeros(2, 1, 16, 16))
    assert sum(isinstance(m, lcnn.CenteredSoftplus) for m in model.modules()) == 5
    assert sum(isinstance(m, lcnn.LipschitzNorm) for m in model.modules()) == 6
    plain = example.build()
    state = torch.load(tmp_path / "resnet.pt", weights_only=True)
    names = set(plain.model.state_dict())
    assert names < set(state)  # the library's own keys, for its own loader
    assert {name.rpartition(".")[2] for name in set(state) - names} == {"beta"}
