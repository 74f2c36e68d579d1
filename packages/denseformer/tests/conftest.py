from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from denseformer import DWA

torch.set_num_threads(1)


def _mend_torchvision() -> object:
    """The registry's torchvision beside a CPU torch lacks two operators that it wants at import."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return None
    except RuntimeError:
        lib = torch.library.Library("torchvision", "DEF")
        lib.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        lib.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return lib
    return None


_LIB = _mend_torchvision()

Block = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def oracle(dwa: DWA, x0: Tensor, blocks: Sequence[Block], weight: Tensor | None = None) -> Tensor:
    """The method as section 3 of the paper writes it: a loop over rows, a loop over sources."""
    weight = dwa.weight if weight is None else weight
    xs, y, position = [x0], x0, 0
    for i, block in enumerate(blocks, start=1):
        xs.append(block(y))
        y = xs[-1]
        sources = dwa.sources(i)
        if sources:
            y = torch.zeros_like(x0)
            for j in sources:
                y = y + weight[position] * xs[j]
                position += 1
    return y


def run_through(dwa: DWA, x: Tensor, blocks: Sequence[Block]) -> Tensor:
    run = dwa.begin(x)
    for block in blocks:
        x = run(block(x))
    return x


def randomise(dwa: DWA, scale: float = 0.5) -> DWA:
    """Give the weights values of any sign, around the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        noise = torch.randn(dwa.weight.shape, generator=generator, dtype=torch.float64)
        dwa.weight.add_((scale * noise).to(dwa.weight))
    return dwa


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference as a share of the largest entry."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))
