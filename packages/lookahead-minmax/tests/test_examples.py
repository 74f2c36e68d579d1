"""Every example runs for a few steps, and what it writes is what it prints."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib as mpl
import pytest
import torch

mpl.use("Agg")

FOLDER = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, out: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert load(name).main([*arguments, "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((out / "result.json").read_text(encoding="utf-8")) == printed
    return printed


def test_every_example_is_named_in_the_readme() -> None:
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    for path in FOLDER.glob("*.py"):
        assert f"examples/{path.name}" in readme


@pytest.mark.slow
def test_dcgan_depends_on_its_seed_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    few = ["--rounds", "13", "--quiet"]
    first, again = (run("dcgan", tmp_path, capsys, *few) for _ in range(2))
    assert first == again
    assert list(first) == ["without", "k = 5"]
    assert first["k = 5"]["slow"] != first["k = 5"]["live"]
    assert (tmp_path / "samples.png").stat().st_size > 5000
    assert run("dcgan", tmp_path, capsys, *few, "--seed", "1") != first


def test_dcgan_learns_mnist_with_the_papers_networks(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lookahead_minmax.gan import data

    images, labels = torch.rand(40, 1, 28, 28) * 2 - 1, torch.arange(40) % 10
    monkeypatch.setattr(data, "mnist", lambda folder, *, train=False: (images, labels))
    few = ["--data-dir", str(tmp_path), "--rounds", "2", "--batch-size", "4", "--k", "0"]
    assert load("dcgan").main(few) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Fréchet distance, without: live ")
    assert "round 2/2" in captured.err


def test_adversarial_training_resists_what_it_was_trained_against(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    result = run("adversarial_training", tmp_path, capsys, "--rounds", "300", "--quiet")
    clean, *trained = result.values()
    assert clean["attacked"] < 0.35
    assert clean["clean"] > 0.9
    for row in trained:
        assert row["attacked"] > clean["attacked"] + 0.2


def test_attack_stays_in_its_box_and_raises_the_loss() -> None:
    example = load("adversarial_training")
    network = torch.nn.Linear(4, 3)
    x, y = torch.rand(20, 4) * 2 - 1, torch.arange(20) % 3
    moved = example.attack(network, x, y, 0.3)
    assert (moved - x).abs().max() <= 0.3 + 1e-6  # float32
    assert moved.abs().max() <= 1
    loss = torch.nn.functional.cross_entropy
    assert loss(network(moved), y) > loss(network(x), y)


def test_perturbations_never_leave_their_box_when_players_step_back() -> None:
    example = load("adversarial_training")
    args = argparse.Namespace(seed=0, rounds=12, batch_size=8, radius=0.2, quiet=True)
    seen = []
    lookahead = example.LookaheadMinmax

    class Watched(lookahead):
        def step(self) -> int:
            level = super().step()
            seen.append(self.players["perturbations"][0].param_groups[0]["params"][0].abs().max())
            return level

    example.LookaheadMinmax = Watched
    example.train(torch.rand(16, 4), torch.arange(16) % 10, args, 3)
    assert len(seen) == 12
    assert 0 < max(seen) <= 0.2 + 1e-6


@pytest.mark.filterwarnings("ignore")  # Lightning's own, about its workers and torch's pytrees
def test_lightning_gan_validates_slow_weights_and_saves_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    result = run("lightning_gan", tmp_path, capsys, "--epochs", "2", "--k", "7")
    assert result["rounds"] == 2 * 36  # 1,797 digits, batches of 50
    assert len(result["slow"]) == 2
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (lookahead,) = state["callbacks"].values()
    assert lookahead["rounds"] == result["rounds"]
    assert set(lookahead["players"]) == {"G", "D"}


def test_lagrangian_converges_where_descent_ascent_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    example = load("minmax_lagrangian")
    for seed in range(3):
        assert example.main(["--json", "--seed", str(seed)]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["lookahead"] < 1e-6 < found["plain"]
