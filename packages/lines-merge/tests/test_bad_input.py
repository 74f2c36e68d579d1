"""What is wrong with an input is said by type and message, before anything is written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import State, make_finetuned, make_state
from safetensors.torch import save_file

import lines_merge as lm


@pytest.fixture
def files(tmp_path: Path, base: State, models: list[State]) -> tuple[Path, list[Path]]:
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "m0", "m1", "m2")]
    for path, state in zip(paths, [base, *models], strict=True):
        save_file(state, path)
    return paths[0], paths[1:]


def test_missing_and_extra_keys_are_listed(base: State, models: list[State]) -> None:
    odd = {name: value for name, value in models[0].items() if name != "pos"} | {
        "new": torch.ones(1)
    }
    with pytest.raises(
        lm.KeyMismatchError, match=r"missing \[pos\] \(1\); extra \[new\] \(1\)"
    ) as info:
        lm.merge(base, [odd])
    assert isinstance(info.value, KeyError)
    assert str(info.value).startswith("model 0 does not have")
    with pytest.warns(lm.SkippedTensorsWarning, match=r"model 0: \[pos\]"):
        result = lm.merge(base, [odd, models[1]], strict=False)
    assert set(result) == set(base)
    assert torch.equal(result["pos"], base["pos"])


def test_at_most_ten_names_are_listed() -> None:
    base = make_state(blocks=8)
    with pytest.raises(lm.KeyMismatchError, match=r"missing \[(\S+, ){10}\.\.\.\] \(28\)"):
        lm.edit(base, {}, 0.5)


def test_key_mismatch_is_found_before_a_write(files: Any, tmp_path: Path) -> None:
    save_file({"new": torch.ones(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(lm.KeyMismatchError):
        lm.merge_files(files[0], [tmp_path / "odd.safetensors"], tmp_path / "out", progress=False)
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []


def test_reported_in_files_with_strict_false(files: Any, tmp_path: Path, base: State) -> None:
    odd = {name: value for name, value in base.items() if name != "pos"} | {"new": torch.ones(1)}
    save_file(odd, tmp_path / "odd.safetensors")
    with pytest.warns(lm.SkippedTensorsWarning):
        report = lm.merge_files(
            files[0],
            [tmp_path / "odd.safetensors"],
            tmp_path / "out",
            strict=False,
            alpha=1.0,
            progress=False,
        )
    label = str(tmp_path / "odd.safetensors")
    assert (report.skipped, report.dropped) == ({label: ["pos"]}, {label: ["new"]})
    assert report.copied == ["pos"]
    assert "kept from base" in str(report)


def test_shapes(base: State, models: list[State]) -> None:
    models[1]["pos"] = torch.zeros(9)
    with pytest.raises(
        lm.ShapeMismatchError, match=r"'pos' has shape \(4,\) in base and \(9,\) in model 1"
    ) as info:
        lm.merge(base, models)
    assert isinstance(info.value, ValueError)
    with pytest.raises(lm.ShapeMismatchError):
        lm.merge(base, models, vocab="base")
    with pytest.raises(ValueError, match="vocab must be None or 'base'"):
        lm.merge(base, models, vocab="union")


@pytest.mark.parametrize("rows", [5, 9])
def test_vocabulary_of_the_base_keeps_its_rows(rows: int, tmp_path: Path) -> None:
    base = make_state() | {"embed_tokens.weight": torch.zeros(7, 3)}
    tuned = make_finetuned(make_state(), 1) | {"embed_tokens.weight": torch.ones(rows, 3)}
    with pytest.raises(lm.ShapeMismatchError, match="vocab='base' accepts embeddings"):
        lm.edit(base, tuned, 0.5)
    result = lm.edit(base, tuned, alpha=0.5, beta=0.5, vocab="base")["embed_tokens.weight"]
    common = min(rows, 7)
    assert torch.equal(result[:common], torch.full((common, 3), 0.5))
    assert torch.equal(result[common:], torch.zeros(7 - common, 3))
    for name, state in (("base", base), ("tuned", tuned)):
        save_file(state, tmp_path / f"{name}.safetensors")
    lm.merge_files(
        tmp_path / "base.safetensors",
        [tmp_path / "tuned.safetensors"],
        tmp_path / "out",
        alpha=0.5,
        beta=0.5,
        vocab="base",
        progress=False,
    )
    assert torch.equal(lm.TaskVector(base, tmp_path / "out")["embed_tokens.weight"], result)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["base", "model"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "consensus", "dare"])
def test_non_finite_values(
    base: State, models: list[State], value: float, where: str, method: str
) -> None:
    state, label = (base, "base") if where == "base" else (models[2], "model 2")
    state["head.weight"][1, 3] = value
    with pytest.raises(
        lm.NonFiniteError, match=rf"'head.weight' of {label} holds {value} at flat index 8"
    ) as info:
        lm.merge(base, models, method)
    assert isinstance(info.value, ValueError)
    result = lm.merge(base, models, method, allow_nonfinite=True, alpha=0.5)
    assert torch.isfinite(result["pos"]).all()


@pytest.mark.filterwarnings("ignore::lines_merge.UnrelatedBaseWarning")  # an update of any size
def test_a_sum_that_overflows_is_not_an_input_error() -> None:
    base = {"w": torch.full((4,), -3e38)}
    result = lm.merge(base, [{"w": torch.full((4,), 3e38)}], alpha=0.0, lines=False)
    assert torch.equal(result["w"], base["w"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_factors_that_are_not_finite(base: State, models: list[State], value: float) -> None:
    for name in ("alpha", "beta"):
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            lm.merge(base, models, **{name: value})
    with pytest.raises(ValueError, match="gamma must be finite"):
        lm.edit(base, models[0], value)


def test_negative_factors_are_task_negation(base: State, models: list[State], recwarn: Any) -> None:
    result = lm.edit(base, models[0], alpha=-1.0, beta=0.0)
    torch.testing.assert_close(result["pos"], 2 * base["pos"] - models[0]["pos"], rtol=0, atol=1e-6)
    assert not recwarn


@pytest.mark.parametrize("gamma", [-0.1, 1.1])
def test_gamma_outside_the_unit_interval(base: State, models: list[State], gamma: float) -> None:
    with pytest.raises(
        ValueError, match=r"gamma must be in \[0, 1\].*alpha and beta for extrapolation"
    ):
        lm.edit(base, models[0], gamma)


def test_gamma_together_with_alpha_or_neither(base: State, models: list[State]) -> None:
    with pytest.raises(TypeError, match="not both"):
        lm.edit(base, models[0], 0.5, alpha=0.1)
    with pytest.raises(TypeError, match="pass gamma, or both alpha and beta"):
        lm.edit(base, models[0], beta=0.1)
    with pytest.raises(TypeError, match="alpha must be a finite number"):
        lm.edit(base, models[0], alpha=True, beta=0.1)
    with pytest.raises(TypeError, match="alpha must be a finite number, got 'half'"):
        lm.merge(base, models, alpha="half")


@pytest.mark.parametrize("density", [0, -0.1, 1.5, 20, "0.2"])
@pytest.mark.parametrize("method", ["ties", "magnitude", "consensus_ties", "dare_ties"])
def test_density_is_a_fraction(base: State, models: list[State], method: str, density: Any) -> None:
    with pytest.raises(ValueError, match=r"fraction in \(0, 1\]"):
        lm.merge(base, models, method, density=density)


def test_no_model(base: State) -> None:
    for nothing in ([], {}):
        with pytest.raises(ValueError, match="no model to merge"):
            lm.merge(base, nothing)
    assert set(lm.merge(base, [make_finetuned(base, 1)])) == set(base)


@pytest.mark.parametrize("wrong", ["path", torch.nn.Linear(1, 1), {"w": torch.ones(1)}])
def test_one_model_where_a_list_is_meant(base: State, wrong: Any) -> None:
    with pytest.raises(TypeError, match="wrap one in a list"):
        lm.merge(base, wrong)


@pytest.mark.parametrize(
    "method", ["average", "task_arithmetic", "ties", "consensus", "dare", "magnitude"]
)
def test_identical_checkpoints(base: State, method: str, tmp_path: Path) -> None:
    with pytest.raises(lm.ZeroTaskVectorError, match="merged task vector is zero") as info:
        lm.merge(base, [base, base], method)
    assert isinstance(info.value, ValueError)
    for settings in ({"alpha": 0.5}, {"lines": False}):
        result = lm.merge(base, [base, base], method, **settings)
        assert all(torch.equal(result[name], base[name]) for name in base)
    save_file(base, tmp_path / "base.safetensors")
    path = tmp_path / "base.safetensors"
    with pytest.raises(lm.ZeroTaskVectorError):
        lm.merge_files(path, [path], tmp_path / "sub" / "out", method, progress=False)
    assert list(tmp_path.glob("sub/*")) == []
    zero = {name: torch.zeros_like(value) for name, value in base.items()}
    with pytest.raises(lm.ZeroTaskVectorError):
        lm.auto_alpha([zero], zero)
    with pytest.raises(ValueError, match="no task vector"):
        lm.auto_alpha([], base)
    with pytest.raises(ValueError, match="norm must be 1 or 2"):
        lm.auto_alpha([base], base, norm=3)


def test_no_block_and_ambiguous_depth(tmp_path: Path) -> None:
    base = {"a.weight": torch.ones(2), "b.weight": torch.ones(2)}
    with pytest.raises(lm.DepthError, match="from_patterns"):
        lm.edit(base, base, 0.5)
    # one factor for everything needs no depth
    assert torch.equal(lm.edit(base, base, alpha=0.5, beta=0.0)["a.weight"], base["a.weight"])


@pytest.mark.parametrize(
    "name",
    ["l.qweight", "l.weight.absmax", "l.weight.quant_state.bitsandbytes__nf4", "l.SCB", "l.g_idx"],
)
def test_quantised_layers(name: str) -> None:
    state = {name: torch.zeros(2, dtype=torch.uint8)}
    with pytest.raises(lm.UnsupportedDtypeError, match="dequantise the checkpoint first") as info:
        lm.merge(state, [state])
    assert isinstance(info.value, TypeError)


def test_dtypes_without_arithmetic() -> None:
    state = {"w": torch.zeros(2, dtype=torch.complex64)}
    with pytest.raises(lm.UnsupportedDtypeError, match=r"'w' is torch.complex64"):
        lm.merge(state, [state])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_needs_a_dtype(dtype: torch.dtype) -> None:
    base = {"w": torch.tensor([1.0, -0.0, 2.0]).to(dtype)}
    tuned = {"w": torch.tensor([2.0, -0.0, 2.0]).to(dtype)}
    with pytest.raises(lm.UnsupportedDtypeError, match="pass dtype="):
        lm.merge(base, [tuned], lines=False)
    result = lm.merge(base, [tuned], alpha=0.5, lines=False, dtype=torch.float32)["w"]
    assert result.tolist() == [1.5, 0.0, 2.0]
    assert torch.signbit(result[1])


def test_dtype_argument(base: State, models: list[State]) -> None:
    for wrong in ("int8", "half precision", torch.int64):
        with pytest.raises(ValueError, match=r"dtype must be one of torch.float32"):
            lm.merge(base, models, dtype=wrong)


def test_what_is_no_source(base: State) -> None:
    with pytest.raises(TypeError, match="expected a state dict, a module or a path, got int"):
        lm.edit(3, base, 0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'model' is a dict, not a tensor"):
        lm.edit({"model": base}, base, 0.5)  # type: ignore[dict-item]
    meta = {name: value.to("meta") for name, value in base.items()}
    with pytest.raises(TypeError, match="meta device"):
        lm.edit(base, meta, 0.5)


def test_unrelated_models_are_suspicious(base: State) -> None:
    other = make_state(seed=5)
    with pytest.warns(
        lm.UnrelatedBaseWarning, match=r"update of model 0 is 1\.\d\d times as large"
    ):
        lm.merge(base, [other])


def test_an_alpha_above_one_is_said(base: State, models: list[State]) -> None:
    with pytest.warns(lm.LargeAlphaWarning, match=r"alpha = \d+.* is above 1"):
        lm.merge(base, models, "ties", density=0.02)


def test_methods_and_their_arguments(base: State, models: list[State]) -> None:
    with pytest.raises(ValueError, match="unknown method 'tie'; allowed: average, consensus"):
        lm.merge(base, models, "tie")
    with pytest.raises(
        TypeError, match="'task_arithmetic' takes no density; its arguments: weights"
    ):
        lm.merge(base, models, density=0.2)
    with pytest.raises(TypeError, match="method must be a name or a Merge, got int"):
        lm.merge(base, models, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="need a method given by name"):
        lm.merge(base, models, lm.BaseMerge(), density=0.2)
    with pytest.raises(TypeError, match="BaseMerge does not say how"):
        lm.merge(base, models, lm.BaseMerge())
    for arguments, message in (
        ({"method": "ties", "merge": "median"}, "merge must be 'mean', 'sum' or 'max'"),
        ({"method": "ties", "scope": "row"}, "scope must be 'global' or 'tensor'"),
        ({"method": "ties", "compat": "old"}, "compat must be None or 'reference'"),
        ({"method": "consensus", "k": -1}, "k must be an integer of at least 0"),
        ({"method": "consensus", "k": True}, "k must be an integer"),
        ({"method": "consensus", "lambdas": -0.1}, "lambdas must be non-negative"),
        ({"method": "consensus", "lambdas": [0.4]}, "lambdas has 1 items for 3 models"),
        ({"method": "dare", "p": 1.0}, r"p must be a probability in \[0, 1\)"),
        ({"weights": [1.0]}, "weights has 1 items for 3 models"),
        ({"weights": [1.0, math.nan, 1.0]}, "weights must be finite"),
        ({"weights": [1.0, [], 1.0]}, "weights must be finite"),
        ({"norm": 3}, "norm must be 1 or 2"),
        ({"buffers": "keep"}, "buffers must be 'scale', 'base' or 'finetuned'"),
        ({"schedule": "cosine"}, "schedule must be 'linear' or 'reverse'"),
        ({"towers": "both"}, "towers must be"),
        ({"outside": "beta"}, "outside must be"),
    ):
        with pytest.raises(ValueError, match=message):
            lm.merge(base, models, **arguments)
    with pytest.raises(TypeError, match="seed must be an integer"):
        lm.merge(base, models, "dare", seed=0.5)
