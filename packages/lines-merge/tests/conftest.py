"""Small checkpoints that every test file uses."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

State = dict[str, torch.Tensor]


def make_state(seed: int = 0, blocks: int = 3, dtype: torch.dtype = torch.float32) -> State:
    """A small transformer-shaped state dict in an order that is not sorted."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    state = {"embed.weight": rand(7, 5), "pos": rand(4)}
    for index in range(blocks):
        state[f"blocks.{index}.norm.weight"] = rand(5)
        state[f"blocks.{index}.mlp.fc.weight"] = rand(9, 5)
        state[f"blocks.{index}.mlp.fc.bias"] = rand(9)
    state["norm.weight"] = rand(5)
    state["head.weight"] = rand(3, 5)
    return state


def make_finetuned(base: State, seed: int, scale: float = 0.05) -> State:
    """The base plus a small random update of every tensor."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return {
        name: (value.float() + scale * torch.randn(value.shape, generator=generator)).to(
            value.dtype
        )
        for name, value in base.items()
    }


@pytest.fixture
def base() -> State:
    return make_state()


@pytest.fixture
def models(base: State) -> list[State]:
    return [make_finetuned(base, seed) for seed in range(3)]


@pytest.fixture
def finetune() -> Callable[..., State]:
    return make_finetuned


@pytest.fixture(scope="session")
def torchvision_operators() -> object:
    """Define two operators that PyPI's torchvision lacks beside a CPU build of torch."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return None  # tests that need it skip
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None
