from __future__ import annotations

import pytest
import torch

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
