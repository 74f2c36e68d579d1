"""The fast engine against the literal loop in float64, in every geometry and group size."""

from __future__ import annotations

import copy
import dataclasses
import gc
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import oracle, randomise, relative, run_through
from torch import Tensor, nn

from denseformer import DWA
from denseformer.core import kernels
from denseformer.core.plan import plan_of

GEOMETRIES: list[dict[str, Any]] = [
    {}, {"dilation": 2}, {"dilation": 3}, {"dilation": 14}, {"period": 2},
    {"dilation": 2, "period": 3}, {"dilation": 4, "period": 5}, {"pattern": "last_k", "last_k": 2},
    {"pattern": "final"},
]  # fmt: skip


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors too go through the engine here, not through stacks."""
    monkeypatch.setattr(kernels, "STACK", 0)


def blocks_of(depth: int) -> list[Any]:
    return [lambda t, a=0.1 * i: torch.sin(t) + a * t for i in range(depth)]


def make(depth: int, size: int | None = None, dtype: torch.dtype = torch.float64, **kw: Any) -> DWA:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dwa = randomise(DWA(depth, dtype=dtype, **kw))
    if size is not None:
        dwa.plan = dataclasses.replace(dwa.plan, size=size)
    return dwa


def both(
    dwa: DWA, x0: Tensor, blocks: Sequence[Any], **kw: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Value and gradients of the engine and of the oracle."""
    inputs = [x0, dwa.weight] if dwa.rows else [x0]
    found = []
    for compute in (run_through, oracle):
        y = compute(dwa, x0, blocks)
        direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        found.append([y, *torch.autograd.grad(y, inputs, direction, **kw)])
    return found[0], found[1]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_values_and_gradients_equal_the_loop(geometry: dict[str, Any]) -> None:
    """To 1e-12 of the largest entry: sums of up to 14 terms in another order."""
    for depth in range(1, 14):
        x0 = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
        for ours, theirs in zip(*both(make(depth, **geometry), x0, blocks_of(depth)), strict=True):
            assert relative(ours, theirs) < 1e-12


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_small_tensors_are_stacked_and_give_the_same(
    geometry: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "STACK", 1 << 18)
    for shape in ((), (2, 3, 4)):
        x0 = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        dwa = make(13, **geometry)
        assert dwa.begin(x0)._engine is None
        for ours, theirs in zip(*both(dwa, x0, blocks_of(13)), strict=True):
            assert relative(ours, theirs) < 1e-12


def test_the_authors_groups_equal_the_loop() -> None:
    x0 = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    for ours, theirs in zip(*both(make(12, dilation=2, groups=3), x0, blocks_of(12)), strict=True):
        assert relative(ours, theirs) < 1e-12


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_group_size_gives_the_same(geometry: dict[str, Any], size: int) -> None:
    x0 = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    for ours, theirs in zip(*both(make(11, size, **geometry), x0, blocks_of(11)), strict=True):
        assert relative(ours, theirs) < 1e-12


def test_a_mask_equals_the_loop() -> None:
    mask = torch.rand(9, 10, generator=torch.Generator().manual_seed(3)) < 0.4
    mask = mask.tril(1) | torch.eye(9, 10, dtype=torch.bool).roll(1, 1)
    mask[4] = False
    for size in (None, 2, 3):
        x0 = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        for a, b in zip(*both(make(9, size, pattern=mask), x0, blocks_of(9)), strict=True):
            assert relative(a, b) < 1e-12


def test_large_tensors_are_computed_in_chunks() -> None:
    """More elements than the gathering buffer takes at once, and not a multiple of them."""
    x0 = torch.randn(3, 50_001, dtype=torch.float64, requires_grad=True)
    assert x0.numel() * 4 > 2 * kernels.BUFFER
    for size in (1, 3, 12):
        for a, b in zip(*both(make(12, size), x0, blocks_of(12)), strict=True):
            assert relative(a, b) < 1e-12
    narrow = x0.detach().t()  # not contiguous
    assert (
        relative(run_through(make(4), narrow, blocks_of(4)), oracle(make(4), narrow, blocks_of(4)))
        < 1e-12
    )


@pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
def test_backends_agree(backend: str) -> None:
    x0 = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    for ours, theirs in zip(*both(make(7, backend=backend), x0, blocks_of(7)), strict=True):
        assert relative(ours, theirs) < 1e-12


def test_golden_values_by_hand() -> None:
    """d = 2, X_0 = 1, blocks x -> 2x, rows [a, b] and [c, e, f]."""
    a, b, c, e, f = 0.5, 1.0, -1.0, 0.25, 2.0
    dwa = DWA(2)
    with torch.no_grad():
        dwa.weight.copy_(torch.tensor([a, b, c, e, f]))
    run, x = dwa.begin(torch.ones(1)), torch.ones(1)
    y1 = run(2 * x)
    y2 = run(2 * y1)
    assert (y1.item(), y2.item()) == (2.5, 9.5)
    y2.backward()
    assert dwa.weight.grad is not None
    assert dwa.weight.grad.tolist() == [4.0, 8.0, 1.0, 2.0, 5.0]


@pytest.mark.parametrize("numel", [40, 6000, 150_000])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_without_gradients_the_values_are_the_same(geometry: dict[str, Any], numel: int) -> None:
    """Partial sums replace the kept columns here once they are fewer."""
    dwa, x0 = make(13, **geometry), torch.randn(numel, dtype=torch.float64)
    with torch.no_grad():
        assert relative(run_through(dwa, x0, blocks_of(13)), oracle(dwa, x0, blocks_of(13))) < 1e-12
    with torch.inference_mode():
        again = run_through(dwa, x0, blocks_of(13))
    assert relative(again, oracle(dwa, x0, blocks_of(13)).detach()) < 1e-12


@pytest.mark.parametrize(("k", "p", "most"), [(1, 1, 24), (4, 5, 8), (4, 10, 4)])
def test_inference_keeps_no_more_tensors_than_partial_sums_need(k: int, p: int, most: int) -> None:
    """At d = 48; beside X_i itself, which the next block reads anyway."""
    dwa, x = DWA(48, k, p), torch.randn(5000)
    peak = 0
    with torch.no_grad():
        run = dwa.begin(x)
        for _ in range(48):
            x = run(x.sin())
            kept = {id(t) for t in run._columns if t is not None and t is not x}
            peak = max(peak, len(kept) + len(run._sums or ()))
    assert peak <= most


def test_switching_gradients_on_in_a_lean_run_is_an_error() -> None:
    dwa, x = DWA(4), torch.randn(5000)
    with torch.no_grad():
        run = dwa.begin(x)
        for _ in range(3):
            x = run(x.sin())
    with pytest.raises(RuntimeError, match="gradients were switched on"):
        run(x.sin())


def test_last_block_alone_is_a_linear_probe_solved_by_least_squares() -> None:
    """Connect to Last over frozen blocks: the gradient vanishes at the least-squares optimum."""
    dwa = make(5, pattern="final")
    x0, target = torch.randn(2, 40, 3, dtype=torch.float64)
    blocks = [torch.sin, torch.square, torch.cos, torch.tanh, torch.exp]
    xs = [x0]
    for block in blocks:
        xs.append(block(xs[-1]))
    design = torch.stack([x.flatten() for x in xs], dim=1)
    best = torch.linalg.lstsq(design, target.flatten(), driver="gelsd").solution
    with torch.no_grad():
        dwa.weight.copy_(best)
    rest = run_through(dwa, x0, blocks) - target
    (grad,) = torch.autograd.grad(rest.square().sum(), dwa.weight)
    assert float(grad.norm() / (design.norm() * rest.detach().norm())) < 1e-12


# Autograd


def test_gradcheck_and_gradgradcheck() -> None:
    for kw in ({}, {"dilation": 2}, {"period": 2}):
        for size in (None, 1, 2):
            dwa = make(5, size, **kw)
            x0 = torch.randn(3, dtype=torch.float64, requires_grad=True)

            def compute(x: Tensor, w: Tensor, dwa: DWA = dwa) -> Tensor:
                return _with(dwa, w, x)

            w = dwa.weight.detach().requires_grad_()
            assert torch.autograd.gradcheck(compute, (x0, w))
            assert torch.autograd.gradgradcheck(compute, (x0, w))


def _with(dwa: DWA, weight: Tensor, x: Tensor) -> Tensor:
    from denseformer.core.run import DepthRun

    run = DepthRun(dwa.plan, weight, x, [x])
    for block in blocks_of(dwa.depth):
        x = run(block(x))
    return x


def test_double_backward_equals_the_loop() -> None:
    for size in (1, 2, 6):
        dwa = make(6, size)
        x0 = torch.randn(4, dtype=torch.float64, requires_grad=True)
        found = []
        for compute in (run_through, oracle):
            y = compute(dwa, x0, blocks_of(6)).square().sum()
            first = torch.autograd.grad(y, [x0, dwa.weight], create_graph=True)
            penalty = sum(g.square().sum() for g in first)
            found.append(torch.autograd.grad(penalty, [x0, dwa.weight]))
        for a, b in zip(*found, strict=True):
            assert relative(a, b) < 1e-11


def test_a_retained_graph_gives_the_same_gradients_twice() -> None:
    dwa, x0 = make(6, 2), torch.randn(4, dtype=torch.float64, requires_grad=True)
    y = run_through(dwa, x0, blocks_of(6)).sum()
    first = torch.autograd.grad(y, [x0, dwa.weight], retain_graph=True)
    second = torch.autograd.grad(y, [x0, dwa.weight])
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_two_forwards_before_one_backward() -> None:
    dwa = make(6, 2)
    xs = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    found = []
    for compute in (run_through, oracle):
        outs = [compute(dwa, x, blocks_of(6)) for x in xs]
        total = sum((y * (n + 1)).sum() for n, y in enumerate(outs))
        found.append(torch.autograd.grad(total, [dwa.weight, *xs]))
    for a, b in zip(*found, strict=True):
        assert relative(a, b) < 1e-12


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_losses_on_intermediate_averages(size: int) -> None:
    """Partial backward from Y_i, and several losses on several Y_i at once."""
    dwa = make(7, size)
    x0 = torch.randn(4, dtype=torch.float64, requires_grad=True)
    for depths in ((4,), (3, 6), (1,), (2, 5, 7)):
        found = []
        for fast in (True, False):
            run, x, xs, loss = dwa.begin(x0), x0, [x0], 0.0
            for i, block in enumerate(blocks_of(7), start=1):
                xs.append(block(x))
                if fast:
                    x = run(xs[-1])
                else:
                    row = dwa.row(i)
                    x = sum(w * xs[j] for w, j in zip(row, dwa.sources(i), strict=True))
                if i in depths:
                    loss = loss + (x * (i + 0.5)).square().sum()
            found.append(torch.autograd.grad(loss, [x0, dwa.weight]))
        for a, b in zip(*found, strict=True):
            assert relative(a, b) < 1e-12


def test_gradient_of_an_intermediate_output_alone() -> None:
    """Only the nodes above X_3 run, and they give what the loop gives."""
    dwa, x0, leaf = make(6, 2), *torch.randn(2, 4, dtype=torch.float64)
    leaf.requires_grad_()
    blocks = [*blocks_of(2), lambda t: leaf * 1.0, *blocks_of(3)]
    (ours,) = torch.autograd.grad(run_through(dwa, x0, blocks).sum(), [leaf])
    (theirs,) = torch.autograd.grad(oracle(dwa, x0, blocks).sum(), [leaf])
    assert relative(ours, theirs) < 1e-12


def test_frozen_parts() -> None:
    """Blocks without gradient, a frozen X_0, frozen weights: the rest is as in the loop."""
    dwa = make(6, 2)
    inner = nn.Linear(4, 4).double()
    blocks = [torch.sin, lambda t: t.detach().cos(), inner, torch.tanh, inner, torch.sin]
    x0 = torch.randn(3, 4, dtype=torch.float64)
    found = []
    for compute in (run_through, oracle):
        y = compute(dwa, x0, blocks)
        found.append(torch.autograd.grad(y.sum(), [dwa.weight, *inner.parameters()]))
    for a, b in zip(*found, strict=True):
        assert relative(a, b) < 1e-12
    dwa.requires_grad_(False)
    found = []
    for compute in (run_through, oracle):
        found.append(torch.autograd.grad(compute(dwa, x0, blocks).sum(), list(inner.parameters())))
    for a, b in zip(*found, strict=True):
        assert relative(a, b) < 1e-12


def test_frozen_weights_save_no_representation() -> None:
    dwa = DWA(4).requires_grad_(False)
    x0 = torch.randn(64, requires_grad=True)
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run, x = dwa.begin(x0), x0
        for _ in range(4):
            x = run(x * 2.0)  # saves nothing itself
    assert not [t for t in saved if t.numel() >= 64]


@pytest.mark.parametrize("stack", [0, 1 << 18])
def test_weights_may_change_between_forward_and_backward(
    stack: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is that of the forward pass that was run: a snapshot of the weights is kept."""
    monkeypatch.setattr(kernels, "STACK", stack)
    dwa, x0 = make(3), torch.randn(4, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(oracle(dwa, x0, blocks_of(3)).sum(), x0)
    y = run_through(dwa, x0, blocks_of(3)).sum()
    with torch.no_grad():
        dwa.weight.zero_()
    assert relative(torch.autograd.grad(y, x0)[0], want) < 1e-12


def test_anomaly_mode_sees_no_false_nan() -> None:
    dwa, x0 = make(6, 2), torch.randn(4, dtype=torch.float64, requires_grad=True)
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        run_through(dwa, x0, blocks_of(6)).sum().backward()


def test_batched_gradients() -> None:
    """A Jacobian by vmap over backward equals row by row."""
    dwa, x0 = make(4, 2), torch.randn(3, dtype=torch.float64, requires_grad=True)
    y = run_through(dwa, x0, blocks_of(4))
    (fast,) = torch.autograd.grad(
        y, x0, torch.eye(3, dtype=torch.float64), is_grads_batched=True, retain_graph=True
    )
    slow = torch.stack([torch.autograd.grad(y[n], x0, retain_graph=True)[0] for n in range(3)])
    assert relative(fast, slow) < 1e-12


# Memory


def count_saved(dwa: DWA | None, depth: int, size: int = 4096) -> int:
    """Storages of at least N elements that backward keeps, for blocks that save their input twice over."""
    norms = [nn.LayerNorm(size) for _ in range(depth)]
    x = torch.randn(1, size, requires_grad=True)
    seen: dict[int, weakref.ref[Any]] = {}
    keep: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().nbytes() >= 4 * size and not isinstance(t, nn.Parameter):
            seen[t.untyped_storage().data_ptr()] = weakref.ref(t)
            keep.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run = dwa.begin(x) if dwa is not None else None
        for norm in norms:
            x = x + norm(x)
            x = run(x) if run is not None else x
        norms[0](x)  # the last norm of a network
    return len(seen)


@pytest.mark.parametrize(("k", "p"), [(1, 1), (4, 1), (4, 5), (2, 3)])
def test_saved_memory_is_plain_plus_one_tensor_per_average(k: int, p: int) -> None:
    depth = 20
    dwa = DWA(depth, k, p)
    assert count_saved(dwa, depth) - count_saved(None, depth) == len(dwa.rows)


def test_nothing_stays_after_a_run() -> None:
    dwa = DWA(4)
    x0 = torch.randn(4096, requires_grad=True)
    outs = []
    run, x = dwa.begin(x0), x0
    for _ in range(4):
        out = x.sin()
        outs.append(weakref.ref(out))
        x = run(out)
    loss = x.sum()
    del out
    assert all(ref() is not None for ref in outs)  # autograd holds them by reference
    loss.backward()
    del x, loss
    gc.collect()
    assert not [ref for ref in outs if ref() is not None]
    assert run._columns == []
    clone = copy.deepcopy(dwa)
    assert torch.equal(clone.weight, dwa.weight)


def test_columns_go_when_their_last_reader_has_run() -> None:
    dwa = DWA(12, pattern="last_k", last_k=2)
    dwa.plan = dataclasses.replace(plan_of(dwa.spec), size=12)
    with torch.no_grad():
        run, x, refs = dwa.begin(torch.ones(8)), torch.ones(8), []
        for _ in range(12):
            out = x.sin()
            refs.append(weakref.ref(out))
            x = run(out)
            del out
            assert sum(ref() is not None for ref in refs) <= 2
