"""Timing the averages beside the two published formulations, on identity-like blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from denseformer.core.dwa import DWA
from denseformer.core.geometry import Geometry, check_int


class NaiveLoop(nn.Module):
    """Equation 1 as it is written: a list of representations, one product and one sum per weight."""

    def __init__(self, spec: Geometry) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(DWA.build(spec).weight.detach().clone())

    def forward(self, x: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
        """Run all blocks and averages."""
        xs, start = [x], 0
        for i in range(1, self.spec.depth + 1):
            x = block(x)
            xs.append(x)
            sources = self.spec.sources(i)
            if sources:
                weights = self.weight[start : start + len(sources)].unbind()
                start += len(sources)
                x = xs[sources[0]] * weights[0]
                for w, j in zip(weights[1:], sources[1:], strict=True):
                    x = x + w * xs[j]
        return x


class Slab(nn.Module):
    """The formulation of the authors' code, re-created from its description.

    Every representation is copied into a preallocated slab per residue class, and each average is a
    ``tensordot`` of the weights with the filled part of a slab.
    """

    def __init__(self, spec: Geometry) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(DWA.build(spec).weight.detach().clone())

    def forward(self, x: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
        """Run all blocks and averages."""
        k, depth, start = self.spec.dilation, self.spec.depth, 0
        slabs = [x.new_zeros((depth - c) // k + 1, *x.shape) for c in range(k)]
        slabs[0] = _Put.apply(slabs[0], x, 0)  # type: ignore[no-untyped-call]
        for i in range(1, depth + 1):
            x = block(x)
            c, n = i % k, i // k
            slabs[c] = _Put.apply(slabs[c], x, n)  # type: ignore[no-untyped-call]
            sources = self.spec.sources(i)
            if sources:
                weights = self.weight[start : start + len(sources)]
                start += len(sources)
                x = torch.tensordot(weights, slabs[c][: n + 1], dims=1)
        return x


class _Put(torch.autograd.Function):
    """slab[n] = x in place, without a version check of the parts filled earlier."""

    @staticmethod
    def forward(ctx: Any, slab: Tensor, x: Tensor, n: int) -> Tensor:
        alias = slab.new_empty(0)  # the same memory with a version counter of its own
        alias.set_(slab.untyped_storage(), 0, slab.size(), slab.stride())
        alias[n].copy_(x)
        ctx.n = n
        return alias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, grad[ctx.n], None


class Ours(nn.Module):
    """This package's averages in the same loop."""

    def __init__(self, spec: Geometry) -> None:
        super().__init__()
        self.dwa = DWA.build(spec)

    @property
    def weight(self) -> nn.Parameter:
        """The weights."""
        return self.dwa.weight

    def forward(self, x: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
        """Run all blocks and averages."""
        run = self.dwa.begin(x)
        for _ in range(self.dwa.depth):
            x = run(block(x))
        return x


class Plain(nn.Module):
    """The blocks alone."""

    def __init__(self, spec: Geometry) -> None:
        super().__init__()
        self.depth = spec.depth

    def forward(self, x: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
        """Run all blocks."""
        for _ in range(self.depth):
            x = block(x)
        return x


def compiled(spec: Geometry) -> nn.Module:
    """Return the naive loop under torch.compile."""
    made = torch.compile(NaiveLoop(spec), fullgraph=True)
    assert isinstance(made, nn.Module)
    return made


METHODS: dict[str, Callable[[Geometry], nn.Module]] = {
    "plain": Plain, "ours": Ours, "naive loop": NaiveLoop, "preallocated slab": Slab, "compiled loop": compiled,
}  # fmt: skip


def interleaved(cases: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the least milliseconds of each case over interleaved repeats, after a warm-up."""
    for run in cases.values():
        run()
    best = dict.fromkeys(cases, float("inf"))
    for _ in range(repeats):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
    return best


def measure(
    depth: int,
    dilation: int = 1,
    period: int = 1,
    *,
    numel: int = 131_072,
    methods: Sequence[str] = ("plain", "ours", "naive loop", "preallocated slab"),
    repeats: int = 5,
    train: bool = True,
) -> dict[str, float]:
    """Return milliseconds of a pass (forward, or forward and backward) with ``sin`` as the block.

    Args:
        depth, dilation, period: the geometry.
        numel: elements of one representation, float32.
        methods: names of :data:`METHODS`.
        repeats: interleaved repeats; the least time counts.
        train: forward and backward; otherwise forward without gradients.

    Raises:
        TypeError, ValueError: numbers below 1 or not ints.
    """
    check_int("numel", numel)
    check_int("repeats", repeats)
    spec = Geometry(depth, dilation, period)
    x = torch.randn(max(1, numel // 64), min(64, numel), requires_grad=train)

    def case(model: nn.Module) -> Callable[[], Any]:
        def forward() -> Tensor:
            with torch.set_grad_enabled(train):
                y = model(x, torch.sin)
            assert isinstance(y, Tensor)
            return y

        def both() -> None:
            forward().sum().backward()
            x.grad = None
            model.zero_grad()

        return both if train else forward

    return interleaved({name: case(METHODS[name](spec)) for name in methods}, repeats)
