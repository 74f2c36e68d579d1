"""Bytes: adapters, what a step saves for the backward pass, and the peak of a step."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from common import finish, options
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import palora


def peak(run: Any) -> int:
    """Largest sum of live allocations made since the start of ``run``."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    live = top = 0
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        top = max(top, live)
    return top


def saved(run: Any) -> int:
    """Bytes of distinct storages saved for the backward pass."""
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    del out
    return sum(held.values())


def case(n: int, width: int, depth: int, tasks: int, rank: int, path: str) -> dict[str, Any]:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    plain = nn.Sequential(*layers)
    model = palora.inject(copy.deepcopy(plain), tasks, rank=rank, path=path)
    x = torch.randn(n, width, requires_grad=True)
    lam = torch.full((tasks,), 1 / tasks)

    def forward_plain() -> Tensor:
        return F.mse_loss(plain(x), torch.zeros(()).expand(n, width))

    def forward() -> Tensor:
        with palora.preference(model, lam):
            return F.mse_loss(model(x), torch.zeros(()).expand(n, width))

    def step(net: nn.Module, run: Any) -> None:
        for p in [*net.parameters(), x]:
            p.grad = None
        run().backward()

    found = palora.overhead(model)
    layer = 4 * width * width
    peaks = {
        "plain": peak(lambda: step(plain, forward_plain)),
        "ours": peak(lambda: step(model, forward)),
    }
    # gradients and factors of the adapters are part of any step; what is bounded is the rest
    extra = saved(forward) - saved(forward_plain)
    return {
        "path": path,
        "layers": f"{depth} x {width}^2",
        "n": n,
        "T": tasks,
        "r": rank,
        "adapter bytes": 4 * found.adapters,
        "T r (in+out) 4": 4 * depth * tasks * rank * 2 * width,
        "saved beyond plain": extra,
        "factors (+ n Tr)": depth * 4 * tasks * rank * (2 * width + n * (path == "activation")),
        "peak plain": peaks["plain"],
        "peak palora": peaks["ours"],
        "(plain + layer)*1.05": int((peaks["plain"] + layer) * 1.05),
    }


def main() -> None:
    args = options(__doc__ or "")
    rows = [case(2048, 512, 6, 3, 4, "weight"), case(2048, 512, 6, 3, 4, "activation")]
    finish(args, rows)


if __name__ == "__main__":
    main()
