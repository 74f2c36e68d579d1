"""Settings of the whole suite: one thread, fixed seeds, and torchvision's operators without its binary."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)

# torchvision from the package index beside a CPU build of torch lacks its compiled operators, and
# fails at import, which timm and transformers do. Only their schemas are needed.
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for _schema in (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
):
    with contextlib.suppress(RuntimeError):  # a complete torchvision has defined it
        _LIBRARY.define(_schema)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
