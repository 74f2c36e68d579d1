from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gradient_alignment.cli import main
from gradient_alignment.recipes.models import make


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("cli") / "net.pt")
    assert main(["train", "--epochs", "3", "--quiet", "--out", path, "--regularizer", "score"]) == 0
    return path


def answer(capsys: pytest.CaptureFixture[str], *argv: str) -> object:
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_training_prints_progress_and_a_summary(capsys):
    assert main(["train", "--epochs", "1", "--regularizer", "anti", "--preset", "paper"]) == 0
    found = capsys.readouterr()
    assert "epoch 1 of 1: loss" in found.err
    assert "regularizer: anti" in found.out
    assert "AntiScoreMatching.trace" in found.out


def test_options_reach_the_regularizer(capsys):
    found = answer(
        capsys, "train", "--epochs", "1", "--quiet", "--regularizer", "score", "--weight", "0"
    )
    assert set(found["terms"]) == {
        f"ScoreMatching.{name}" for name in ("trace", "gradient", "stability", "nonfinite")
    }


def test_checkpoints_are_evaluated(capsys, checkpoint, tmp_path: Path):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "samples.png"
    few = ("--samples", "20", "--steps", "3", "--images", "20", "--quiet")
    found = answer(capsys, "evaluate", checkpoint, *few, "--out", str(figure))
    assert figure.exists()
    again = answer(capsys, "evaluate", checkpoint, *few)
    assert found == again
    own = answer(capsys, "evaluate", checkpoint, *few, "--judge", checkpoint)
    assert own["accuracy"] == found["accuracy"]


def test_checkpoints_are_fooled(capsys, checkpoint, tmp_path: Path):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "maps.png"
    found = answer(capsys, "fool", checkpoint, "--images", "50", "--out", str(figure))
    assert figure.exists()
    assert found["accuracy_before"] == found["accuracy_after"]
    assert found["smallest_cosine_with_pattern"] > 0.95
    assert found["loss_gradient_change"] < 1e-6
    assert main(["fool", checkpoint, "--images", "5", "--kind", "quadratic"]) == 0
    assert "accuracy_after" in capsys.readouterr().out


def test_estimators_are_listed(capsys):
    few = ("--draws", "5", "--repeats", "1", "--images", "2")
    found = answer(capsys, "bench", *few, "--sigma", "0.01", "0.1")
    assert len(found) == 6 + 10
    assert main(["bench", *few]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("\t")[:3] == ["method", "distribution", "sigma"]
    assert len(lines) == 12


@pytest.mark.parametrize("command", ["evaluate", "fool"])
def test_networks_for_other_images_are_told_in_one_line(command, capsys, tmp_path: Path):
    network = make("small-cnn", 10, (1, 12, 12))
    saved = {"state": network.state_dict(), "config": {"model": "small-cnn"}}
    path = tmp_path / "net.pt"
    torch.save({**saved, "num_classes": 10, "shape": [1, 12, 12]}, path)
    assert main([command, str(path)]) == 2
    found = capsys.readouterr().err.splitlines()
    assert found[-1].endswith(
        "was trained on images (1, 12, 12) of 10 classes, the data set has (1, 8, 8) of 10"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--dataset", "svhn"], "dataset must be one of"),
        (["train", "--model", "vgg11"], "takes 32x32 images"),
        (["train", "--epochs", "0"], "epochs must be an integer of at least 1"),
        (["train", "--regularizer", "x"], "regularizer must be one of"),
        (["train", "--regularizer", "gradient-norm", "--sigma", "1"], "sigma"),
        (["train", "--regularizer", "score", "--sigma", "0"], "sigma must be a finite number"),
        (["train", "--weight", "1"], "regularizer 'none' takes no weight"),
        (["train", "--preset", "paper"], "regularizer 'none' takes no preset"),
        (["train", "--out", "absent/net.pt"], "the folder of absent/net.pt does not exist"),
        (["fool", "absent.pt", "--images", "0"], "images must be an integer of at least 1"),
        (["bench", "--draws", "1"], "draws must be at least 2"),
        (["bench", "--repeats", "0"], "repeats must be an integer of at least 1"),
        (["bench", "--images", "0"], "images must be an integer of at least 1"),
        (["evaluate", "absent.pt"], "No such file"),
        (["fool", "absent.pt"], "No such file"),
    ],
)
def test_bad_input_is_told_in_one_line(argv, message, capsys):
    assert main(argv) == 2
    found = capsys.readouterr().err.splitlines()
    assert message in found[-1]
    assert found[-1].startswith(f"gradient-alignment {argv[0]}: ")
