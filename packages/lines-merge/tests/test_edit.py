"""Editing one model: exact end points, one rounding, modules in place, buffers, ties."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import State, make_finetuned, make_state
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lines_merge as lm
from lines_merge.cells import CELL

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.view(kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0])
def test_end_points_are_bit_exact(dtype: torch.dtype, gamma: float) -> None:
    base = make_state(dtype=dtype)
    tuned = make_finetuned(base, 1)
    result = lm.edit(base, tuned, gamma)
    assert list(result) == list(base)
    for name, value in result.items():
        assert value.dtype == dtype
        if gamma == 1 or name.startswith("blocks.2."):
            assert torch.equal(bits(value), bits(tuned[name]))
        elif gamma == 0 and not name.startswith("blocks.1."):
            assert torch.equal(bits(value), bits(base[name]))


@pytest.mark.parametrize("schedule", ["linear", "reverse"])
def test_edit_is_the_formula(schedule: str, base: State) -> None:
    tuned = make_finetuned(base, 1)
    result = lm.edit(base, tuned, 0.2, schedule=schedule)
    taus = reference.task_vectors(base, [tuned])
    factors = lm.scales(base, 0.2, 0.8, schedule=schedule)
    expected = reference.lines(base, taus[0], factors)
    for name, value in result.items():
        np.testing.assert_allclose(value.double().numpy(), expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "consensus"])
def test_half_precision_is_the_float32_result_rounded_once(dtype: torch.dtype, method: str) -> None:
    base = make_state(dtype=dtype, blocks=4)
    models = [make_finetuned(base, seed) for seed in range(3)]
    wide = {name: value.float() for name, value in base.items()}
    wide_models = [{name: value.float() for name, value in model.items()} for model in models]
    half = lm.merge(base, models, method, beta=0.7)
    full = lm.merge(wide, wide_models, method, beta=0.7)
    for name in base:
        assert torch.equal(half[name], full[name].to(dtype))


def test_half_precision_is_the_exact_value_rounded_for_nearly_every_entry() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(400_000, generator=generator).bfloat16()}
    models = [
        {"w": (base["w"].float() + 0.02 * torch.randn(400_000, generator=generator)).bfloat16()}
        for _ in range(3)
    ]
    result = lm.merge(base, models, alpha=0.3, lines=False)["w"]
    start = base["w"].double()
    exact = start + 0.3 * sum(model["w"].double() - start for model in models)
    assert (result == exact.bfloat16()).double().mean() > 0.9999


def test_float64_inputs_are_computed_in_float64() -> None:
    base = {"blocks.0.a.w": torch.ones(1), "blocks.1.a.w": torch.ones(1, dtype=torch.float64)}
    tuned = {name: value.double() * (1 + 1e-10) for name, value in base.items()}
    result = lm.edit(base, tuned, alpha=0.5, beta=0.0)
    assert result["blocks.1.a.w"].item() == pytest.approx(1 + 5e-11, rel=1e-16)
    assert result["blocks.0.a.w"].dtype == torch.float32


@pytest.mark.filterwarnings("ignore::lines_merge.UnrelatedBaseWarning")  # large updates read easily
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.3, 1.0, -2.0])
def test_entries_without_update_keep_their_bits(dtype: torch.dtype, factor: float) -> None:
    base = {"w": torch.tensor([-0.0, 0.0, 1.5, -0.0], dtype=dtype)}
    tuned = {"w": torch.tensor([-0.0, 0.0, 1.5, 2.0], dtype=dtype)}
    for models in ([tuned], [tuned, tuned]):
        result = lm.merge(base, models, alpha=factor, lines=False)["w"]
        assert torch.equal(bits(result[:3]), bits(base["w"][:3]))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.floats(-2, 2), st.floats(-2, 2))
def test_edit_is_affine_in_alpha_and_beta(seed: int, alpha: float, beta: float) -> None:
    base = {name: value.double() for name, value in make_state(seed).items()}
    tuned = make_finetuned(base, seed)
    unit = lm.edit(base, tuned, alpha=1.0, beta=0.0)
    slope = lm.edit(base, tuned, alpha=0.0, beta=1.0)
    both = lm.edit(base, tuned, alpha=alpha, beta=beta)
    for name, start in base.items():
        expected = start + alpha * (unit[name] - start) + beta * (slope[name] - start)
        torch.testing.assert_close(both[name], expected, rtol=1e-12, atol=1e-12)


def test_the_order_of_keys_does_not_matter(base: State, models: list[State]) -> None:
    one = lm.merge(base, models, "ties")
    back = [dict(reversed(model.items())) for model in models]
    two = lm.merge(dict(reversed(base.items())), back, "ties")
    assert all(torch.equal(one[name], two[name]) for name in base)


def test_dtype_of_the_result(base: State) -> None:
    tuned = make_finetuned(base, 1)
    half = {name: value.bfloat16() for name, value in tuned.items()}
    assert all(v.dtype == torch.float32 for v in lm.edit(base, half, 0.5).values())
    asked = lm.edit(base, tuned, 0.5, dtype="bfloat16")
    exact = lm.edit(base, tuned, 0.5)
    assert all(torch.equal(asked[name], exact[name].bfloat16()) for name in base)
    assert all(
        v.dtype == torch.float64 for v in lm.edit(base, tuned, 0.5, dtype=torch.float64).values()
    )


def test_integer_tensors_come_from_the_base() -> None:
    base = make_state() | {"steps": torch.tensor(3), "mask": torch.tensor([True, False])}
    tuned = make_finetuned(make_state(), 1) | {
        "steps": torch.tensor(9),
        "mask": torch.tensor([False, False]),
    }
    result = lm.edit(base, tuned, 0.5)
    assert result["steps"].item() == 3
    assert result["mask"].tolist() == [True, False]


def test_batch_norm_statistics() -> None:
    base = make_state() | {"bn.running_mean": torch.zeros(2), "bn.running_var": torch.ones(2)}
    tuned = make_finetuned(make_state(), 1) | {
        "bn.running_mean": torch.ones(2),
        "bn.running_var": torch.tensor([0.5, 4.0]),
    }
    kept = lm.edit(base, tuned, 0.5, buffers="base")
    assert kept["bn.running_mean"].tolist() == [0, 0]
    taken = lm.edit(base, tuned, 0.5, buffers="finetuned")
    assert taken["bn.running_var"].tolist() == [0.5, 4.0]
    scaled = lm.edit(base, tuned, alpha=3.0, beta=0.0)
    assert scaled["bn.running_mean"].tolist() == [3, 3]
    assert scaled["bn.running_var"].tolist() == [0.0, 10.0]  # 1 - 1.5 is no variance
    with pytest.raises(ValueError, match="buffers='finetuned' needs a single model"):
        lm.merge(base, [tuned, tuned], buffers="finetuned")


def test_tied_tensors_are_edited_once_and_stay_tied() -> None:
    base = make_state()
    base["lm_head.weight"] = base["embed.weight"]
    tuned = make_finetuned(make_state(), 1)
    tuned["lm_head.weight"] = tuned["embed.weight"]
    result = lm.edit(base, tuned, 0.5)
    assert result["lm_head.weight"].data_ptr() == result["embed.weight"].data_ptr()
    # a file keeps one of the two names only
    without = {name: value for name, value in tuned.items() if name != "lm_head.weight"}
    assert torch.equal(lm.edit(base, without, 0.5)["embed.weight"], result["embed.weight"])
    back = lm.edit({n: v for n, v in base.items() if n != "lm_head.weight"}, tuned, 0.5)
    assert torch.equal(back["embed.weight"], result["embed.weight"])


@pytest.mark.filterwarnings("ignore::lines_merge.UnrelatedBaseWarning")  # large updates read easily
def test_non_contiguous_and_long_tensors() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, CELL + 7, generator=generator)
    base = {"blocks.0.a.w": rows.t(), "blocks.1.a.w": rows}
    tuned = {name: value + 1 for name, value in base.items()}
    result = lm.edit(base, tuned, alpha=0.25, beta=0.5)
    torch.testing.assert_close(
        result["blocks.0.a.w"], base["blocks.0.a.w"] + 0.25, rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        result["blocks.1.a.w"], base["blocks.1.a.w"] + 0.75, rtol=0, atol=1e-6
    )


@pytest.mark.filterwarnings("ignore::lines_merge.UnrelatedBaseWarning")  # large updates read easily
def test_empty_and_scalar_tensors() -> None:
    base = {"blocks.0.a.w": torch.zeros(0, 3), "blocks.1.a.w": torch.tensor(1.0)}
    tuned = {"blocks.0.a.w": torch.zeros(0, 3), "blocks.1.a.w": torch.tensor(3.0)}
    result = lm.edit(base, tuned, alpha=0.0, beta=0.5)
    assert result["blocks.0.a.w"].shape == (0, 3)
    assert result["blocks.1.a.w"].item() == 2.0


def test_out_writes_into_given_tensors(base: State) -> None:
    tuned = make_finetuned(base, 1)
    expected = lm.edit(base, tuned, 0.3)
    pointers = {name: value.data_ptr() for name, value in tuned.items()}
    result = lm.edit(base, tuned, 0.3, out=tuned)
    for name in base:
        assert torch.equal(tuned[name], expected[name])
        assert result[name].data_ptr() == pointers[name]
    with pytest.raises(ValueError, match=r"out\['pos'\] must be \(4,\), torch.float32; got None"):
        lm.edit(base, tuned, 0.3, out={n: v for n, v in tuned.items() if n != "pos"})
    with pytest.raises(ValueError, match="must be contiguous"):
        lm.edit(base, tuned, 0.3, out=tuned | {"embed.weight": torch.empty(5, 7).t()})


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(3)
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def toys() -> tuple[State, Toy, State]:
    torch.manual_seed(0)
    model = Toy()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return base, model, lm.edit(base, model, 0.3)


def check_edited(model: nn.Module, expected: State) -> None:
    state = {
        name.split("_orig_mod.")[-1].removeprefix("module."): v
        for name, v in model.state_dict().items()
    }
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_edit_in_place_keeps_the_parameters_and_returns_the_module() -> None:
    base, model, expected = toys()
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    assert lm.edit_(model, base, 0.3) is model
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    check_edited(model, expected)
    assert all(parameter.requires_grad for parameter in model.parameters())
    twice = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(model))
    check_edited(twice, expected)
    check_edited(again, expected)


def test_edit_in_place_of_a_compiled_module() -> None:
    base, model, expected = toys()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(5, 4)
    compiled(x)
    lm.edit_(compiled, base, gamma=0.3)
    check_edited(compiled, expected)
    fresh = Toy()
    fresh.load_state_dict(expected)
    torch.testing.assert_close(compiled(x), fresh(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), fresh(x))


def test_edit_in_place_of_a_ddp_module(tmp_path: Any) -> None:
    base, model, expected = toys()
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        lm.edit_(wrapped, base, alpha=0.3, beta=0.7)
        check_edited(wrapped, expected)
        check_edited(wrapped.module, expected)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::lines_merge.UnrelatedBaseWarning")  # large updates read easily
def test_edit_in_place_of_tied_and_non_contiguous_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.embed = nn.Embedding(6, 4)
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
    model.head = nn.Linear(4, 6, bias=False)
    model.head.weight = model.embed.weight
    model.wide = nn.Parameter(torch.randn(3, 5).t())
    base = {name: value.clone() - 1 for name, value in model.state_dict().items()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lm.edit_(model, base, alpha=0.25, beta=0.5)
    state = model.state_dict()
    torch.testing.assert_close(state["embed.weight"], base["embed.weight"] + 0.25)
    assert torch.equal(state["head.weight"], state["embed.weight"])
    torch.testing.assert_close(state["wide"], base["wide"] + 0.25)
    torch.testing.assert_close(state["blocks.1.0.weight"], base["blocks.1.0.weight"] + 0.75)
    assert not torch.equal(before["wide"], state["wide"])


def test_edit_in_place_with_the_base_on_disk(tmp_path: Any) -> None:
    base, model, expected = toys()
    save_file(base, tmp_path / "base.safetensors")
    check_edited(lm.edit_(model, tmp_path / "base.safetensors", 0.3), expected)


def test_device_of_the_result(base: State) -> None:
    tuned = make_finetuned(base, 1)
    moved = lm.merge(base, [tuned], device="cpu")
    assert all(value.device.type == "cpu" for value in moved.values())


def test_edit_in_place_takes_no_output_arguments() -> None:
    base, model, _ = toys()
    for name in ("out", "dtype", "strict"):
        with pytest.raises(TypeError, match=f"edit_ takes no '{name}'"):
            lm.edit_(model, base, 0.3, **{name: None})


def test_a_half_precision_module_keeps_its_dtype() -> None:
    base, model, _ = toys()
    model.bfloat16()
    expected = lm.edit(base, model, 0.3, dtype=torch.bfloat16)
    check_edited(lm.edit_(model, base, 0.3), expected)


def test_results_do_not_depend_on_chunks_and_threads() -> None:
    from lines_merge.lines import run_in_memory
    from lines_merge.merges import make_merge
    from lines_merge.scaling import Scaling
    from lines_merge.sources import MemorySource

    generator = torch.Generator().manual_seed(0)
    base = {f"blocks.{i}.a.w": torch.randn(3 * CELL + 11, generator=generator) for i in range(2)}
    models = [
        {
            name: value + 0.05 * torch.randn(value.shape, generator=generator)
            for name, value in base.items()
        }
        for _ in range(3)
    ]
    for method, arguments in (
        ("task_arithmetic", {"weights": [0.3, 0.4, 0.5]}),
        ("ties", {}),
        ("ties", {"scope": "tensor"}),
        ("dare_ties", {"density": 0.5}),
        ("consensus_ties", {}),
    ):
        results = [
            run_in_memory(
                MemorySource(base),
                {str(t): MemorySource(model) for t, model in enumerate(models)},
                make_merge(method, **arguments),
                Scaling(beta=0.7),
                chunk=chunk,
                threads=threads,
            )
            for chunk, threads in ((CELL, 1), (2 * CELL, 3), (32 * CELL, 2))
        ]
        for other in results[1:]:
            assert all(torch.equal(results[0][name], other[name]) for name in base), method


@pytest.mark.skipif(torch.__version__ < (2, 5), reason="DTensor is public from torch 2.5 on")
def test_dtensor_parameters_are_edited_shard_by_shard(tmp_path: Any) -> None:
    torch.multiprocessing.spawn(_edit_shards, args=(f"file://{tmp_path}/store",), nprocs=2)


def _leave() -> None:
    """End a rank without gloo's teardown, which can abort it while its threads still run."""
    with contextlib.suppress(RuntimeError):  # the other rank may have left already
        torch.distributed.barrier()
    os._exit(0)


def _edit_shards(rank: int, store: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    base, model, expected = toys()
    mesh = init_device_mesh("cpu", (2,))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            sharded = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]))
            module.register_parameter(name, sharded)
    shards = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in base.items()}
    lm.edit_(model, shards, 0.3)
    for name, value in model.state_dict().items():
        assert torch.equal(value.full_tensor(), expected[name])
    with pytest.raises(TypeError, match="is a DTensor; pass a full state dict"):
        lm.edit(shards, model, 0.3)
    _leave()


@pytest.mark.gpu
def test_modules_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    base, model, expected = toys()
    lm.edit_(model.cuda(), base, 0.3)
    check_edited(model.cpu(), expected)
