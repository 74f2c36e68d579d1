"""Settings of the whole suite: one thread, fixed seeds, and torchvision's operators without its binary."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
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


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
