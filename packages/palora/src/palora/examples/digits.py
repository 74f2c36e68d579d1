"""Two overlapping digits, two tasks: the paper's MultiMNIST in kind, from bundled data.

scikit-learn's ``load_digits`` (1,797 8×8 images): digit a at [0:8, 0:8] and digit b at
[2:10, 2:10] of a 10×10 canvas, pixel-wise maximum; the first 1,400 images of a fixed permutation
make the training composites, the other 397 the test composites.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from palora.examples.models import TaskMLP
from palora.examples.training import Task, overlay

__all__ = ["HV_REFERENCE", "classification_losses", "classification_scores", "composites", "task"]

HV_REFERENCE = (2.0, 2.0)


def composites(
    images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], count: int, shift: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw ``count`` pairs with replacement and overlay them.

    Returns:
        images ``(count, h+shift, w+shift)``, labels of the first and of the second.
    """
    rng = np.random.default_rng(seed)
    first, second = rng.integers(len(images), size=(2, count))
    pictures = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
    digits = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    a, b = torch.from_numpy(first), torch.from_numpy(second)
    return overlay(pictures[a], pictures[b], shift), digits[a], digits[b]


def classification_losses(logits: list[Tensor], *labels: Tensor) -> list[Tensor]:
    """Cross-entropy of each task."""
    return [F.cross_entropy(y, t) for y, t in zip(logits, labels, strict=True)]


def classification_scores(logits: list[Tensor], *labels: Tensor) -> tuple[list[Tensor], ...]:
    """Cross-entropies and accuracies."""
    hits = [(y.argmax(-1) == t).float().mean() for y, t in zip(logits, labels, strict=True)]
    return classification_losses(logits, *labels), hits


def task(train: int = 12_000, test: int = 4_000, seed: int = 0) -> Task:
    """Build the two-digit problem.

    Args:
        train: training composites.
        test: test composites.
        seed: of the pairs drawn (the split of the source images is fixed).

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the digits need scikit-learn: pip install "palora[data]"') from error
    source = load_digits()
    order = np.random.default_rng(0).permutation(len(source.images))
    images, labels = source.images[order] / 16.0, source.target[order]
    parts = []
    for low, high, count, at in ((0, 1400, train, 2 * seed), (1400, None, test, 2 * seed + 1)):
        x, a, b = composites(images[low:high], labels[low:high], count, 2, at)
        parts.append((x.flatten(1), a, b))
    return Task(
        parts[0],
        parts[1],
        lambda extra: TaskMLP(100 + extra, [32, 32], [10, 10]),
        classification_losses,
        classification_scores,
        ["top-left", "bottom-right"],
    )
