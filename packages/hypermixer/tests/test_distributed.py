"""Two processes that each hold half of the tokens compute what one process computes."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from hypermixer import HyperMixing

F64 = torch.float64
LENGTH = 12


def _leave() -> None:
    """End a rank without gloo's teardown, which can abort it while its threads still run."""
    with contextlib.suppress(RuntimeError):  # the other rank may have left already
        dist.barrier()
    os._exit(0)


def _run(rank: int, folder: str) -> None:
    """Run every check in one pair of processes, and leave a file for each that failed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    for check in CHECKS:
        try:
            check(rank)
        except BaseException:  # noqa: BLE001 - also what pytest.raises raises
            Path(folder, f"{check.__name__}.{rank}").write_text(traceback.format_exc())
            os._exit(0)  # the other rank may be waiting in a collective: end both
    _leave()


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_run, args=(str(folder),), nprocs=2, join=True)
    return {path.name: path.read_text() for path in sorted(folder.glob("_check*"))}


def make(**options) -> HyperMixing:
    torch.manual_seed(1)
    layer = HyperMixing(8, 16, 2, init="xavier", dtype=F64, **options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "bias" in name:
                parameter.normal_()
    return layer


def _check_slices(rank: int) -> None:
    """Outputs and all gradients of a sequence cut in two, at an uneven place."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, LENGTH, 8, dtype=F64, generator=generator)
    probe = torch.randn(2, LENGTH, 8, dtype=F64, generator=generator)
    mask = torch.zeros(2, LENGTH, dtype=torch.bool)
    mask[0, 10:] = mask[1, :3] = True
    cut = 8
    own = slice(0, cut) if rank == 0 else slice(cut, LENGTH)
    variants = [
        {},
        {"tied": True},
        {"bias": True},
        {"chunk_size": 3, "bias": True},
        {"length_scale": "mean"},
        {"causal": True},
        {"block_size": 4, "bias": True, "length_scale": "mean"},
        {"causal": True, "chunk_size": 2},
        {"token_info": None},
        {"token_info": "idiap"},
    ]
    for options in variants:
        single = make(**options)
        whole = x.clone().requires_grad_()
        expected = single(whole, key_padding_mask=mask)
        (expected * probe).sum().backward()

        layer = make(**options, process_group=dist.group.WORLD)
        part = x[:, own].clone().requires_grad_()
        y = layer(part, key_padding_mask=mask[:, own])
        (y * probe[:, own]).sum().backward()
        torch.testing.assert_close(y, expected[:, own], rtol=0, atol=1e-10, msg=str(options))
        torch.testing.assert_close(part.grad, whole.grad[:, own], rtol=0, atol=1e-10)
        for ours, theirs in zip(layer.parameters(), single.parameters(), strict=True):
            dist.all_reduce(ours.grad)
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-10)


def _check_cross_and_positions(rank: int) -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(1, 6, 8, dtype=F64, generator=generator)
    k = torch.randn(1, 10, 8, dtype=F64, generator=generator)
    expected = make()(q, k)
    layer = make(process_group=dist.group.WORLD)
    queries = slice(0, 2) if rank == 0 else slice(2, 6)
    keys = slice(0, 7) if rank == 0 else slice(7, 10)
    got = layer(q[:, queries], k[:, keys])
    torch.testing.assert_close(got, expected[:, queries], rtol=0, atol=1e-10)
    ids = (torch.arange(6)[queries], torch.arange(10)[keys])
    got = layer(q[:, queries], k[:, keys], position_ids=ids)
    torch.testing.assert_close(got, expected[:, queries], rtol=0, atol=1e-10)


def _check_refusals(rank: int) -> None:
    layer = make(block_size=4, process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"block_size=4 must divide .* they hold \[6, 6\]"):
        layer(torch.randn(1, 6, 8, dtype=F64))
    with pytest.raises(ValueError, match="cu_seqlens cannot be combined with process_group"):
        layer(torch.randn(6, 8, dtype=F64), cu_seqlens=torch.tensor([0, 6]))
    assert copy.deepcopy(layer).group is layer.group
    with pytest.raises(TypeError, match="save its state_dict"):
        pickle.dumps(layer)


def _check_second_derivative_of_the_reduction(rank: int) -> None:
    from hypermixer.distributed import GroupRef, all_reduce_sum, exclusive_scan

    ref = GroupRef(dist.group.WORLD)
    x = torch.tensor([2.0 + rank], dtype=F64, requires_grad=True)
    (first,) = torch.autograd.grad(all_reduce_sum(x, ref) ** 2, x, create_graph=True)
    # the sum is 5 on both ranks; each rank's square pulls 2·5 back to every rank
    assert float(first.detach()) == 20.0
    (second,) = torch.autograd.grad(first, x)
    assert float(second) == 8.0
    before = exclusive_scan(x, ref)
    assert float(before.detach()) == (0.0 if rank == 0 else 2.0)


def _check_ddp(rank: int) -> None:
    torch.manual_seed(4)
    layer = HyperMixing(8, 16, 2, dtype=F64)
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 4, 5, 8, dtype=F64)
    parallel = nn.parallel.DistributedDataParallel(layer)
    parallel(x[rank]).square().mean().backward()
    (twin(x[0]).square().mean() / 2 + twin(x[1]).square().mean() / 2).backward()
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-10)


def _check_fsdp(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        return  # it came with torch 2.6

    torch.manual_seed(5)
    layer = HyperMixing(8, 16, 2, dtype=F64)
    twin = copy.deepcopy(layer)
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    x = torch.randn(2, 4, 5, 8, dtype=F64)
    y = layer(x[rank])
    torch.testing.assert_close(y, twin(x[rank]), rtol=0, atol=1e-10)
    y.square().mean().backward()
    (twin(x[0]).square().mean() / 2 + twin(x[1]).square().mean() / 2).backward()
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, rtol=0, atol=1e-10)


CHECKS = (
    _check_slices,
    _check_cross_and_positions,
    _check_refusals,
    _check_second_derivative_of_the_reduction,
    _check_ddp,
    _check_fsdp,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_two_processes(check, failures):
    assert not [text for name, text in failures.items() if name.startswith(check.__name__)]


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True},
        {"chunk_size": 3},
        {"block_size": 4, "length_scale": "sqrt"},
        {"length_scale": "mean"},
    ],
    ids=str,
)
@pytest.mark.usefixtures("one_rank")
def test_a_group_of_one_rank_changes_nothing(options):
    x = torch.randn(2, LENGTH, 8, dtype=F64, requires_grad=True)
    plain = make(**options)
    grouped = make(**options, process_group=dist.group.WORLD)
    results = []
    for layer in (plain, grouped):
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("one_rank")
def test_what_a_grouped_layer_refuses_in_one_process():
    layer = make(process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="cu_seqlens cannot be combined with process_group"):
        layer(torch.randn(6, 8, dtype=F64), cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(TypeError, match="save its state_dict"):
        pickle.dumps(layer)
    assert copy.deepcopy(layer).group is layer.group
    x = torch.randn(1, 4, 8, dtype=F64)
    given = layer(x, position_ids=torch.arange(4))
    torch.testing.assert_close(given, layer(x), rtol=0, atol=1e-10)
