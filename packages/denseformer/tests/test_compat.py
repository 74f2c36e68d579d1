"""The authors' interface: what their class gets wrong is right here."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from conftest import oracle, randomise, relative
from torch import Tensor, nn

from denseformer import DWA
from denseformer.compat import DWAModules

BLOCKS = [torch.sin, torch.cos, torch.tanh, torch.sin, torch.cos, torch.tanh]


def through(modules: DWAModules, x: Tensor) -> Tensor:
    modules.init_accumulators(x)
    for i, block in enumerate(BLOCKS):
        x = modules(block(x), block_idx=i)
    return x


def pair(k: int, p: int) -> tuple[DWAModules, DWA]:
    dwa = randomise(DWA(6, k, p))
    modules = DWAModules(6, k, p)
    modules.load_state_dict(dwa.to_reference_state_dict())
    return modules, dwa


@pytest.mark.parametrize(("k", "p"), [(1, 1), (2, 1), (2, 3), (4, 5)])
def test_it_computes_the_method(k: int, p: int) -> None:
    modules, dwa = pair(k, p)
    x = torch.randn(2, 3, requires_grad=True)
    got, want = through(modules, x), oracle(dwa, x, BLOCKS)
    assert relative(got, want) < 1e-6
    got.sum().backward()
    (grad,) = torch.autograd.grad(want.sum(), dwa.weight)
    ours = torch.cat([p.grad.flatten() for p in modules.parameters() if p.grad is not None])
    assert relative(ours, grad) < 1e-5
    assert list(modules.state_dict()) == [f"alphas.{i - 1}.weight" for i in dwa.rows]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_type_of_stream_works(dtype: torch.dtype) -> None:
    modules, _ = pair(2, 1)
    modules.to(dtype)
    assert all(p.dtype == torch.float32 for p in modules.parameters())
    assert through(modules, torch.randn(2, 3).to(dtype)).dtype == dtype


def test_autocast_keeps_the_stream() -> None:
    modules, _ = pair(1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert through(modules, torch.randn(2, 3)).dtype == torch.float32


def test_nothing_stays_on_the_module_and_it_copies_after_a_forward_pass() -> None:
    modules, _ = pair(1, 1)
    x = torch.randn(2, 3, requires_grad=True)
    want = through(modules, x)
    assert modules._run is None
    assert torch.equal(through(copy.deepcopy(modules), x), want)


def test_it_compiles() -> None:
    torch._dynamo.reset()
    modules, _ = pair(2, 1)
    x = torch.randn(2, 3)
    compiled = torch.compile(lambda t: through(modules, t), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), through(modules, x))


def test_bad_use_is_refused() -> None:
    for bad in (0, -2):
        with pytest.raises(ValueError, match=f"period must be at least 1, got {bad}"):
            DWAModules(4, 1, bad)
        with pytest.raises(ValueError, match=f"dilation must be at least 1, got {bad}"):
            DWAModules(4, bad)
    modules = DWAModules(6)
    with pytest.raises(RuntimeError, match=r"got block_idx=0, expected init_accumulators\(x\)"):
        modules(torch.ones(2), block_idx=0)
    modules.init_accumulators(torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="got block_idx=2, expected block_idx=0"):
        modules(torch.ones(2, 3), block_idx=2)
    with pytest.raises(ValueError, match=r"block 1 returned \(1, 3\), expected \(2, 3\)"):
        modules(torch.ones(1, 3), block_idx=0)
    with pytest.raises(ValueError, match=r"torch\.float64"):
        modules(torch.ones(2, 3).double(), block_idx=0)
    assert isinstance(modules, nn.Module)


def test_checkpoints_cross_between_both_classes() -> None:
    modules, dwa = pair(2, 3)
    again: Any = DWA(6, 2, 3)
    again.load_state_dict(modules.state_dict())
    assert torch.equal(again.weight, dwa.weight)


def test_rows_of_another_period_are_refused_although_their_sizes_agree() -> None:
    stored = randomise(DWA(25, 5, 5)).to_reference_state_dict()  # rows of 2, 3, 4, 5 and 6 weights
    here = DWA(20, 4, 4)
    assert [len(here.sources(i)) for i in here.rows] == [len(v[0]) for v in stored.values()]
    with pytest.raises(RuntimeError, match=r"authors' layout.*24: 6.*19: 6"):
        here.load_state_dict(stored)


def test_an_unfinished_pass_does_not_stop_copies() -> None:
    modules, _ = pair(1, 1)
    x = torch.randn(2, 3, requires_grad=True)
    modules.init_accumulators(x)
    modules(x.sin(), block_idx=0)
    for made in (copy.deepcopy(modules), pickle.loads(pickle.dumps(modules))):
        assert torch.equal(through(made, x), through(pair(1, 1)[0], x))
        with pytest.raises(RuntimeError, match="expected init_accumulators"):
            made(x, block_idx=1)


def test_a_period_beyond_the_depth_warns() -> None:
    with pytest.warns(UserWarning, match="beyond n_blocks=4"):
        assert not DWAModules(4, 1, 5).state_dict()
