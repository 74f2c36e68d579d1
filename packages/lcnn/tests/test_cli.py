from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lcnn
from lcnn.cli import main
from lcnn.recipes import models


def tiny() -> nn.Module:
    """For --arch test_cli:tiny."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 10))


def out(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_train_eval_probe(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / f"net.{suffix}")
    common = ["--method", "lcnn+gradreg", "--limit", "16", "--json"]
    run = ["train", *common, "--epochs", "1", "--batch-size", "300", "--gradnorm", "0.01"]
    assert main([*run, "--out", file, "--quiet"]) == 0
    found = out(capsys)
    assert found["method"] == "lcnn+gradreg"
    assert len(found["betas"]) == 4  # type: ignore[arg-type]
    assert main(["eval", *common, "--checkpoint", file, "--radii", "0.1"]) == 0
    assert set(out(capsys)) == {"radius 0", "radius 0.1"}
    assert main(["probe", *common, "--checkpoint", file]) == 0
    probed = out(capsys)
    assert probed["unbounded"] == []
    assert probed["hessian_norm"] <= probed["hessian_bound"]  # type: ignore[operator]
    assert [p.name for p in tmp_path.iterdir()] == [f"net.{suffix}"]


def test_paper_network_and_own_network(capsys: pytest.CaptureFixture[str]) -> None:
    run = ["train", "--epochs", "1", "--batch-size", "600", "--limit", "4", "--radii"]
    assert main([*run, "--arch", "test_cli:tiny"]) == 0
    text = capsys.readouterr()
    assert "curvature" in text.out
    assert "LCNN, epoch 1" in text.err


@pytest.mark.slow
def test_paper_network(capsys: pytest.CaptureFixture[str]) -> None:
    run = ["train", "--epochs", "1", "--batch-size", "1200", "--limit", "2", "--radii", "--json"]
    assert main([*run, "--arch", "resnet18", "--quiet"]) == 0
    assert len(out(capsys)["betas"]) == 17  # type: ignore[arg-type]


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = models.digits_net()
    torch.save(plain.state_dict(), tmp_path / "a.pt")
    target = tmp_path / "b.safetensors"
    assert main(["convert", str(tmp_path / "a.pt"), str(target), "--json"]) == 0
    text = capsys.readouterr()
    assert json.loads(text.out)["converted"] == 13
    assert "CenteredSoftplus" in text.err
    made = lcnn.convert(models.digits_net(), torch.zeros(1, 1, 8, 8))
    from safetensors.torch import load_file

    made.load_state_dict(load_file(target))
    assert torch.equal(made[0].parametrizations.weight.original, plain[0].weight)


def test_timm_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import timm

    torch.save(timm.create_model("resnet10t", num_classes=3).state_dict(), tmp_path / "a.pt")
    run = ["convert", str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), "--arch", "timm:resnet10t"]
    assert main([*run, "--classes", "3", "--input-size", "3", "32", "32", "--quiet"]) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["eval", "--checkpoint", "none.pt"], "cannot read none.pt"),
        (["probe", "--checkpoint", "bad.pt"], "not of this network"),
        (["probe", "--checkpoint", "list.pt"], "holds a list"),
        (["train", "--arch", "alexnet"], "unknown --arch 'alexnet'"),
        (["train", "--arch", "timm:nothing"], "cannot make 'timm:nothing'"),
        (["train", "--arch", "vgg11"], "cannot"),
        (["train", "--dataset", "mnist-test", "--data-dir", "none"], "does not exist"),
        (["convert", "bad.pt", "out.pt"], "cannot convert bad.pt"),
        (["convert", "good.pt", "none/out.pt"], "no such folder"),
    ],
)
def test_bad_input_is_told_in_one_line(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(1)}, "bad.pt")
    torch.save([1], "list.pt")
    torch.save(models.digits_net().state_dict(), "good.pt")
    assert main([*argv, "--quiet"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("argv", [[], ["train", "--epochs", "0"], ["train", "--method", "best"]])
def test_bad_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        main(argv)
    assert info.value.code == 2
    assert capsys.readouterr().err.startswith("lcnn")


def test_module_runs_and_help_is_there() -> None:
    run = [sys.executable, "-m", "lcnn.cli", "--help"]
    text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert all(command in text for command in ("train", "eval", "probe", "convert"))


@pytest.mark.parametrize(
    ("method", "kind", "beta", "bare"),
    [
        ("standard", nn.Softplus, 1000.0, True),
        ("softplus", nn.Softplus, 10.0, True),
        ("minimal", lcnn.CenteredSoftplus, 5.0, True),
        ("lcnn", lcnn.CenteredSoftplus, 5.0, False),
    ],
)
def test_paper_networks_have_the_layers_of_their_method(
    method: str, kind: type[nn.Module], beta: float, bare: bool
) -> None:
    from lcnn.cli import _built
    from lcnn.recipes.data import digits

    made = _built(argparse.Namespace(arch="resnet18", method=method), digits())
    acts = [m for m in made.modules() if isinstance(m, (nn.Softplus, lcnn.CenteredSoftplus))]
    assert len(acts) == 17
    assert all(
        type(m) is kind and torch.as_tensor(m.beta).item() == pytest.approx(beta) for m in acts
    )
    extras = (lcnn.ConvSpectralNorm, lcnn.LipschitzNorm)
    assert bare == (not any(isinstance(m, extras) for m in made.modules()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "missing/net.pt"], "no such folder"),
        (["--lr", "-1"], "learning rate"),
        (["--gradnorm", "-1"], "gradnorm must be"),
        (["--radii", "nan"], "--radii must be"),
        (["--radii", "-1"], "--radii must be"),
    ],
)
def test_bad_settings_are_told_before_training(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--epochs", "1", *options]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1  # no epoch was run, no traceback
