from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import pair

import deepemd
from deepemd.cli import main


def test_distance_prints_the_exact_emd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = pair(1, 20)
    np.save(tmp_path / "a.npy", x[0].numpy())
    np.save(tmp_path / "b.npy", y[0].numpy())
    files = [str(tmp_path / "a.npy"), str(tmp_path / "b.npy")]
    assert main(["distance", *files]) == 0
    expected = float(deepemd.emd(x[0], y[0]))
    assert float(capsys.readouterr().out) == pytest.approx(expected, rel=1e-5)
    assert main(["distance", *files, "--json", "--method", "auction", "--p", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method"] == "auction"
    assert found["lower"][0] <= found["distance"][0] <= found["upper"][0] * (1 + 1e-6)
    assert main(["distance", *files, "--points", "5", "--method", "chamfer", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lower"] is None


def test_train_then_eval_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "out": str(tmp_path / "run"), "steps": 99, "sizes": [8], "first": [1], "last": [1],
        "points": 16, "model": {"dim": 3, "width": 16, "depth": 1, "num_heads": 2, "fourier": 1},
    }  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps(config))
    arguments = ["train", str(tmp_path / "c.json"), "--steps", "2", "--half", "--quiet"]
    assert main([*arguments, "--decoder-pairs", "0", "--out", str(tmp_path / "run")]) == 0
    folder = tmp_path / "run" / "pretrained"
    assert str(folder) in capsys.readouterr().out
    out = tmp_path / "report"
    shared = ["--sizes", "12", "--pairs", "8", "--quiet", "--out", str(out)]
    assert main(["eval", str(folder), *shared]) == 0
    assert "| argmax |" in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {
        "report.md", "report.json", "scatter.png", "frontier.png",
    }  # fmt: skip
    assert main(["eval", str(folder), "--sizes", "8", "--pairs", "8", "--json", "--quiet"]) == 0
    assert "in distribution, N=8" in json.loads(capsys.readouterr().out)


def test_bench_data_and_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "b.json"
    shared = ["bench", "--sizes", "16", "--pairs", "1", "--methods", "exact", "--quiet"]
    assert main([*shared, "--out", str(out)]) == 0
    assert "| 16 | exact (SciPy) |" in capsys.readouterr().out
    assert json.loads(out.read_text())["environment"]["torch"] == torch.__version__
    make = ["data", "make", "--points", "8", "--pairs", "2"]
    assert main([*make, "--out", str(tmp_path / "s")]) == 0
    assert (tmp_path / "s" / "shard-00000.safetensors").exists()
    capsys.readouterr()
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoints"] == {"tiny": 210944}
    from deepemd.data import sets

    folder = tmp_path / sets.SOURCES["modelnet10"].folder
    folder.mkdir()
    assert main(["data", "fetch", "modelnet10", "--data-dir", str(tmp_path)]) == 0
    assert main(["data", "verify", "modelnet10", "--data-dir", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["distance", "a.las", "b.las"], "suffix must be one of"),
        (["distance", "a.npy", "b.npy"], "a.npy"),
        (["train", "none.json"], "none.json"),
        (["eval", "huge"], "unknown checkpoint 'huge'"),
        (["data", "make"], "--out DIR"),
        (["data", "fetch"], "name of a data set"),
        (["data", "fetch", "scanobjectnn", "--data-dir", "nowhere"], "terms of use"),
        (["data", "verify", "x"], "unknown data set 'x'"),
    ],
)
def test_bad_usage_is_told_and_exits_with_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert told in capsys.readouterr().err


def test_module_runs_as_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["deepemd", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("deepemd", run_name="__main__")
    assert stop.value.code == 0


def test_import_brings_neither_extras_nor_rooms_and_needs_no_network() -> None:
    code = (
        "import sys, torch, socket\n"
        "def refuse(*a, **k): raise OSError('no network')\n"
        "socket.socket.connect = refuse\n"
        "import deepemd\n"
        "heavy = {'matplotlib', 'ot', 'lap', 'h5py', 'trimesh', 'sklearn', 'geomloss', 'accelerate',"
        " 'huggingface_hub', 'scipy.optimize', 'deepemd.recipes', 'deepemd.data', 'deepemd.cli'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "x = torch.rand(2, 32, 3)\n"
        "d = deepemd.emd(x, x + 1, method='deepemd')\n"
        "assert abs(float(d[0]) - 3 ** 0.5) < 0.02, d\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
