"""The command line and the pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch

from lookahead_minmax import plot
from lookahead_minmax.cli import GAMES, main
from lookahead_minmax.games import Bilinear, run

mpl.use("Agg")


@pytest.mark.parametrize("name", GAMES)
def test_every_game_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["game", name, "--steps", "40", "--k", "5", "--dimension", "4", "--json"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result) == 2


def test_game_numbers_are_those_of_the_runner(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["game", "bilinear", "--steps", "60", "--lr", "0.3", "--k", "6", "--json"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out)
    plain, ours = result.values()
    assert ours["end"] < ours["start"] < plain["end"]
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_spectrum_prints_the_theory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["spectrum", "--lr", "0.3", "--k", "6", "--suggest", "--out", str(tmp_path)]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["sigma 1"]["period"] == pytest.approx(0.744755, abs=1e-6)
    assert result["suggested"]["k"] == 10
    assert main(arguments) == 0
    assert "0.744755" in capsys.readouterr().out


@pytest.mark.parametrize("k", [[], ["--k", "5"]])
def test_gan_on_digits(k: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["gan", "--rounds", "24", *k, "--out", str(tmp_path)]
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert "round 24/24" in captured.err
    assert set(json.loads(captured.out)["summary"]) == {"live", "ema", *(["ema_slow"] if k else [])}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["game", "bilinear", "--k", "0"], "k must be at least 1"),
        (["game", "bilinear", "--k", "5", "--alpha", "2"], "alpha must be in"),
        (["game", "bilinear", "--batch-size", "2"], "belongs to the stochastic game"),
        (["game", "bilinear", "--dimension", "0"], "--dimension must be at least 1"),
        (["game", "stochastic", "--batch-size", "0"], "batch_size must be at least 1"),
        (["gan", "--rounds", "0"], "rounds must be at least 1"),
        (["gan", "--data", "ring", "--resume"], "--resume needs the folder"),
        (["gan", "--data", "ring", "--resume", "--out", "DAMAGED"], "No such file"),
        (["gan", "--d-iters", "0"], "d_iters must be at least 1"),
        (["gan", "--data", "ring", "--scale", "0_1"], "scale belongs to images"),
        (["spectrum", "--sigma", "1", "2", "3"], "--sigma takes one"),
        (["gan", "--data", "mnist", "--data-dir", "DAMAGED"], "has the checksum"),
    ],
)
def test_bad_input_is_status_two(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(b"damaged")
    assert main([str(tmp_path) if a == "DAMAGED" else a for a in arguments]) == 2
    assert message in capsys.readouterr().err


def test_usage_errors_are_status_two() -> None:
    for arguments in ([], ["game", "chess"]):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2


def test_phase_plot_draws_every_path() -> None:
    axes = plot.plot_phase({"a": [(1.0, 0.0), (0.5, 0.5)], "b": [(0.0, 1.0)]})
    assert len(axes.lines) == 3
    mpl.pyplot.close(axes.figure)


def test_plots_draw_on_given_axes_and_leave_out_what_diverged() -> None:
    game = Bilinear(torch.eye(2, dtype=torch.float64))
    diverging = run(game, steps=2000, lr=1.0)
    _, axes = mpl.pyplot.subplots()
    assert plot.plot_distances({"gda": diverging}, axes) is axes
    assert axes.lines[0].get_ydata().max() < 1e6
    mpl.pyplot.close(axes.figure)


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    calls: list[Any] = [lambda: plot.plot_distances({}), plot.plot_stability]
    for call in calls:
        with pytest.raises(ImportError, match=r"lookahead-minmax\[plot\]"):
            call()


def test_divergence_is_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["game", "bilinear", "--lr", "3", "--steps", "2000", "--dimension", "2", "--json"]
    assert main(arguments) == 0

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    assert json.loads(capsys.readouterr().out, parse_constant=refuse)["gda"]["end"] is None


def test_spectrum_of_the_optimistic_method_keeps_the_previous_update(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["spectrum", "--method", "ogda", "--lr", "0.3", "--k", "4", "--json"]
    assert main(arguments) == 0
    matrix = torch.tensor(  # on (x, y, x of the last round, y of the last round)
        [[1, -0.6, 0, 0.3], [0.6, 1, -0.3, 0], [1, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.float64
    )
    period = torch.linalg.matrix_power(matrix, 4)
    period[:2] = 0.5 * torch.eye(4, dtype=torch.float64)[:2] + 0.5 * period[:2]
    expected = torch.linalg.eigvals(period).abs().max().item()
    result = json.loads(capsys.readouterr().out)
    assert result["sigma 1"]["period"] == pytest.approx(expected, rel=1e-10)


def test_gan_takes_the_recipes_settings(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["gan", "--rounds", "2", "--betas", "0.05", "0.999", "--batch-size", "20"]
    assert main([*arguments, "--scale", "0_1", "--quiet", "--json"]) == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert (recipe["betas"], recipe["batch_size"]) == ([0.05, 0.999], 20)


def test_gan_resumes_the_run_of_its_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["gan", "--data", "ring", "--rounds", "12", "--k", "4", "--quiet", "--json"]
    arguments += ["--out", str(tmp_path)]
    assert main(arguments) == 0
    whole = capsys.readouterr().out
    assert main([*arguments, "--resume"]) == 0  # the run is over: its last numbers again
    assert json.loads(capsys.readouterr().out) == json.loads(whole)
    assert main([*arguments, "--resume", "--seed", "3"]) == 2
    assert "other settings: ['seed']" in capsys.readouterr().err
