"""Pipeline stages in one process and in several; DDP, FSDP2 and DTensor with gloo."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import oracle, randomise, relative
from torch import Tensor, nn

from denseformer import DWA, DenseStack, densify
from denseformer.core.geometry import Geometry
from denseformer.fsdp import shard_dwa
from denseformer.pipeline import boundaries, join, split

GEOMETRIES: list[dict[str, Any]] = [
    {}, {"dilation": 2}, {"dilation": 4, "period": 5}, {"pattern": "last_k", "last_k": 2}, {"pattern": "final"},
]  # fmt: skip
BLOCKS = [lambda t, a=0.1 * i: torch.sin(t) + a * t for i in range(12)]


def _rank(rank: int, world: int, folder: str, work: Callable[..., Any], arguments: Any) -> None:
    """Run ``work`` in one process of a gloo group, write its result, and leave without gloo's teardown."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(work(rank, *arguments), f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)


def spawn(folder: Path, world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    mp.spawn(_rank, (world, str(folder), work, arguments), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _pair(rank: int) -> dict[str, Any]:
    """Everything that two processes are needed for: starting them costs more than the work."""
    return {
        "ddp": _ddp(rank),
        "dtensor": _dtensor(rank),
        "fsdp": _fsdp(rank, False, False),
        "fsdp checkpoint": _fsdp(rank, True, False),
        "fsdp mixed": _fsdp(rank, False, True),
        "gpipe": _pipeline(rank, [4], "ScheduleGPipe"),
    }


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if torch.__version__ < (2, 9):
        pytest.skip("FSDP2 on a CPU halves gradients before torch 2.9")
    return spawn(tmp_path_factory.mktemp("pair"), 2, _pair)


# Stages in one process


def through_stages(stages: Any, x: Tensor, blocks: Any) -> Tensor:
    payload: tuple[Tensor, ...] = ()
    for stage in stages:
        run = stage.begin(x, partials=payload)
        for block in blocks[stage.start : stage.stop]:
            x = run(block(x))
        payload = run.payload()
        assert len(payload) == (len(stage.sends.items) if stage.sends is not None else 0)
    return x


@pytest.mark.parametrize("kw", GEOMETRIES, ids=str)
def test_split_at_every_boundary_equals_unsplit(kw: dict[str, Any]) -> None:
    """One cut anywhere, several cuts, a cut after every block: values and all gradients."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dwa = randomise(DWA(12, dtype=torch.float64, **kw))
    x0 = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    want = oracle(dwa, x0, BLOCKS)
    want_x, want_w = torch.autograd.grad(want.sum(), [x0, dwa.weight])
    for cuts in [[b] for b in range(1, 12)] + [[2, 7], [1, 4, 9], list(range(1, 12))]:
        stages = split(dwa, cuts)
        got = through_stages(stages, x0, BLOCKS)
        assert relative(got, want) < 1e-12
        weights = [s.weight for s in stages]
        got_x, *got_w = torch.autograd.grad(got.sum(), [x0, *weights], allow_unused=True)
        assert relative(got_x, want_x) < 1e-12
        full = DWA(12, dtype=torch.float64, **kw)
        for stage, grad in zip(stages, got_w, strict=True):
            with torch.no_grad():
                stage.weight.copy_(torch.zeros_like(stage.weight) if grad is None else grad)
        assert relative(join(full, stages).weight, want_w) < 1e-12
        assert sum(len(s.pairs) for s in stages) == dwa.spec.nnz  # no weight is shared


def test_payload_is_the_smaller_of_columns_and_sums() -> None:
    for k, p, count in ((1, 1, 24), (4, 5, 5), (4, 10, 2)):
        (boundary,) = boundaries(Geometry(48, k, p), [24])
        assert (boundary.kind, len(boundary.items)) == ("sums", count)
    early, middle = boundaries(Geometry(48), [4, 30])
    assert (early.kind, early.items) == ("live", (0, 1, 2, 3, 4))
    assert (middle.kind, len(middle.items)) == ("sums", 18)
    for cuts in ([0], [48], [5, 5], [6, 3]):
        with pytest.raises(ValueError, match=r"must ascend within 1\.\.47"):
            boundaries(Geometry(48), cuts)


def test_stages_start_as_the_plain_network_and_check_their_payload() -> None:
    dwa = DWA(6)
    stages = split(dwa, [3])
    for stage in stages:
        stage.reset_parameters()
        assert stage.bfloat16().weight.dtype == torch.float32
    assert "blocks 1 to 3 of 1x1, depth 6" in repr(stages[0])
    x = torch.randn(2, 3)
    plain = x
    for block in BLOCKS[:6]:
        plain = block(plain)
    assert torch.equal(through_stages(stages, x, BLOCKS), plain)
    low = x.bfloat16()
    run = stages[0].begin(low)
    with pytest.raises(RuntimeError, match=r"payload\(\) after 0 of 3 blocks"):
        run.payload()
    for _ in range(3):
        low = run(low.sin())
    assert [t.dtype for t in run.payload()] == [torch.float32] * 3
    with pytest.raises(
        ValueError, match=r"blocks 4 to 6 receives 3 partials of shape \(2, 3\), got \[\]"
    ):
        stages[1].begin(x)


# Several processes


class Stage(nn.Module):
    """One stage of a pipeline: tensors in, tensors out."""

    def __init__(self, dwa: Any, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.dwa, self.blocks = dwa, nn.ModuleList(blocks)

    def forward(self, x: Tensor, *partials: Tensor) -> Any:
        run = self.dwa.begin(x, partials=partials)
        for block in self.blocks:
            x = run(block(x))
        payload = run.payload()
        return (x, *payload) if payload else x


def tanh_block() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()


def whole(depth: int = 8) -> tuple[DWA, list[nn.Module], Tensor, Tensor]:
    torch.manual_seed(0)
    dwa = randomise(DWA(depth, dtype=torch.float64))
    blocks = [tanh_block() for _ in range(depth)]
    return dwa, blocks, *torch.randn(2, 8, 4, dtype=torch.float64)


def _pipeline(rank: int, cuts: list[int], name: str) -> Any:
    from torch.distributed import pipelining

    dwa, blocks, x, target = whole()
    part = split(dwa, cuts)[rank]
    module = Stage(part, blocks[part.start : part.stop])
    stage = pipelining.PipelineStage(module, rank, len(cuts) + 1, torch.device("cpu"))
    losses: list[Tensor] = []
    schedule = getattr(pipelining, name)(
        stage, 4, loss_fn=lambda y, t: (y - t).square().sum(), scale_grads=False
    )
    if rank == 0:
        schedule.step(x)
    elif rank == len(cuts):
        schedule.step(target=target, losses=losses)
    else:
        schedule.step()
    grads = {n: p.grad for n, p in module.named_parameters()}
    return grads, [float(loss.detach()) for loss in losses], part.pairs, part.start


def test_gpipe_in_two_processes(pair: Any) -> None:
    check_pipeline([result["gpipe"] for result in pair])


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < (2, 8), reason="no scale_grads in older pipelines")
def test_1f1b_in_four_processes(tmp_path: Path) -> None:
    check_pipeline(spawn(tmp_path, 4, _pipeline, [2, 4, 6], "Schedule1F1B"))


def check_pipeline(results: list[Any]) -> None:
    """The gradients of a schedule are those of one process on the whole batch."""
    dwa, blocks, x, target = whole()
    loss = (oracle(dwa, x, blocks) - target).square().sum()
    loss.backward()
    assert sum(results[-1][1]) == pytest.approx(float(loss.detach()), rel=1e-12)
    full = torch.zeros(8, 9, dtype=torch.float64)
    for grads, _, pairs, start in results:
        for (i, j), g in zip(pairs, grads.pop("dwa.weight"), strict=True):
            full[i - 1, j] = g
        for key, grad in grads.items():
            _, n, rest = key.split(".", 2)
            want = dict(blocks[start + int(n)].named_parameters())[rest].grad
            assert relative(grad, want) < 1e-12
    assert dwa.weight.grad is not None
    packed = torch.cat([full[i - 1, list(dwa.sources(i))] for i in dwa.rows])
    assert relative(packed, dwa.weight.grad) < 1e-12


def stacked(checkpoint: bool = False) -> DenseStack:
    torch.manual_seed(0)
    stack = DenseStack(
        [tanh_block() for _ in range(6)], 2, dtype=torch.float64, checkpoint=checkpoint
    )
    randomise(stack.dwa, 0.2)
    return stack


def batch() -> Tensor:
    return torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def _ddp(rank: int) -> Any:
    model = nn.parallel.DistributedDataParallel(stacked())
    for _ in range(2):  # the second pass would fail if a parameter had got no gradient
        model.zero_grad()
        model(batch().chunk(2)[rank]).square().mean().backward()
    return {n: p.grad for n, p in model.module.named_parameters()}


def test_ddp_gradients_equal_a_single_process(pair: Any) -> None:
    results = [result["ddp"] for result in pair]
    model = stacked()
    model(batch()).square().mean().backward()
    for grads in results:
        for n, p in model.named_parameters():
            assert relative(grads[n], p.grad) < 1e-12


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def dense_net(checkpoint: bool = False) -> Net:
    torch.manual_seed(0)
    net = densify(Net(), 2, checkpoint=checkpoint)
    assert isinstance(net.dwa, DWA)
    randomise(net.dwa, 0.2)
    return net


def _fsdp(rank: int, checkpoint: bool, mixed: bool) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model, policy, seen = dense_net(checkpoint), MixedPrecisionPolicy(), []
    if mixed:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        shard_dwa(model, mesh=mesh)
        model.dwa.register_forward_pre_hook(lambda m, a: seen.append((m.weight.dtype, a[0].dtype)))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    x = batch().float().chunk(2)[rank]
    for _ in range(2):
        model.zero_grad()
        y = model(x)
        y.float().square().mean().backward()
    grads = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    return grads, y.dtype, seen


@pytest.mark.parametrize("case", ["fsdp", "fsdp checkpoint"])
def test_fsdp2_gradients_equal_a_single_process(pair: Any, case: str) -> None:
    results = [result[case] for result in pair]
    model = dense_net()
    model(batch().float()).square().mean().backward()
    for grads, _, _ in results:
        for n, p in model.named_parameters():
            torch.testing.assert_close(grads[n], p.grad, rtol=1e-4, atol=1e-6)


def test_fsdp2_mixed_precision_keeps_the_averages_in_float32(pair: Any) -> None:
    results = [result["fsdp mixed"] for result in pair]
    model = dense_net()
    model(batch().float()).square().mean().backward()
    for grads, dtype, seen in results:
        assert dtype == torch.bfloat16
        assert seen == [(torch.float32, torch.bfloat16)] * 2
        assert grads["dwa.weight"].dtype == torch.float32
        assert relative(grads["dwa.weight"], model.dwa.weight.grad) < 0.1  # blocks run in bfloat16
    with pytest.raises(ValueError, match="has no dwa; densify it first"):
        shard_dwa(Net())


def _dtensor(rank: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    dwa = randomise(DWA(5, dtype=torch.float64))
    x = distribute_tensor(batch(), mesh, [Shard(0)])
    run = dwa.begin(x)
    for _ in range(5):
        x = run(torch.sin(x))
    assert isinstance(x, DTensor)
    x.square().sum().full_tensor().backward()
    return dwa.weight.grad, x.full_tensor().detach()


def test_tokens_sharded_as_dtensor_reduce_the_weights_gradient(pair: Any) -> None:
    results = [result["dtensor"] for result in pair]
    dwa = randomise(DWA(5, dtype=torch.float64))
    want = oracle(dwa, batch(), [torch.sin] * 5)
    want.square().sum().backward()
    for grad, y in results:
        assert relative(y, want) < 1e-13
        assert relative(grad, dwa.weight.grad) < 1e-12
