from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import lcnn

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


def _leave() -> None:
    """End a rank without gloo's teardown, which can abort it while its threads still run."""
    with contextlib.suppress(RuntimeError):  # the other rank may have left already
        dist.barrier()
    os._exit(0)


def build() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    return lcnn.convert(net, torch.zeros(1, 1, 8, 8))


def train(model: nn.Module, owner: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(lcnn.param_groups(owner), 0.1)
    criterion = lcnn.LCNNLoss(model, gradnorm=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        criterion(x, y).backward()
        optimizer.step()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(8, 1, 8, 8, generator=generator), torch.arange(8) % 3


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, y = data()
    model = build()
    wrapped = nn.parallel.DistributedDataParallel(model)
    train(wrapped, model, x[rank::2], y[rank::2])
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    _leave()


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = build()
    train(alone, alone, *data())
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name]), name  # buffers included
        # the mean over two halves is the mean over all, up to the order of sums
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)


def shard(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, y = data()
    model = build()
    scalars = {p for group in lcnn.param_groups(model)[1:] for p in group["params"]}
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=scalars)
    for scalar in scalars:
        scalar.register_post_accumulate_grad_hook(average)
    train(model, model, x[rank::2], y[rank::2])
    whole = {k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in model.state_dict().items()}
    torch.save(whole, f"{folder}/{rank}.pt")
    _leave()


def average(parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def test_two_sharded_processes_agree_with_one(tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed.fsdp", reason="needs FSDP2")
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("needs torch 2.6")
    mp.spawn(shard, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = build()
    train(alone, alone, *data())
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name]), name  # buffers included
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
