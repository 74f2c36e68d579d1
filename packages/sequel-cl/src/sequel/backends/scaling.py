"""Loss scaling for float16, and determinism on CUDA: what PyTorch keeps outside of the step."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

__all__ = ["LossScale", "deterministic"]


class LossScale:
    """The factor of the loss in float16, by the rule and defaults of ``torch.amp.GradScaler``.

    It halves where gradients overflow, in which case the step is not taken, and doubles after 2000 steps without. A
    scaler that is asked for one ``.grad`` per step cannot serve algorithms that take several gradients in one.

    >>> scale = LossScale()
    >>> scale.shrink()
    >>> scale.value
    32768.0
    """

    start, factor, every, least = 2.0**16, 2.0, 2000, 2.0**-10

    def __init__(self) -> None:
        self.value, self.streak = self.start, 0

    def grow(self) -> None:
        """Count a step that was taken."""
        self.streak += 1
        if self.streak == self.every:
            self.value, self.streak = self.value * self.factor, 0

    def shrink(self) -> None:
        """Count a step whose gradients were not finite."""
        self.value, self.streak = self.value / self.factor, 0
        if self.value < self.least:
            raise FloatingPointError("the gradients are not finite at any loss scale")

    def array(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Return what a checkpoint keeps."""
        return np.array([self.value, self.streak], dtype=np.float64)

    def restore(self, saved: np.ndarray[tuple[int], np.dtype[np.float64]]) -> None:
        """Take it back."""
        self.value, self.streak = float(saved[0]), int(saved[1])


def _switches() -> Any:
    return torch.utils.deterministic


@contextlib.contextmanager
def deterministic(device: str) -> Iterator[None]:
    """Let CUDA use deterministic kernels only; the CPU's are so anyway. Leaves PyTorch's switches as they were."""
    if device != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn, switches = torch.backends.cudnn, _switches()
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        switches.fill_uninitialized_memory,
        cudnn.deterministic,
        cudnn.benchmark,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    switches.fill_uninitialized_memory = False
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switches.fill_uninitialized_memory = before[2]
        cudnn.deterministic, cudnn.benchmark = before[3:]
