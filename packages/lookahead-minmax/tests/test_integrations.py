"""Other people's loops: Accelerate, Lightning, DDP and FSDP2 over two processes."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lookahead_minmax import EMA, Lookahead, LookaheadMinmax

STEPS = 7


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(step))


def play(g: nn.Module, d: nn.Module, la: LookaheadMinmax, rank: int = 0, world: int = 1) -> None:
    """A small game of two networks on the same inputs, g minimising and d maximising."""
    (opt_g,), (opt_d,) = la.players["G"], la.players["D"]
    for step in range(STEPS):
        x = batch(step).chunk(world)[rank]
        for optimizer, sign in ((opt_d, -1), (opt_g, 1)):
            opt_g.zero_grad()
            opt_d.zero_grad()
            (sign * (g(x) * d(x) + 0.1 * g(x) ** 2 - 0.1 * d(x) ** 2).mean()).backward()
            optimizer.step()
        la.step()


def make(g: nn.Module, d: nn.Module) -> LookaheadMinmax:
    players = {n: torch.optim.Adam(m.parameters(), lr=0.05) for n, m in (("G", g), ("D", d))}
    return LookaheadMinmax(players, k=[2, 4], alpha=[0.5, 0.7])


def single() -> list[torch.Tensor]:
    g, d = network(0), network(1)
    play(g, d, make(g, d))
    return [p.detach() for p in (*g.parameters(), *d.parameters())]


def _leave() -> None:
    """End a rank without gloo's teardown, which can abort it while its threads still run."""
    with contextlib.suppress(RuntimeError):  # the other rank may have left already
        dist.barrier()
    os._exit(0)


def _ddp(rank: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    g, d = (nn.parallel.DistributedDataParallel(network(seed)) for seed in (0, 1))
    la = make(g, d)
    play(g, d, la, rank, 2)
    torch.save([p.detach() for p in (*g.parameters(), *d.parameters())], f"{out}{rank}.pt")
    _leave()


def _fsdp(rank: int, store: str, out: str) -> None:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    g, d = network(0), network(1)
    for net in (g, d):
        fully_shard(net, mesh=mesh)
    la = make(g, d)
    # each rank sees the whole batch, so that the averaged gradient is that of one process
    play(g, d, la)
    full = [p.detach().full_tensor() for p in (*g.parameters(), *d.parameters())]
    slow = [p.full_tensor() for p in la.slow_parameters(level=2)]
    torch.save({"full": full, "slow": slow}, f"{out}{rank}.pt")
    _leave()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo with a file store needs POSIX")
def test_ddp_of_two_processes_is_one_process_and_both_ranks_agree(tmp_path: Path) -> None:
    mp.spawn(_ddp, (str(tmp_path / "store"), str(tmp_path / "out")), nprocs=2)
    first, second = (torch.load(tmp_path / f"out{rank}.pt") for rank in range(2))
    for a, b, expected in zip(first, second, single(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(sys.platform == "win32", reason="gloo with a file store needs POSIX")
@pytest.mark.skipif(torch.__version__ < (2, 6), reason="FSDP2 is public from torch 2.6 on")
def test_fsdp2_of_two_processes_works_on_uneven_shards(tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed.fsdp", reason="needs FSDP2")
    mp.spawn(_fsdp, (str(tmp_path / "store"), str(tmp_path / "out")), nprocs=2)
    saved = torch.load(tmp_path / "out0.pt")
    for value, expected in zip(saved["full"], single(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
    g, d = network(0), network(1)
    la = make(g, d)
    play(g, d, la)
    for value, expected in zip(saved["slow"], la.slow_parameters(level=2), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


def test_accelerate_prepares_and_steps_a_lookahead() -> None:
    from accelerate import Accelerator

    results = []
    for prepared in (True, False):
        model = network(0)
        optimizer: Any = Lookahead(torch.optim.Adam(model.parameters(), lr=0.05), k=3)
        inner = optimizer
        if prepared:
            accelerator = Accelerator(cpu=True)
            model, optimizer = accelerator.prepare(model, optimizer)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = model(batch(step)).square().mean()
            accelerator.backward(loss) if prepared else loss.backward()
            optimizer.step()
        assert inner.lookahead.rounds == STEPS
        results.append([p.detach() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore")  # Lightning's own, about its workers and torch's pytrees
def test_lightning_callback_ends_a_round_per_batch_and_resumes(tmp_path: Path) -> None:
    pl = pytest.importorskip("pytorch_lightning")
    from lookahead_minmax.integrations.lightning import LookaheadMinmaxCallback

    class Game(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.g, self.d = network(0), network(1)
            self.seen: list[torch.Tensor] = []

        def configure_optimizers(self) -> Any:
            return [torch.optim.Adam(m.parameters(), lr=0.05) for m in (self.g, self.d)]

        def training_step(self, x: torch.Tensor) -> None:
            opt_g, opt_d = self.optimizers()
            for optimizer, sign in ((opt_d, -1), (opt_g, 1)):
                opt_g.zero_grad()
                opt_d.zero_grad()
                value = self.g(x) * self.d(x) + 0.1 * self.g(x) ** 2 - 0.1 * self.d(x) ** 2
                self.manual_backward((sign * value).mean())
                optimizer.step()

        def validation_step(self, x: torch.Tensor) -> None:
            self.seen.append(self.g[0].weight.detach().clone())

    batches = [batch(step) for step in range(STEPS)]
    data, one = (
        torch.utils.data.DataLoader(part, batch_size=None) for part in (batches, batches[:1])
    )
    options: Any = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }
    game = Game()
    callback = LookaheadMinmaxCallback(["G", "D"], k=[2, 4], alpha=[0.5, 0.7], evaluate_slow=True)
    trainer = pl.Trainer(callbacks=[callback], **options)
    trainer.fit(game, data, one)
    for value, expected in zip(game.parameters(), single(), strict=True):
        assert torch.equal(value, expected)
    assert callback.lookahead is not None
    assert torch.equal(game.seen[0], next(callback.lookahead.slow_parameters("G")))
    assert not torch.equal(game.seen[0], game.g[0].weight)

    restored = LookaheadMinmaxCallback(["G", "D"], k=[2, 4], alpha=[0.5, 0.7])
    assert restored.state_dict() == {}
    restored.load_state_dict(callback.state_dict())
    pl.Trainer(callbacks=[restored], **options).fit(Game(), one)
    assert restored.lookahead is not None
    assert restored.lookahead.rounds == STEPS + 1

    with pytest.raises(ValueError, match="1 names for 2 optimizers"):
        pl.Trainer(callbacks=[LookaheadMinmaxCallback(["G"])], **options).fit(Game(), data)
    automatic = Game()
    automatic.automatic_optimization = True
    with pytest.raises(ValueError, match="automatic_optimization = False"):
        callback.on_fit_start(trainer, automatic)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_run_equals_the_cpu_run_without_waiting_for_the_device() -> None:
    cpu = single()
    g, d = network(0).cuda(), network(1).cuda()
    la = make(g, d)
    ema = EMA(g)
    la.on_sync(ema.update)
    with torch.device("cuda"):
        (opt_g,), (opt_d,) = la.players["G"], la.players["D"]
        for step in range(STEPS):
            x = batch(step).cuda()
            for optimizer, sign in ((opt_d, -1), (opt_g, 1)):
                opt_g.zero_grad()
                opt_d.zero_grad()
                (sign * (g(x) * d(x) + 0.1 * g(x) ** 2 - 0.1 * d(x) ** 2).mean()).backward()
                optimizer.step()
            torch.cuda.set_sync_debug_mode("error")
            la.step()
            torch.cuda.set_sync_debug_mode("default")
    for value, expected in zip((*g.parameters(), *d.parameters()), cpu, strict=True):
        torch.testing.assert_close(value.detach().cpu(), expected, rtol=1e-4, atol=1e-5)
