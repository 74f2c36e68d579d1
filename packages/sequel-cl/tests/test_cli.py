"""The command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sequel import recipes
from sequel.cli import main
from sequel.testing import tiny_data


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(name: str, data_dir: Any, *, flat: bool) -> Any:
        from sequel.scenarios import Dataset

        return Dataset(*tiny_data())

    monkeypatch.setattr(recipes, "make_dataset", small)


FAST = ["--epochs", "1", "--tasks", "2", "--quiet"]


def test_run_resume_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path)
    args = [
        "run",
        "--scenario",
        "permuted-digits",
        "--algo",
        "ewc",
        "--lam",
        "0.5",
        "--seeds",
        "0:2",
    ]
    assert main([*args, *FAST, "--out", out, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 2
    folder = Path(rows[0]["folder"])
    echo = json.loads((folder / "run.json").read_text())
    assert echo["params"]["lam"] == 0.5
    assert (folder / "metrics.csv").exists()
    assert main(["resume", str(folder), "--quiet"]) == 0
    assert f"acc {rows[0]['acc']:.4f}" in capsys.readouterr().out
    assert main(["report", out]) == 0
    assert "permuted-digits-ewc-torch" in capsys.readouterr().out
    assert main(["report", out, "--md"]) == 0
    assert capsys.readouterr().out.startswith("| run | seeds |")
    assert main(["report", out, "--csv"]) == 0
    assert "forgetting_high" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert main(["report", out, "--json", "--plot", str(tmp_path / "c.png")]) == 0
    assert json.loads(capsys.readouterr().out)[0]["seeds"] == 2
    assert (tmp_path / "c.png").exists()


def test_config_file_and_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        'scenario = "class-digits"\nalgo = "er"\ntasks = 3\nepochs = 1\n[params]\nmemory = 12\n'
    )
    assert main(["run", "--config", str(config), "--set", "lr=0.1", "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "class-digits-er-torch-seed0" in captured.out
    assert "task 3/3" in captured.err


def test_sweep_covers_the_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["sweep", "--algo", "ewc", "--grid", "lam=0.1,1", "--grid", "lr=0.01,0.1"]
    assert main([*args, *FAST, "--out", str(tmp_path), "--json"]) == 0
    folders = {Path(r["folder"]).name for r in json.loads(capsys.readouterr().out)}
    assert folders == {
        f"permuted-digits-ewc-lam={lam},lr={lr}-torch-seed0" for lam in ("0.1", "1") for lr in ("0.01", "0.1")
    }  # fmt: skip


def test_both_backends_in_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optax")
    args = [
        "run",
        "--algo",
        "naive",
        "--backend",
        "torch,jax",
        *FAST,
        "--out",
        str(tmp_path),
        "--json",
    ]
    assert main(args) == 0
    one, two = json.loads(capsys.readouterr().out)
    assert one["acc"] == pytest.approx(two["acc"], abs=0.05)  # float32


def test_parity_command(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jax")
    assert main(["parity", "--algo", "naive", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["params"] <= 1e-10


def test_lists_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for what, word in (
        ("algos", "ewc"),
        ("scenarios", "permuted"),
        ("repro", "mcsgd_rotatedmnist"),
        ("configs", "class_digits"),
    ):
        assert main(["list", what]) == 0
        assert word in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert main([]) == 2
    with pytest.raises(SystemExit):
        main(["--help"])
    assert main(["download", "digits"]) == 0
    assert "90 training" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(recipes.configs()))
def test_every_shipped_configuration_is_whole(name: str) -> None:
    config = recipes.configs()[name]
    assert set(config) <= {*recipes.DEFAULTS, "expected"}
    assert recipes.make_algorithm(config["algo"], config.get("params", {}))
    kind, _, data = config["scenario"].partition("-")
    assert kind in recipes.KINDS
    assert data in recipes.DATA
    assert ("expected" in config) is ("mnist" in data)


def test_a_shipped_configuration_runs_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["run", "--config", "permuted_digits", *FAST, "--out", str(tmp_path), "--json"]
    assert main(args) == 0
    folder = Path(json.loads(capsys.readouterr().out)[0]["folder"])
    echo = json.loads((folder / "run.json").read_text())
    assert (echo["algo"], echo["params"]["lam"], echo["epochs"]) == ("ewc", 5.0, 1)
    assert main([*args, "--algo", "si"]) == 0  # EWC's lam is not SI's
    folder = Path(json.loads(capsys.readouterr().out)[0]["folder"])
    assert json.loads((folder / "run.json").read_text())["params"]["lam"] == 1.0


def test_repro_runs_its_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(recipes.REPRO["mcsgd_rotatedmnist"], "params", {"per_task": 10})
    for name in recipes.REPRO:
        extra = ["--set", "glances=1", "--set", "memory=20"] if "lamaml" in name else []
        assert main(["repro", name, *FAST, *extra, "--out", str(tmp_path)]) == 0
        assert "published: acc" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["run", "--algo", "magic"], "unknown algorithm 'magic'"),
        (["run", "--config", "mine"], "neither a file nor one of class_digits, ewc_rotatedmnist"),
        (["run", "--scenario", "sorted-digits"], "unknown scenario"),
        (["run", "--set", "lam"], "expected NAME=VALUE"),
        (["run", "--algo", "ewc", "--set", "weight=1"], "ewc has no parameter weight"),
        (["run", "--algo", "ewc", "--lam", "-1"], "lam must be"),
        (["repro", "nothing"], "unknown configuration"),
        (["resume", "nowhere"], "no run.json"),
        (["report", "nowhere"], "no result.json"),
        (["run", "--config", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_bad_usage_exits_with_2(
    args: list[str], text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    extra = ["--out", str(tmp_path), *FAST] if args[0] == "run" else []
    assert main([*args, *extra]) == 2
    assert text in capsys.readouterr().err


def test_unknown_settings_and_data(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown settings"):
        recipes.run({"colour": 1})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="unknown data"):
        recipes.make_dataset("svhn", None, flat=True)
    with pytest.raises(ValueError, match="--data-dir"):
        recipes.make_dataset("mnist-test", None, flat=True)
    assert recipes.make_dataset("digits", None, flat=False).x_train.shape == (1400, 1, 8, 8)


@pytest.mark.slow
def test_spawned_workers(tmp_path: Path) -> None:
    from sequel.cli import _pool

    base = {"scenario": "permuted-digits", "tasks": 1, "epochs": 1, "train_size": 64}
    jobs = [({**base, "seed": s}, str(tmp_path / str(s)), True) for s in (0, 1)]
    assert [Path(r["folder"]).name for r in _pool(jobs, 2)] == ["0", "1"]


def test_a_folder_of_another_run_is_refused_and_stays_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["run", "--algo", "ewc", *FAST, "--out", str(tmp_path)]
    assert main([*args, "--lam", "5", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    before = (Path(row["folder"]) / "run.json").read_text()
    assert main([*args, "--lam", "5", "--set", "lr=0.4"]) == 2
    assert "lr: 0.05 there, 0.4 here" in capsys.readouterr().err
    assert main([*args, "--lam", "7"]) == 2
    assert "'lam': 5" in capsys.readouterr().err
    assert (Path(row["folder"]) / "run.json").read_text() == before
    assert main(["resume", row["folder"], "--quiet"]) == 0
    assert f"acc {row['acc']:.4f}" in capsys.readouterr().out


def test_a_sweep_keeps_what_is_set_beside_its_config_file(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text('algo = "ewc"\ntasks = 2\nepochs = 1\n[params]\nlam = 3\n')
    args = ["sweep", "--config", str(config), "--set", "mode=online", "--grid", "gamma=0.5,1"]
    assert main([*args, "--quiet", "--out", str(tmp_path)]) == 0
    found = [json.loads(f.read_text())["params"] for f in sorted(tmp_path.rglob("run.json"))]
    assert [(p["lam"], p["mode"], p["gamma"]) for p in found] == [
        (3, "online", 0.5),
        (3, "online", 1),
    ]


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["run", "--backend", "foo"], "backend must be one of"),
        (["run", "--seeds", "3:1"], "--seeds must be like"),
        (["run", "--seeds", "5:"], "--seeds must be like"),
        (["run", "--set", "lr=1e30"], "the loss is"),
        (["sweep", "--grid", "lr=1", "--jobs", "0"], "--jobs must be an integer >= 1"),
    ],
)
def test_what_cannot_run_says_so_in_one_line(
    args: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*args, *FAST, "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.err.count("\n") == 1


def test_another_algorithm_drops_the_parameters_of_a_config_file(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text('algo = "er"\ntasks = 2\nepochs = 1\n[params]\nmemory = 12\n')
    args = ["run", "--config", str(config), "--algo", "ewc", "--quiet", "--out", str(tmp_path)]
    assert main([*args, "--lam", "2"]) == 0
    (found,) = (json.loads(f.read_text()) for f in tmp_path.rglob("run.json"))
    assert (found["algo"], found["params"]["lam"]) == ("ewc", 2)


@pytest.mark.parametrize("bad", [["--epochs", "-1"], ["--set", "batch_size=0"]])
def test_a_run_that_cannot_start_claims_no_folder(tmp_path: Path, bad: list[str]) -> None:
    args = ["run", *FAST, "--out", str(tmp_path)]
    assert main([*args, *bad]) == 2
    assert not list(tmp_path.rglob("run.json"))
    assert main(args) == 0
