"""Bytes saved for backward, in units of one representation, for pre-norm blocks that save their input.

python benchmarks/bench_memory.py [--json FILE]
"""

from __future__ import annotations

from typing import Any

import torch
from common import finish, options
from torch import Tensor, nn

from denseformer.core.geometry import Geometry
from denseformer.recipes.bench import METHODS

SIZE = 1 << 18


def saved(call: Any) -> float:
    """Distinct storages of at least N elements kept for backward, in units of N float32."""
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.nbytes() >= 4 * SIZE:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call()
    assert out.requires_grad
    return sum(kept.values()) / (4 * SIZE)


class Block(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.nn.functional.layer_norm(x, x.shape[-1:]).sin()


def main() -> None:
    arguments = options(__doc__)
    x = torch.randn(1, SIZE, requires_grad=True)
    block, rows = Block(), []
    for k, p in ((1, 1), (4, 1), (4, 5)):
        spec = Geometry(20, k, p)
        row: dict[str, Any] = {"geometry": f"{k}x{p}", "averages": len(spec.rows)}
        for name in ("plain", "ours", "naive loop", "preallocated slab"):
            model = METHODS[name](spec)
            row[name] = saved(lambda model=model: block(model(x, block)))
        rows.append(row)
    finish(arguments, rows)


if __name__ == "__main__":
    main()
