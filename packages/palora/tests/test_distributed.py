from __future__ import annotations

import contextlib
import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
import torch.multiprocessing as mp
from torch import Tensor, nn

import palora

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")

RAYS = torch.tensor([[0.2, 0.8], [1.0, 0.0]])


def model_and_data() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    model = palora.inject(net, 2, rank=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model, torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)


def losses(out: Tensor, target: Tensor) -> list[Tensor]:
    return list((out - target).square().mean(0))


def step(model: nn.Module, owner: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer = torch.optim.SGD(palora.param_groups(owner, 0.1))
    for _ in range(3):
        out = palora.step_loss(model, losses, (x, y), RAYS)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()


def trained_by_ddp(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    model = model_and_data()[0]
    wrapped = nn.parallel.DistributedDataParallel(model)
    step(wrapped, wrapped, x, y)
    return model.state_dict()


def trained_by_fsdp(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = model_and_data()[0]
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model[0].palora_A, DTensor)
    assert model[0].palora_A.to_local().shape[0] == 1  # a task's adapter on each process
    step(model, model, x, y)
    return {k: v.full_tensor() for k, v in model.state_dict().items()}


def _leave() -> None:
    """End a rank without gloo's teardown, which can abort it while its threads still run."""
    with contextlib.suppress(RuntimeError):  # the other rank may have left already
        dist.barrier()
    os._exit(0)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    _, x, y = model_and_data()
    states = {"ddp": trained_by_ddp(x[rank::2], y[rank::2])}
    if hasattr(torch.distributed.fsdp, "fully_shard"):
        states["fsdp2"] = trained_by_fsdp(x[rank::2], y[rank::2])
    if rank == 0:
        torch.save(states, f"{folder}/states.pt")
    _leave()


@pytest.mark.skipif(os.name == "nt", reason="gloo's file store is POSIX here")
def test_two_processes_by_ddp_and_by_fsdp2_equal_one(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    model, x, y = model_and_data()
    start = copy.deepcopy(model.state_dict())
    step(model, model, x, y)
    states = torch.load(tmp_path / "states.pt")
    assert "ddp" in states
    for state in states.values():
        for key, value in state.items():
            assert not torch.equal(value, start[key])
            torch.testing.assert_close(value, model.state_dict()[key], rtol=0, atol=1e-12)
