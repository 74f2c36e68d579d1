"""Small smooth networks and random streams that every test file uses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

torch.set_num_threads(1)


def _mend_torchvision() -> torch.library.Library | None:
    """Declare two operators that the public index's torchvision wants at import beside a CPU build of torch."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


_LIB = _mend_torchvision()

F64 = torch.float64


def make_net(seed: int = 0, features: int = 5, classes: int = 3, hidden: int = 7) -> nn.Sequential:
    """A smooth float64 network from (B, features) to (B, classes)."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(features, hidden), nn.Softplus(2.0), nn.Linear(hidden, classes)
    ).double()


def exact_hessians(fn, x: Tensor) -> Tensor:
    """Hessians of every sample, (B, D, D), one sample at a time: the oracle."""
    rows = []
    for sample in x:
        hessian = torch.autograd.functional.hessian(lambda s: fn(s[None])[0], sample)
        rows.append(hessian.reshape(sample.numel(), sample.numel()))
    return torch.stack(rows)


@pytest.fixture
def net() -> nn.Sequential:
    return make_net()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 5, generator=generator, dtype=F64)
    return x, torch.tensor([0, 2, 1, 2])
