from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import deepemd
from deepemd.examples.autoencoder import PointAutoencoder
from deepemd.recipes.train import TrainConfig, train

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or os.name == "nt", reason="needs gloo and a file store"
)


FSDP2 = torch.__version__ >= (2, 9)  # on a CPU, older ones halve the gradient of two ranks


def _rank(rank: int, folder: str) -> None:
    """Run one rank; end it without gloo's teardown, which aborts at random on a loaded machine."""
    torch.set_num_threads(1)
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {"ddp": ddp(rank), "trained": trained(f"{folder}/two")}
    if FSDP2:
        found["fsdp"] = fsdp(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)


def clouds() -> torch.Tensor:
    return torch.rand(4, 12, 3, generator=torch.Generator().manual_seed(0))


def gradient(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    deepemd.EMDLoss(model="tiny", decode="argmax")(model(x), x).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def build() -> PointAutoencoder:
    torch.manual_seed(0)
    return PointAutoencoder(3, 12, latent=4, width=8)


def ddp(rank: int) -> torch.Tensor:
    model = nn.parallel.DistributedDataParallel(build())
    return gradient(model, clouds()[2 * rank : 2 * rank + 2])


def fsdp(rank: int) -> torch.Tensor:
    model = build()
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=mesh)
    x = clouds()[2 * rank : 2 * rank + 2]
    deepemd.EMDLoss(method="exact")(model(x), x).backward()
    return torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])


def trained(out: str) -> torch.Tensor:
    """Adam's first moment after one step: a tenth of the clipped gradient of the whole batch."""
    config = TrainConfig(
        out, {"width": 16, "depth": 1, "num_heads": 2, "fourier": 2}, steps=1, sizes=(8,), first=(1.0,),
        last=(1.0,), points=48, decoder=0.2,
    )  # fmt: skip
    train(config)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the first rank writes
    state = torch.load(f"{out}/checkpoint.pt")["optimizer"]["state"]
    return torch.cat([moments["exp_avg"].flatten() for moments in state.values()])


def test_two_processes_give_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    model, x = build(), clouds()
    expected = {"ddp": gradient(build(), x)}
    deepemd.EMDLoss(method="exact")(model(x), x).backward()
    if FSDP2:
        expected["fsdp"] = torch.cat([p.grad.flatten() for p in model.parameters()])
    expected["trained"] = trained(f"{tmp_path}/one")
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for kind, value in expected.items():  # the mean over ranks is summed in another order
            torch.testing.assert_close(found[kind], value, rtol=1e-4, atol=1e-6)


def test_loss_is_transparent_to_checkpointing_of_the_caller() -> None:
    x = clouds()
    plain, saved = build(), build()
    deepemd.emd_loss(plain(x), x).backward()
    again = torch.utils.checkpoint.checkpoint(saved, x, use_reentrant=False)
    deepemd.emd_loss(again, x).backward()
    for a, b in zip(plain.parameters(), saved.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_loss_inside_a_compiled_model_gives_the_same_gradient() -> None:
    x = clouds()
    plain, compiled = build(), torch.compile(build(), backend="eager")
    deepemd.emd_loss(plain(x), x).backward()
    deepemd.emd_loss(compiled(x), x).backward()
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_differentiable_part_composes_with_torch_func() -> None:
    from deepemd.core.output import matching_cost

    x, y = clouds().double(), clouds().flip(0).double()
    index = deepemd.match(x, y).index
    assert index is not None
    jacobian = torch.func.grad(lambda a: matching_cost(a, y, index).sum())(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(deepemd.emd(leaf, y).sum(), leaf)
    torch.testing.assert_close(jacobian, expected)
    by_item = torch.func.vmap(lambda a, b, i: matching_cost(a[None], b[None], i[None])[0])
    torch.testing.assert_close(by_item(x, y, index), deepemd.emd(x, y))
