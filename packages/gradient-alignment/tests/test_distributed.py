from __future__ import annotations

import contextlib
import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import gradient_alignment as ga

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed"),
    pytest.mark.skipif(os.name == "nt", reason="gloo's file store is POSIX here"),
]


class Fixed(ga.ScoreMatching):
    """Score matching along the directions of a sample's first entry, so that every process draws alike."""

    def trace(self, shared: object) -> Tensor:
        x = shared.x.detach()  # type: ignore[attr-defined]
        v = torch.where((1e6 * x).round().long() % 2 == 0, 1.0, -1.0).to(x.dtype)
        ahead = shared.function("label")(x + 0.01 * v)  # type: ignore[attr-defined]
        change = ahead - shared.value("label")  # type: ignore[attr-defined]
        slope = shared.gradient("label")  # type: ignore[attr-defined]
        return 2e4 * (change - 0.01 * (v * slope).flatten(1).sum(1))


def model_and_data() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Softplus(5), nn.Linear(8, 3)).double()
    return net, torch.randn(8, 6, dtype=torch.float64), torch.arange(8) % 3


def train(loss: nn.Module, owner: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer = torch.optim.SGD(owner.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss(x, y).backward()
        optimizer.step()


def _leave() -> None:
    """End a rank without gloo's teardown, which can abort it while its threads still run."""
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    os._exit(0)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, x, y = model_and_data()
    # the whole loss is wrapped, so that all its passes run inside one forward of DDP
    loss = nn.parallel.DistributedDataParallel(
        ga.RegularizedLoss(model, Fixed(0.05), ga.GradientNorm(0.1))
    )
    train(loss, model, x[rank::2], y[rank::2])
    if rank == 0:
        torch.save(model.state_dict(), f"{folder}/state.pt")
    _leave()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    model, x, y = model_and_data()
    start = copy.deepcopy(model.state_dict())
    # each process has the mean over its half, and stability's mean of squares averages, too
    train(ga.RegularizedLoss(model, Fixed(0.05), ga.GradientNorm(0.1)), model, x, y)
    for key, value in torch.load(tmp_path / "state.pt").items():
        assert not torch.equal(value, start[key])
        torch.testing.assert_close(value, model.state_dict()[key], rtol=0, atol=1e-10)
