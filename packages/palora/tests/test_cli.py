from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import palora
from palora.cli import main
from palora.examples import training
from palora.examples.digits import task as real_task


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits problem with few composites, so that commands take a second."""
    from palora.examples import digits

    monkeypatch.setattr(digits, "task", lambda seed=0: real_task(512, 256, seed))


def text(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_overhead_of_a_named_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["overhead", "segnet-cityscapes", "--tasks", "2", "--rank", "4", "--json"]) == 0
    data = json.loads(text(capsys))
    assert data["total"] == 26_064_992
    assert main(["overhead", "torch.nn:Identity"]) == 2
    assert main(["overhead", "palora.examples.models:LeNet"]) == 0
    assert "27,450" in text(capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["overhead", "nothing"], "unknown model 'nothing'"),
        (["overhead", "no_module:x"], "cannot make"),
        (["overhead", "lenet", "--tasks", "1"], "tasks must be at least 2"),
        (["overhead", "lenet", "--rank", "0"], "rank must be an integer"),
        (["merge", "/nonexistent", "--preference", ".5,.5"], "--out is required"),
        (["merge", "/nonexistent", "--preference", ".5,.5", "-o", "x"], "No such file"),
        (["hypervolume", "/nonexistent", "--ref", "1,1"], "No such file"),
        (["digits", "--sweep", "width"], "cannot sweep 'width'"),
        (["recipe", "nothing"], "unknown recipe"),
        (["recipe", "adult"], "pass --data-dir"),
        (["recipe", "utkface"], "pass --data-dir"),
        (["front", "/nonexistent"], "No such file"),
        (["overhead", "json:loads"], "cannot make 'json:loads'"),
        (["overhead", "json:JSONDecoder"], "made a JSONDecoder, not an nn.Module"),
    ],
)
def test_bad_input_is_told_in_one_line_with_status_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_bad_usage_exits_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["digits", "--schedule", "x"], ["hypervolume", "f", "--ref", "a"]):
        with pytest.raises(SystemExit) as found:
            main(argv)
        assert found.value.code == 2
    assert "not numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        ".2,.8\n.5,.5\n.8,.2\n",
        "[[0.2,0.8],[0.5,0.5],[0.8,0.2]]",
        '{"losses": [[0.2,0.8],[0.5,0.5],[0.8,0.2]]}',
        "lambda_a,lambda_b,loss_a,loss_b\n1,0,.2,.8\n.5,.5,.5,.5\n0,1,.8,.2\n",
    ],
)
def test_hypervolume_reads_csv_and_json(
    content: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "points"
    path.write_text(content)
    out = tmp_path / "o.json"
    assert main(["hypervolume", str(path), "--ref", "1,1", "--json", "--out", str(out)]) == 0
    data = json.loads(text(capsys))
    assert data == json.loads(out.read_text())
    assert data["hypervolume"] == pytest.approx(0.37)
    assert data["nondominated"] == 3
    monkeypatch.setattr("sys.stdin", io.StringIO(content))
    assert main(["hypervolume", "-", "--ref", "1,1"]) == 0
    assert text(capsys).startswith("0.37 ")
    path.write_text("a,b\n1,2\n")
    assert main(["hypervolume", str(path), "--ref", "1,1"]) == 2


@pytest.mark.usefixtures("small")
def test_digits_checkpoint_through_front_merge_and_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "run")
    assert main(["digits", "--epochs", "1", "--out", folder, "--json", "--quiet"]) == 0
    (row,) = json.loads(text(capsys))
    assert row["parameters"] == 7_188
    png, out = tmp_path / "f.png", tmp_path / "f.json"
    pytest.importorskip("matplotlib").use("Agg")
    assert main(["front", folder, "--grid", "5", "--json", "--png", str(png), "-o", str(out)]) == 0
    data = json.loads(text(capsys))
    assert len(data["losses"]) == 5
    assert png.stat().st_size > 1000
    assert main(["front", str(out)]) == 0
    assert text(capsys).startswith("lambda_top-left")

    merged = tmp_path / "merged.safetensors"
    assert main(["merge", folder, "--preference", ".8,.2", "-o", str(merged), "--json"]) == 0
    from safetensors.torch import load_file

    from palora.examples.models import MODELS

    plain = MODELS["digits"]()
    plain.load_state_dict(load_file(merged))
    model = palora.load(MODELS["digits"](), folder)
    for key, value in palora.merge(model, [0.8, 0.2]).state_dict().items():
        torch.testing.assert_close(plain.state_dict()[key], value, rtol=0, atol=1e-7)

    for extra, expected in (([], ["bottom-right", "top-left"]), (["--preference", ".8,.2"], [])):
        target = tmp_path / f"peft{len(extra)}"
        assert main(["export-peft", folder, "-o", str(target), *extra]) == 0
        assert sorted(p.name for p in target.iterdir() if p.is_dir()) == expected


def test_merge_of_every_layout_on_files_equals_merge_in_memory(tmp_path: Path) -> None:
    from conftest import fill
    from safetensors.torch import load_file

    net = nn.ModuleDict(
        {
            "conv": nn.Conv2d(2, 4, 3), "flat": nn.Conv1d(2, 4, 3), "fc": nn.Linear(4, 3),
            "attention": nn.MultiheadAttention(4, 2), "table": nn.Embedding(5, 3),
        }
    )  # fmt: skip
    model = fill(
        palora.inject(
            net, 2, rank=1, qkv="split", layer_temperature=2.0,
            target=["conv", "flat", "fc", "attention", "table"],
        )
    )  # fmt: skip
    palora.save(model, tmp_path / "c")
    out = tmp_path / "m.safetensors"
    assert main(["merge", str(tmp_path / "c"), "--preference", ".3,.7", "-o", str(out)]) == 0
    found = load_file(out)
    expected = palora.merge(model, [0.3, 0.7]).state_dict()
    assert set(found) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-7)
    palora.save(model, tmp_path / "d", base=False)
    assert main(["merge", str(tmp_path / "d"), "--preference", ".3,.7", "-o", str(out)]) == 2
    assert main(["front", str(tmp_path / "c")]) == 2


def test_merge_on_files_covers_a_layer_under_both_of_its_names(tmp_path: Path) -> None:
    from conftest import fill, naive_weight
    from safetensors.torch import load_file

    layer = nn.Linear(3, 3)
    model = fill(palora.inject(nn.ModuleDict({"a": layer, "b": layer}), 2, rank=1))
    palora.save(model, tmp_path / "c")
    out = tmp_path / "m.safetensors"
    assert main(["merge", str(tmp_path / "c"), "--preference", ".3,.7", "-o", str(out)]) == 0
    expected = naive_weight(layer, torch.tensor([0.3, 0.7])).float()
    for name in ("a", "b"):
        found = load_file(out)[f"{name}.weight"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    again = nn.Linear(3, 3)
    palora.load(nn.ModuleDict({"a": again, "b": again}), tmp_path / "c")
    assert torch.equal(again.palora_B, layer.palora_B)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("palora.safetensors", "{}", "is not a whole safetensors file"),
        ("palora_config.json", "[]", "has format None"),
        ("palora_config.json", '{"format": 1, "tasks": ["a", "b"]}', "has no entry rank"),
    ],
)
def test_damaged_checkpoints_are_told_in_one_line(
    name: str, content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    palora.save(palora.inject(nn.Linear(2, 2), 2, rank=1), tmp_path)
    (tmp_path / name).write_text(content)
    assert main(["merge", str(tmp_path), "--preference", ".5,.5", "-o", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "content", "message"),
    [
        (["front"], "[1, 2]", "not the JSON of a front"),
        (["front"], '{"prefs": [[1, 0]]}', "it needs the entries prefs, losses"),
        (["hypervolume", "--ref", "1,1"], '{"prefs": [[1, 0]]}', "it has no entry 'losses'"),
        (["hypervolume", "--ref", "1,1"], ".2,.8\n.5\n", "rows differ in length"),
        (["hypervolume", "--ref", "1,1"], "", "holds no table of points"),
        (["hypervolume", "--ref", "1,1"], "[]", "none is there"),
    ],
)
def test_files_that_hold_something_else(
    command: list[str], content: str, message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "file"
    path.write_text(content)
    assert main([*command, str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["digits", "--epochs", "0"], "argument --epochs: must be an integer of at least 1"),
        (["digits", "--seeds", "-1"], "argument --seeds"),
        (["recipe", "adult", "--epochs", "x"], "argument --epochs"),
        (["merge", "run", "--preference", "a,b"], "not numbers separated by commas"),
        ([], "required: command"),
    ],
)
def test_bad_usage_is_told_in_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("small")
def test_sweeps_and_baselines(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["digits", "--epochs", "1", "--sweep", "rank,schedule", "--baselines", "--json"]
    assert main(argv) == 0
    rows = json.loads(text(capsys))
    assert [r["rank"] for r in rows[:4]] == [1, 2, 4, 8]
    schedules = ["anneal", "fixed", "dirichlet", "anneal-dirichlet"]
    assert [r["schedule"] for r in rows[4:8]] == schedules
    assert [r["method"] for r in rows[8:]] == ["pamal", "cosmos", "phn", "linear"]
    assert rows[-1]["spearman"] is None
    assert rows[8]["parameters"] == 9_896
    assert main(["digits", "--epochs", "1", "--quiet"]) == 0
    assert text(capsys).splitlines()[0].startswith("rank\trays\tschedule\tseed")


def test_recipes_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "adult"
    folder.mkdir()
    lines = ["age,workclass,marital-status,relationship,income"]
    for i in range(600):
        rich = ">50K" if i % 3 == 0 else "<=50K"
        single = "Never-married" if i % 2 else "Divorced"
        lines.append(
            f"{20 + i % 40 + (10 if i % 3 == 0 else 0)},{'ab'[i % 2]}, {single},Husband,{rich}"
        )
    (folder / "adult.csv").write_text("\n".join(lines))
    argv = ["recipe", "adult", "--data-dir", str(tmp_path), "--epochs", "1", "--json"]
    assert main(argv) == 0
    data = json.loads(text(capsys))
    assert data["recipe"] == "adult"
    assert len(data["losses"]) == 11


def test_module_runs_as_a_script_and_help_is_quick_to_import() -> None:
    code = (
        "import sys, palora.cli; sys.exit(any(m in sys.modules for m in ('sklearn','matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    done = subprocess.run(
        [sys.executable, "-m", "palora.cli", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("overhead", "merge", "front", "hypervolume", "digits", "recipe", "export-peft"):
        assert command in done.stdout


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="method must be one of"):
        training.train(real_task(256, 64), training.TrainConfig(method="x"))
