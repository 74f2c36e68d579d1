"""The command line and recipe files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import State
from safetensors.torch import load_file, save_file

import lines_merge as lm
from lines_merge.cli import main
from lines_merge.io.recipe import from_common_yaml, load_recipe


@pytest.fixture
def paths(tmp_path: Path, base: State, models: list[State]) -> list[str]:
    result = []
    for name, state in zip(("base", "m0", "m1", "m2"), [base, *models], strict=True):
        save_file(state, tmp_path / f"{name}.safetensors")
        result.append(str(tmp_path / f"{name}.safetensors"))
    return result


def same(folder: Path, expected: State) -> None:
    found = load_file(folder / "model.safetensors")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def run(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def test_edit(
    paths: list[str], tmp_path: Path, base: State, models: list[State], capsys: Any
) -> None:
    assert run("edit", *paths[:2], "-o", tmp_path / "a", "--gamma", 0.2, "--quiet") == 0
    same(tmp_path / "a", lm.edit(base, models[0], 0.2))
    output = capsys.readouterr()
    assert "alpha, beta    0.2, 0.8" in output.out
    assert output.err == ""
    arguments = [
        "--alpha",
        0.1,
        "--beta",
        0.7,
        "--schedule",
        "reverse",
        "--outside",
        0.5,
        "--json",
        "--quiet",
    ]
    assert run("edit", *paths[:2], "-o", tmp_path / "b", *arguments) == 0
    same(
        tmp_path / "b",
        lm.edit(base, models[0], alpha=0.1, beta=0.7, schedule="reverse", outside=0.5),
    )
    assert json.loads(capsys.readouterr().out)["beta"] == 0.7


def test_merge(paths: list[str], tmp_path: Path, base: State, models: list[State]) -> None:
    assert run("merge", *paths, "-o", tmp_path / "a", "--beta", 0.6, "--max-memory", "200MiB") == 0
    same(tmp_path / "a", lm.merge(base, models, beta=0.6))
    options = [
        "--method",
        "ties",
        "--density",
        0.4,
        "--alpha",
        0.5,
        "--no-lines",
        "--scope",
        "tensor",
    ]
    assert (
        run("merge", *paths, "-o", tmp_path / "b", *options, "--sign-merge", "sum", "--quiet") == 0
    )
    expected = lm.merge(
        base, models, "ties", density=0.4, alpha=0.5, lines=False, scope="tensor", merge="sum"
    )
    same(tmp_path / "b", expected)
    options = [
        "--method",
        "consensus",
        "--k",
        1,
        "--lambdas",
        0.5,
        "--pattern",
        "blocks.{i}.",
        "--norm",
        2,
    ]
    assert run("merge", *paths, "-o", tmp_path / "c", *options, "--alpha", "auto", "--verify") == 0
    same(tmp_path / "c", lm.merge(base, models, "consensus", k=1, lambdas=0.5, norm=2))
    options = [
        "--method",
        "dare",
        "--p",
        0.5,
        "--seed",
        3,
        "--family",
        "timm_vit",
        "--dtype",
        "float16",
    ]
    assert (
        run("merge", *paths, "-o", tmp_path / "d", *options, "--weights", 1, 2, 3, "--threads", 1)
        == 0
    )
    same(
        tmp_path / "d",
        lm.merge(base, models, "dare", p=0.5, seed=3, weights=[1, 2, 3], dtype="float16"),
    )


def test_soup_and_wise_ft_and_sweep(
    paths: list[str], tmp_path: Path, base: State, models: list[State], capsys: Any
) -> None:
    assert run("soup", *paths, "-o", tmp_path / "a", "--quiet") == 0
    same(tmp_path / "a", lm.uniform_soup(base, models))
    assert run("wise-ft", *paths[:2], "-o", tmp_path / "b", "--gamma", 0.6, "--quiet") == 0
    same(tmp_path / "b", lm.wise_ft(base, models[0], 0.6))
    assert run("sweep", *paths, "-o", tmp_path / "c", "--betas", 0.1, 0.2, "--quiet") == 0
    same(tmp_path / "c" / "beta-0.2", lm.merge(base, models, beta=0.2))
    capsys.readouterr()
    assert (
        run("sweep", *paths, "-o", tmp_path / "c2", "--betas", 0.1, 0.2, "--quiet", "--json") == 0
    )
    assert [row["beta"] for row in json.loads(capsys.readouterr().out)] == [0.1, 0.2]


def test_dry_run_writes_nothing(paths: list[str], tmp_path: Path, capsys: Any) -> None:
    assert run("merge", *paths, "-o", tmp_path / "a", "--method", "ties", "--dry-run") == 0
    assert "passes       3 (statistics 1, norms, write)" in capsys.readouterr().out
    assert run("merge", *paths, "-o", tmp_path / "a", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["passes"] == ["write"]
    assert not (tmp_path / "a").exists()


def test_inspect(
    paths: list[str], base: State, models: list[State], capsys: Any, tmp_path: Path
) -> None:
    assert run("inspect", paths[0], "--alpha", 0.2, "--beta", 0.8) == 0
    assert capsys.readouterr().out.strip() == lm.DepthMap.from_names(sorted(base)).describe(
        0.2, 0.8
    )
    assert run("inspect", *paths[:2]) == 0
    table = capsys.readouterr().out
    norm = sum(float((models[0][n] - base[n]).square().sum()) for n in base if ".1." in n) ** 0.5
    row = next(line.split() for line in table.splitlines() if line.startswith("blocks.1  "))
    assert float(row[1]) == pytest.approx(norm, rel=1e-4)
    assert run("inspect", *paths[:2], "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tensors"]["blocks.1.norm.weight"]["block"] == ["blocks", 1, 3]
    assert [row["block"] for row in found["norms"]] == [
        "blocks.0",
        "blocks.1",
        "blocks.2",
        "outside",
    ]
    odd = {n: v for n, v in base.items() if n != "pos"} | {"new": torch.ones(1)}
    save_file(odd | {"norm.weight": torch.ones(9)}, tmp_path / "odd.safetensors")
    assert run("inspect", paths[0], tmp_path / "odd.safetensors") == 0
    table = capsys.readouterr().out
    for text in ("new: only in", "pos: only in", "norm.weight: (5,) torch.float32 against (9,)"):
        assert f"differs: {text}" in table


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("edit {base} {m0} -o {out}", 2, "pass gamma, or both alpha and beta"),
        ("edit {base} {m0} -o {out} --gamma 2", 2, "gamma must be in"),
        ("edit {base} {m0} -o {out} --gamma .5 --outside deep", 2, "--outside must be"),
        ("merge {base} -o {out}", 2, "at least one model"),
        ("merge {base} {m0} -o {out} --density 20 --method ties", 2, "fraction in"),
        ("merge {base} {m0} -o {out} --density .2", 2, "takes no density"),
        ("merge {base} {m0} -o {out} --max-memory 1MiB", 2, "max_memory must be at least"),
        ("merge {base} {m0} --recipe r.yaml -o {out}", 2, "not both"),
        ("wise-ft {base} {m0} -o {out} --gamma 1.5", 2, "gamma must be in"),
        ("merge {base} {odd} -o {out}", 3, "does not have the tensors"),
        ("merge {base} {base} -o {out} --method ties", 3, "merged task vector is zero"),
        ("inspect {odd}", 3, "no stack of blocks"),
        ("inspect {base} --family t5", 3, "no name matches"),
        ("merge {base} nowhere -o {out}", 4, "no such file or folder"),
        ("merge --recipe nowhere.yaml -o {out}", 4, "cannot be read"),
        ("merge {base} {m0} -o {full}", 4, "is not empty"),
    ],
)
def test_exit_status(
    paths: list[str], tmp_path: Path, capsys: Any, command: str, status: int, message: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    save_file({"w": torch.ones(1)}, tmp_path / "odd.safetensors")
    places = {
        "out": tmp_path / "out",
        "full": tmp_path / "full",
        "odd": tmp_path / "odd.safetensors",
    }
    text = command.format(base=paths[0], m0=paths[1], **places)
    assert main([*text.split(), *(["--quiet"] if "inspect" not in text else [])]) == status
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("lines-merge: ")
    assert message in output.err
    assert not (tmp_path / "out").exists()


def test_usage_errors_of_the_parser_and_module_entry() -> None:
    command = [sys.executable, "-m", "lines_merge.cli"]
    result = subprocess.run([*command, "merge"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "-o/--out" in result.stderr
    help_text = subprocess.run(
        [*command, "--help"], capture_output=True, text=True, check=True
    ).stdout
    for name in ("edit", "merge", "sweep", "soup", "wise-ft", "inspect"):
        assert name in help_text
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == f"lines-merge {lm.__version__}\n"


def test_flags_reach_the_merge(
    paths: list[str], tmp_path: Path, base: State, models: list[State]
) -> None:
    odd = {n: v for n, v in models[0].items() if n != "pos"}
    odd["norm.weight"] = odd["norm.weight"] * float("inf")
    for index in range(2):
        odd[f"blocks.{index + 3}.norm.weight"] = torch.ones(5)
    save_file(odd, tmp_path / "odd.safetensors")
    gap = {n: v for n, v in base.items() if not n.startswith("blocks.1.")}
    save_file(gap, tmp_path / "gap.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    (out / "x").write_text("x")
    flags = ["--no-strict", "--allow-nonfinite", "--allow-gaps", "--overwrite", "--quiet"]
    with pytest.warns(lm.SkippedTensorsWarning):
        status = run(
            "edit",
            tmp_path / "gap.safetensors",
            tmp_path / "odd.safetensors",
            "-o",
            out,
            "--gamma",
            0.0,
            *flags,
        )
    assert status == 0
    found = load_file(out / "model.safetensors")
    assert torch.equal(found["blocks.2.norm.weight"], models[0]["blocks.2.norm.weight"])
    assert torch.equal(found["pos"], base["pos"])


# Recipes


def yaml_recipe(
    paths: list[str], method: str, parameters: str = "{}", weights: Any = (1, 2, 3), **more: Any
) -> str:
    rows = "\n".join(
        f"  - model: {path}\n    parameters: {{weight: {weight}{', density: 0.4' if 'ties' in method else ''}}}"
        for path, weight in zip(paths[1:], weights, strict=True)
    )
    base = f"base_model: {paths[0]}\n" if more.pop("base", True) else ""
    extra = "".join(f"{key}: {value}\n" for key, value in more.items())
    return f"merge_method: {method}\n{base}models:\n{rows}\nparameters: {parameters}\n{extra}"


@pytest.mark.parametrize(
    ("method", "parameters", "expected"),
    [
        ("task_arithmetic", "{lambda: 0.5}", {"alpha": 0.5, "weights": [1, 2, 3]}),
        ("task_arithmetic", "{normalize: true}", {"alpha": 1.0, "weights": [1 / 6, 2 / 6, 3 / 6]}),
        ("linear", "{}", {"alpha": 1.0, "weights": [1 / 6, 2 / 6, 3 / 6]}),
        ("ties", "{}", {"method": "ties", "density": 0.4, "scope": "tensor", "weights": [1, 2, 3]}),
        (
            "ties",
            "{normalize: false, int8_mask: true}",
            {
                "method": "ties",
                "density": 0.4,
                "scope": "tensor",
                "merge": "sum",
                "weights": [1, 2, 3],
            },
        ),
        (
            "dare_ties",
            "{lambda: 0.7}",
            {
                "method": "dare_ties",
                "p": 0.6,
                "merge": "sum",
                "alpha": 0.7,
                "weights": [1, 2, 3],
                "scope": "tensor",
            },
        ),
        (
            "task_arithmetic",
            "{lambda: [0.2, 1.0]}",
            {"lines": True, "alpha": 0.2, "beta": 0.8, "outside": "depth", "weights": [1, 2, 3]},
        ),
    ],
)
def test_common_yaml_is_imported(
    paths: list[str],
    tmp_path: Path,
    base: State,
    models: list[State],
    method: str,
    parameters: str,
    expected: dict[str, Any],
) -> None:
    file = tmp_path / "merge.yaml"
    file.write_text(yaml_recipe(paths, method, parameters, dtype="float32"))
    assert run("merge", "--recipe", file, "-o", tmp_path / "out", "--quiet") == 0
    same(tmp_path / "out", lm.merge(base, models, **{"lines": False, **expected}))


def test_gradient_weights_and_base_among_the_models(
    paths: list[str], base: State, models: list[State]
) -> None:
    import yaml

    text = yaml_recipe(paths, "task_arithmetic", weights=("[0.0, 1.0]", 0.5, 2))
    recipe = from_common_yaml(yaml.safe_load(text))
    assert recipe["weights"] == [[0.0, 1.0], 0.5, 2.0]
    text = yaml_recipe([paths[0], *paths], "linear", weights=(1, 1, 1, 1), base=False)
    recipe = from_common_yaml(yaml.safe_load(text))
    assert recipe["base"] == paths[0]
    assert recipe["models"] == paths[1:]
    arguments = {key: value for key, value in recipe.items() if key not in {"base", "models"}}
    average = {n: (base[n] + sum(model[n] for model in models)) / 4 for n in base}
    for name, value in lm.merge(recipe["base"], recipe["models"], **arguments).items():
        torch.testing.assert_close(value, average[name], rtol=0, atol=1e-6)


BASE = {
    "merge_method": "ties",
    "base_model": "b",
    "models": [{"model": "m", "parameters": {"density": 0.5}}],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"merge_method": "slerp"},
            "merge_method must be one of linear, task_arithmetic, ties, dare_ties",
        ),
        ({"slices": []}, "without counterpart: slices"),
        ({"models": []}, "lists no models"),
        ({"models": [{"model": "b"}]}, "same density|no model besides the base"),
        (
            {"merge_method": "task_arithmetic", "models": [{"model": "b"}]},
            "no model besides the base",
        ),
        ({"models": [{"model": 3}]}, "a model must be given by its path"),
        ({"base_model": None}, "needs base_model"),
        ({"parameters": {"lambda": [1, 2, 3]}}, "must have two points"),
        (
            {"parameters": {"lambda": [{"filter": "mlp", "value": 1}]}},
            "a weight must be a number or a list",
        ),
        ({"parameters": {"select_topk": 1}}, r"without counterpart: \['select_topk'\]"),
        (
            {"models": [{"model": "m", "parameters": {"density": 0.5}}, {"model": "n"}]},
            "same density",
        ),
        ({"models": [{"model": "m", "parameters": {"density": "x"}}]}, "same density, a number"),
        ({"merge_method": "dare_ties", "parameters": {"rescale": False}}, "rescale: false"),
        (
            {
                "merge_method": "linear",
                "parameters": {"normalize": False},
                "models": [{"model": "m", "parameters": {"weight": 0.5}}],
            },
            "weights that sum to 1",
        ),
        (
            {
                "merge_method": "linear",
                "models": [{"model": "m", "parameters": {"weight": [0, 1]}}],
            },
            "gradient weights need normalize: false",
        ),
        (
            {"merge_method": "linear", "models": [{"model": "m", "parameters": {"weight": 0}}]},
            "sum to 0",
        ),
    ],
)
def test_recipes_without_counterpart_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_common_yaml({**BASE, **change})


def test_a_base_given_as_a_mapping() -> None:
    recipe = from_common_yaml({**BASE, "base_model": {"path": "x"}})
    assert recipe["base"] == "x"


def test_recipe_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {
        "a.json": ("{", "not JSON"),
        "b.yaml": ("a: [", "not YAML"),
        "c.yaml": ("- 1", "a recipe is a mapping"),
        "d.json": ("{}", "a recipe has base and models"),
    }
    for name, (text, message) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            load_recipe(tmp_path / name)
    with pytest.raises(lm.CheckpointError, match="cannot be read"):
        load_recipe(tmp_path / "absent.yaml")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match=r"lines-merge\[cli\]"):
        load_recipe(tmp_path / "b.yaml")


def test_a_saved_recipe_runs_from_the_command_line(paths: list[str], tmp_path: Path) -> None:
    depth = ["--pattern", "blocks.{i}."]
    assert run("merge", *paths, "-o", tmp_path / "a", "--beta", 0.3, "--quiet", *depth) == 0
    assert (
        run(
            "merge",
            "--recipe",
            tmp_path / "a" / "lines_merge.json",
            "-o",
            tmp_path / "b",
            "--quiet",
        )
        == 0
    )
    same(tmp_path / "b", load_file(tmp_path / "a" / "model.safetensors"))
    assert (
        run(
            "merge",
            "--recipe",
            tmp_path / "a" / "lines_merge.json",
            "-o",
            tmp_path / "c",
            "--beta",
            0.9,
            "--quiet",
        )
        == 0
    )
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in "ac")
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_importing_the_package_loads_the_core_alone() -> None:
    code = (
        "import sys, torch, numpy, safetensors; before = set(sys.modules); import lines_merge; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names) - {'numpy'}), "
        "'lines_merge.cli' in sys.modules, 'lines_merge.recipes' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["lines_merge", "False", "False"]
