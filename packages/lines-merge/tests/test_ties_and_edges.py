"""What happens at the edges: ties of one side, missing blocks, infinities, NumPy numbers, strange names."""

from __future__ import annotations

import copy
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lines_merge as lm

State = dict[str, Tensor]
# the updates of these tests are as large as the weights, so that errors show
pytestmark = pytest.mark.filterwarnings("ignore::lines_merge.UnrelatedBaseWarning")


def tied_pair() -> tuple[State, State]:
    """A base whose head is its embedding, and a fine-tuned model with a head of its own."""
    torch.manual_seed(0)
    base = {"embed_tokens.weight": torch.randn(4, 3), "layers.0.fc.weight": torch.randn(3, 3)}
    base["layers.1.fc.weight"] = torch.randn(3, 3)
    base["lm_head.weight"] = base["embed_tokens.weight"]
    tuned = {name: value + 0.1 * torch.randn(value.shape) for name, value in base.items()}
    return base, tuned


def test_a_head_that_the_model_untied_is_kept() -> None:
    base, tuned = tied_pair()
    edited = lm.edit(base, tuned, 1.0)
    assert all(torch.equal(edited[name], tuned[name]) for name in tuned)
    half = lm.edit(base, tuned, alpha=0.5, beta=0.0)["lm_head.weight"]
    mean = (base["lm_head.weight"].double() + tuned["lm_head.weight"].double()) / 2
    torch.testing.assert_close(half.double(), mean, rtol=1e-6, atol=1e-7)


def test_a_head_that_the_model_untied_is_kept_in_files(tmp_path: Path) -> None:
    base, tuned = tied_pair()
    stale = {**base, "lm_head.weight": torch.full((4, 3), 9.0)}  # the config says what counts
    for name, state, tie in (("base", stale, True), ("ft", tuned, False)):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
        config = json.dumps({"tie_word_embeddings": tie, "dtype": "float32"})
        (tmp_path / name / "config.json").write_text(config)
    out = tmp_path / "out"
    lm.merge_files(tmp_path / "base", [tmp_path / "ft"], out, alpha=0.5, beta=0, progress=False)
    head = load_file(out / "model.safetensors")["lm_head.weight"].double()
    mean = (base["lm_head.weight"].double() + tuned["lm_head.weight"].double()) / 2
    torch.testing.assert_close(head, mean, rtol=1e-6, atol=1e-7)
    config = json.loads((out / "config.json").read_text())
    assert config == {"tie_word_embeddings": False, "dtype": "float32"}


def test_one_tensor_for_all_names_of_the_base_is_no_tie() -> None:
    names = [f"blocks.{i}.fc.weight" for i in range(3)]
    base = dict.fromkeys(names, torch.zeros(4))
    tuned = {name: torch.full((4,), i + 1.0) for i, name in enumerate(names)}
    edited = lm.edit(base, tuned, 0.0)
    assert [float(edited[name][0]) for name in names] == [0.0, 1.0, 3.0]


@pytest.mark.filterwarnings("ignore::lines_merge.SkippedTensorsWarning")
@pytest.mark.parametrize("lost", [0, 2, 3])
def test_a_missing_block_does_not_change_the_factors_of_the_others(
    lost: int, tmp_path: Path
) -> None:
    base = {f"blocks.{i}.fc.weight": torch.zeros(2) for i in range(4)}
    tuned = {name: torch.ones(2) for name in base if f".{lost}." not in name}
    edited = lm.edit(base, tuned, gamma=0.0, strict=False)
    wanted = [0.0 if i == lost else i / 3 for i in range(4)]
    assert [float(v[0]) for v in edited.values()] == pytest.approx(wanted, abs=1e-7)
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "ft.safetensors")
    lm.merge_files(
        tmp_path / "base.safetensors",
        [tmp_path / "ft.safetensors"],
        tmp_path / "out",
        alpha=0.0,
        beta=1.0,
        strict=False,
        progress=False,
    )
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], edited[name]) for name in base)


def test_printed_factors_are_the_applied_ones_where_tensor_counts_mislead() -> None:
    """Many small tensors in one list, few large ones in another: parameters decide, not tensors."""
    model = nn.ModuleDict(
        {
            "aux": nn.ModuleList(
                nn.Sequential(*(nn.LayerNorm(2) for _ in range(6))) for _ in range(4)
            ),
            "trunk": nn.ModuleList(nn.Sequential(nn.Linear(20, 20)) for _ in range(6)),
        }
    )
    base = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(1.0)
    depth = lm.DepthMap.from_model(model)
    assert depth.towers == {"trunk": 6}
    edited = lm.edit(base, model, 0.0)
    vector = lm.TaskVector(base, model).lines(0.0, 1.0)
    for name, block in depth._blocks.items():
        factor = 0.0 if block is None else block.index / 5
        assert float(edited[name].flatten()[0]) == pytest.approx(factor, abs=1e-7)
        assert float(vector[name].flatten()[0]) == pytest.approx(factor, abs=1e-7)


def test_an_error_leaves_a_module_and_given_tensors_whole() -> None:
    model = nn.ModuleDict({"blocks": nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))})
    base = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    with torch.no_grad():
        model["blocks"][2].weight[1, 1] = torch.nan
    before = copy.deepcopy(model.state_dict())
    depth = lm.DepthMap.from_patterns("blocks.{i}.")
    with pytest.raises(lm.NonFiniteError):
        lm.edit_(model, base, 0.0, depth=depth)
    out = {name: torch.full_like(value, 7.0) for name, value in base.items()}
    with pytest.raises(lm.NonFiniteError):
        lm.edit(base, model, 0.0, depth=depth, out=out)
    assert all(bool((value == 7.0).all()) for value in out.values())
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_frozen_infinities_come_out_as_they_were(gamma: float) -> None:
    mask = torch.tensor([0.0, -torch.inf, torch.inf])
    base = {"blocks.0.mask": mask, "blocks.1.w": torch.zeros(1)}
    tuned = {"blocks.0.mask": mask.clone(), "blocks.1.w": torch.ones(1)}
    edited = lm.edit(base, tuned, gamma, depth=DEPTH, allow_nonfinite=True)
    assert torch.equal(edited["blocks.0.mask"], mask)


DEPTH = lm.DepthMap.from_patterns("blocks.{i}.")


def test_rows_beyond_the_models_vocabulary_keep_the_bits_of_the_base() -> None:
    torch.manual_seed(0)
    base = {"embed_tokens.weight": torch.randn(6, 3), "layers.0.w.a": torch.randn(2)}
    base["layers.1.w.a"] = torch.randn(2)
    base["embed_tokens.weight"][5, 0] = 1e20  # beyond float16
    tuned = {name: value[:4].half() for name, value in base.items()}
    edited = lm.edit(base, tuned, 1.0, vocab="base")
    assert torch.equal(edited["embed_tokens.weight"][4:], base["embed_tokens.weight"][4:])
    assert torch.equal(edited["embed_tokens.weight"][:4], tuned["embed_tokens.weight"].float())


def test_variances_never_become_negative() -> None:
    base = {"blocks.0.bn.running_var": torch.ones(3), "blocks.1.w.a": torch.zeros(1)}
    tuned = {"blocks.0.bn.running_var": torch.full((3,), 0.1), "blocks.1.w.a": torch.ones(1)}
    vector = lm.TaskVector(base, tuned)
    applied = vector.lines(2.0, 1.0).apply(base)["blocks.0.bn.running_var"]
    assert torch.equal(applied, torch.zeros(3))
    live = {name: torch.empty_like(value) for name, value in base.items()}
    lm.Tuner(base, vector, live).set(2.0, 1.0)
    assert torch.equal(live["blocks.0.bn.running_var"], torch.zeros(3))


def test_a_live_model_of_other_shapes_is_refused() -> None:
    model = nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})
    names = model.state_dict()
    with pytest.raises(
        lm.ShapeMismatchError, match=r"has shape \(2, 2\) in the model and \(1,\) in the update"
    ):
        lm.ScaledModel(model, {n: torch.zeros(1) for n in names}, {n: torch.ones(1) for n in names})


def test_statistics_are_the_fine_tuned_ones_whatever_the_method() -> None:
    base = {"blocks.0.bn.running_var": torch.ones(3), "blocks.1.fc.w": torch.zeros(100)}
    tuned = {"blocks.0.bn.running_var": torch.full((3,), 4.0), "blocks.1.fc.w": torch.randn(100)}
    for method, options in (("ties", {"density": 0.01}), ("task_arithmetic", {})):
        merged = lm.merge(base, [tuned], method, alpha=0.5, beta=0, buffers="finetuned", **options)
        assert torch.equal(merged["blocks.0.bn.running_var"], torch.full((3,), 4.0))


def test_tied_tensors_of_a_task_vector_count_once() -> None:
    model = nn.ModuleDict(
        {"embed_tokens": nn.Embedding(4, 3), "lm_head": nn.Linear(3, 4, bias=False)}
    )
    model["layers"] = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model["lm_head"].weight = model["embed_tokens"].weight
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    base = model.state_dict()
    vector = lm.TaskVector(base, tuned)
    assert "lm_head.weight" not in list(vector)
    parameters = zip(tuned.parameters(), model.parameters(), strict=True)
    squares = sum(float((a.detach() - b.detach()).square().sum()) for a, b in parameters)
    assert vector.norm() == pytest.approx(squares**0.5, rel=1e-6)
    applied = vector.apply(base)
    assert applied["lm_head.weight"] is applied["embed_tokens.weight"]
    depth = lm.DepthMap.from_patterns("layers.{i}.")
    masks = lm.tall_masks(base, [tuned])
    vector.mask(masks.consensus(1)).lines(0.1, 0.2, depth=depth)
    seen: list[State] = []
    lm.tall_masks(base, [tuned], evaluate=lambda _, weights: (seen.append(weights), 1.0)[1])
    assert all(torch.equal(w["lm_head.weight"], w["embed_tokens.weight"]) for w in seen)
    assert not torch.equal(seen[0]["lm_head.weight"], base["lm_head.weight"])


def test_masked_candidates_of_float64_models_stay_exact() -> None:
    torch.manual_seed(0)
    base = {"blocks.0.w.a": torch.randn(50).double(), "blocks.1.w.a": torch.randn(50).double()}
    tuned = {name: value + 0.1 * torch.randn(50).double() for name, value in base.items()}
    seen: list[State] = []
    lm.tall_masks(base, [tuned], [0.0], evaluate=lambda _, w: (seen.append(w), 1.0)[1])
    for name in base:
        torch.testing.assert_close(seen[0][name], tuned[name], rtol=0, atol=1e-15)


def test_magnitude_masks_hold_the_exact_number_of_largest_entries() -> None:
    torch.manual_seed(0)
    base = {"b": torch.zeros(60), "a": torch.zeros(40)}
    models = [{"b": torch.randn(60).round(decimals=1), "a": torch.randn(40).round(decimals=1)}]
    for density in (0.01, 0.13, 0.5, 1.0):
        flat = np.concatenate([models[0][n].numpy() for n in sorted(base)])
        order = np.argsort(-np.abs(flat), kind="stable")  # earlier entries first
        wanted = np.zeros(100, dtype=bool)
        wanted[order[: round(density * 100)]] = True
        mask = lm.magnitude_masks(base, models, density)["0"]
        found = np.concatenate([mask[n].numpy() for n in sorted(base)])
        assert (found == wanted).all()
    sparse = [{"b": torch.eye(60)[0], "a": torch.zeros(40)}]
    assert all(mask.all() for mask in lm.magnitude_masks(base, sparse, 0.5)["0"].values())
    single = lm.magnitude_masks(base, models, 0.1, scope="tensor")["0"]
    assert (int(single["b"].sum()), int(single["a"].sum())) == (6, 4)


def test_a_result_beyond_float16_is_said() -> None:
    base = {"blocks.0.w.a": torch.full((2,), 60000.0).half(), "blocks.1.w.a": torch.zeros(2).half()}
    tuned = {
        "blocks.0.w.a": torch.full((2,), 65000.0).half(),
        "blocks.1.w.a": torch.zeros(2).half(),
    }
    with pytest.warns(lm.OverflowWarning, match=r"'blocks\.0\.w\.a' of the result"):
        lm.merge(base, [tuned], alpha=2.0, beta=0.0)
    wide = lm.merge(base, [tuned], alpha=2.0, beta=0.0, dtype="float32")
    assert wide["blocks.0.w.a"][0] == 60000 + 2 * 4992  # 65000 is 64992 in float16


def test_views_of_one_buffer_in_any_order() -> None:
    big = torch.randn(3, 8)
    names = ["blocks.0.fc.w", "blocks.1.fc.w"]
    for first, second in ((0, 1), (1, 0), (2, 0)):
        base = dict.fromkeys(names[:1], big[first]) | {names[1]: torch.zeros(1)}
        tuned = dict.fromkeys(names[:1], big[second]) | {names[1]: torch.ones(1)}
        edited = lm.edit(base, tuned, alpha=0.5, beta=0.5)
        wanted = (big[first].double() + big[second].double()) / 2
        torch.testing.assert_close(edited[names[0]].double(), wanted, rtol=1e-6, atol=1e-7)


def test_depth_of_a_compiled_module_fits_the_module() -> None:
    model = nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})
    base = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    wrapped = torch.compile(model, backend="eager")
    lm.edit_(wrapped, base, 0.0, depth=lm.DepthMap.from_model(wrapped))
    assert not model["blocks"][0].weight.any()
    assert model["blocks"][1].weight.any()


def test_numbers_of_numpy_are_numbers() -> None:
    base = {f"blocks.{i}.w.a": torch.zeros(2) for i in range(2)}
    tuned = {name: torch.ones(2) for name in base}
    half: Any = np.float32(0.5)
    assert torch.equal(lm.edit(base, tuned, half)["blocks.0.w.a"], torch.full((2,), 0.5))
    assert lm.edit(base, tuned, np.int64(1))["blocks.0.w.a"][0] == 1
    vector = lm.TaskVector(base, tuned)
    for product in (half * vector, vector * half, vector / np.float32(2)):
        assert product["blocks.0.w.a"][0] == 0.5
    weights: Any = np.array([0.5], dtype="f4")
    assert lm.merge(base, [tuned], alpha=1, beta=0, weights=weights)["blocks.0.w.a"][0] == 0.5
    assert lm.merge(base, (m for m in [tuned]), alpha=1, beta=0)["blocks.0.w.a"][0] == 1


def test_task_vectors_over_files_are_copied_by_path(tmp_path: Path) -> None:
    base = {"blocks.0.w.a": torch.zeros(2), "blocks.1.w.a": torch.zeros(2)}
    for name, value in (("base", 0.0), ("ft", 1.0)):
        (tmp_path / name).mkdir()
        save_file({n: torch.full((2,), value) for n in base}, tmp_path / name / "model.safetensors")
    for first, second in (
        (tmp_path / "base", tmp_path / "ft"),
        (tmp_path / "base" / "model.safetensors", tmp_path / "ft" / "model.safetensors"),
    ):
        vector = 3 * lm.TaskVector(first, second)
        for other in (copy.deepcopy(vector), pickle.loads(pickle.dumps(vector))):
            assert torch.equal(other["blocks.1.w.a"], torch.full((2,), 3.0))


def test_task_vectors_refuse_what_has_no_arithmetic() -> None:
    low = {"w": torch.zeros(2).to(torch.float8_e5m2)}
    with pytest.raises(lm.UnsupportedDtypeError):
        lm.TaskVector(low, low)


def test_down_sampling_goes_with_the_stage_that_it_feeds_under_a_pattern() -> None:
    names = [f"stages.{s}.blocks.{i}.fc.weight" for s in range(2) for i in range(2)]
    names += ["stages.1.downsample.0.weight", "head.weight"]
    depth = lm.DepthMap.from_patterns("stages.{s}.blocks.{i}.", names)
    block = depth["stages.1.downsample.0.weight"]
    assert block is not None
    assert (block.index, block.count) == (2, 4)
    assert depth["head.weight"] is None


def write_header(path: Path, table: dict[str, Any], data: bytes = b"") -> Path:
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    "entry",
    [
        {"w": {"dtype": "F32", "shape": [0, 2**70], "data_offsets": [0, 0]}},
        {"\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
    ],
)
def test_headers_that_no_reader_takes_are_refused(entry: dict[str, Any], tmp_path: Path) -> None:
    path = write_header(tmp_path / "x.safetensors", entry)
    with pytest.raises(lm.CheckpointError, match="bad header"):
        lm.TaskVector(path, path)


def test_strange_names_have_no_depth_and_no_traceback(tmp_path: Path) -> None:
    name = f"blocks.{'7' * 5000}.z"
    with pytest.raises(lm.DepthError):
        lm.DepthMap.from_names([name])
    reserved = {"__metadata__": torch.zeros(2), "blocks.0.w.a": torch.zeros(1)}
    with pytest.raises(ValueError, match="the format reserves the name"):
        lm.merge_files(reserved, [reserved], tmp_path / "out", lines=False, progress=False)
    assert not list(tmp_path.iterdir())


def test_recipes_of_plain_paths_and_wrong_tables() -> None:
    from lines_merge.io.recipe import from_common_yaml

    plain = {"merge_method": "task_arithmetic", "base_model": "b", "models": ["m0", "b", "m1"]}
    recipe = from_common_yaml({**plain, "parameters": {"normalize": True}})
    assert recipe["models"] == ["m0", "m1"]
    assert recipe["weights"] == [0.5, 0.5]  # the base has no task vector to weigh
    with pytest.raises(ValueError, match="parameters must be a mapping"):
        from_common_yaml({**plain, "parameters": 3})
    with pytest.raises(ValueError, match="parameters of a model must be a mapping"):
        from_common_yaml({**plain, "models": [{"model": "m0", "parameters": [1]}]})


def test_a_recipe_does_not_name_its_output(tmp_path: Path) -> None:
    from lines_merge.io.recipe import load_recipe

    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"base": "b", "models": ["m"], "out_dir": "x"}))
    with pytest.raises(ValueError, match="out_dir is given with the run"):
        load_recipe(path)
