"""The command line: results on stdout, progress on stderr, exit status 0, 1 or 2."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from hypermixer import HyperMixing, __version__
from hypermixer.cli import main


def test_help_and_version(capsys):
    for argument in ("--help", "--version"):
        with pytest.raises(SystemExit) as end:
            main([argument])
        assert end.value.code == 0
    assert __version__ in capsys.readouterr().out


def test_bad_usage_ends_with_2(capsys):
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert main(["experiment", "nothing"]) == 2
    assert "experiment must be one of" in capsys.readouterr().err
    assert main(["experiment", "sst2"]) == 2
    assert "give --data-dir" in capsys.readouterr().err
    assert main(["info", "512,2048"]) == 2
    assert "MODEL must be a checkpoint file or d,d',H" in capsys.readouterr().err
    assert main(["info", "10,20,4"]) == 2
    assert "divisible by num_heads=4" in capsys.readouterr().err
    assert main(["experiment", "cost", "--fraction", "0.5"]) == 2
    assert "does not take that option" in capsys.readouterr().err


def test_info_of_sizes_and_of_a_checkpoint(capsys, tmp_path):
    assert main(["info", "32,128,4", "--length", "50", "--json"]) == 0
    layer = json.loads(capsys.readouterr().out)["layers"]["layer"]
    assert (layer["direct"], layer["factored"]) == (460_800, 135_168)
    path = tmp_path / "model.pt"
    torch.save({f"blocks.1.{n}": t for n, t in HyperMixing(8, 16, 2).state_dict().items()}, path)
    assert main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("N = 1024\n")
    assert "blocks.1" in out


def test_convert_checkpoint(capsys, tmp_path):
    source, target = tmp_path / "old.pt", tmp_path / "new.safetensors"
    state = {}
    for i in (1, 2):
        state[f"mix.hyper.w{i}_gen.fc1_weights"] = torch.randn(2, 4, 4)
        state[f"mix.hyper.w{i}_gen.fc2_weights"] = torch.randn(2, 8, 4)
    torch.save(state, source)
    assert main(["convert-checkpoint", str(source), str(target)]) == 0
    assert "mix: num_heads=2" in capsys.readouterr().out
    assert main(["convert-checkpoint", str(target), str(source)]) == 2
    assert main(["convert-checkpoint", str(tmp_path / "none.pt"), str(target)]) == 2


def test_bench(capsys, tmp_path):
    out = tmp_path / "bench.json"
    arguments = ["bench", "--lengths", "16", "32", "--embed-dim", "32", "--repeats", "1"]
    assert main([*arguments, "--out", str(out), "--backward"]) == 0
    captured = capsys.readouterr()
    assert "hypermixer" in captured.out
    assert "N = 16" in captured.err
    assert [row["length"] for row in json.loads(out.read_text())["rows"]] == [16, 32]
    assert main([*arguments, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_experiment_status_follows_its_claims(capsys, monkeypatch):
    from hypermixer import experiments

    def fake(name, **options):
        assert options["seeds"] == 1
        assert options["mixers"] == ["a", "b"]
        holds = name == "good"
        claim = {"claim": "c", "baseline": "1", "ours": "2", "holds": holds}
        return {"summary": [{"model": "a", "x": 1.0}], "claims": [claim]}

    monkeypatch.setattr(experiments, "run_experiment", fake)
    arguments = ["--seeds", "1", "--mixers", "a,b"]
    assert main(["experiment", "good", *arguments]) == 0
    assert "holds" in capsys.readouterr().out
    assert main(["experiment", "bad", *arguments]) == 1
    assert "FAILS" in capsys.readouterr().out


def test_an_experiments_own_type_errors_are_not_hidden(monkeypatch):
    from hypermixer import experiments

    def broken(name, **options):
        raise TypeError("something else")

    monkeypatch.setattr(experiments, "run_experiment", broken)
    assert main(["experiment", "digits"]) == 2


def test_train(capsys, tmp_path):
    saved = tmp_path / "model.pt"
    arguments = ["train", "--task", "digits", "--steps", "1", "--embed-dim", "16", "--json"]
    assert main([*arguments, "--save", str(saved)]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["task"] == "digits"
    assert 0 <= content["accuracy"] <= 100
    assert "layers.0.mixer.mixing.w1.fc1_weight" in torch.load(saved, weights_only=True)
    assert main([*arguments[:-1], "--quiet", "--model", "transformer"]) == 0
    assert "transformer" in capsys.readouterr().out


def test_module_and_import_are_light():
    code = (
        "import sys, hypermixer; "
        "bad = [m for m in ('matplotlib', 'timm', 'transformers', 'sklearn', "
        "'hypermixer.experiments', 'hypermixer.data', 'hypermixer.baselines') if m in sys.modules]; "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "hypermixer.cli", "info", "8,16,2"], capture_output=True, check=True
    )
    assert b"N*" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experiment", "digits", "--seeds", "0"], "--seeds: must be at least 1, got 0"),
        (["experiment", "digits", "--fraction", "2"], "--fraction: must be above 0 and at most 1"),
        (["experiment", "digits", "--seed", "1"], "--seed"),
        (["train", "--task", "digits", "--steps", "-1"], "--steps: must be at least 1, got -1"),
        (["bench", "--repeats", "0"], "--repeats: must be at least 1, got 0"),
        (["bench", "--lengths", "0"], "--lengths: must be at least 1, got 0"),
        (["info", "32,64,4", "--length", "-5"], "--length: must be at least 1, got -5"),
    ],
)
def test_numbers_out_of_range_are_bad_usage(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_info_is_valid_json_where_the_direct_form_always_wins(capsys):
    assert main(["info", "512,64,8", "--json"]) == 0

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert content["layers"]["layer"]["crossover"] is None
