from __future__ import annotations

import importlib.metadata

import pytest
import torch

torch.set_num_threads(1)


def _mend_torchvision() -> object:
    """The registry's torchvision beside a CPU torch lacks two operators that it wants at import."""
    try:
        version = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return None
    if "+" in version:
        return None
    lib = torch.library.Library("torchvision", "DEF")
    try:
        lib.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        lib.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:
        return None
    return lib


_LIB = _mend_torchvision()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
