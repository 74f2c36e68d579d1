"""The 1,797 handwritten 8x8 digits that scikit-learn carries, as sequences of patches."""

from __future__ import annotations

import torch
from torch import Tensor


def load_digits(
    *, patch: int = 1, seed: int = 0
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return ((tokens, labels) to train, (tokens, labels) to test), 1,437 and 360 digits.

    Args:
        patch: side of a token; 1 gives 64 one-pixel tokens, 2 gives 16 tokens of 4 pixels.
        seed: of the split.

    Returns:
        Tokens (n, (8/patch)², patch²), pixels in [0, 1].

    Raises:
        ImportError: without scikit-learn, the extra ``data``.
    """
    try:
        from sklearn.datasets import load_digits as load  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError('the digits need scikit-learn: pip install "hypermixer[data]"') from error
    raw = load()
    images = torch.tensor(raw.images, dtype=torch.float32) / 16.0
    labels = torch.tensor(raw.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    tokens = patches(images, patch)[order]
    labels = labels[order]
    return (tokens[:1437], labels[:1437]), (tokens[1437:], labels[1437:])


def patches(images: Tensor, patch: int) -> Tensor:
    """Return images (n, s, s) as tokens (n, (s/patch)², patch²), row by row."""
    tiles = images.unfold(1, patch, patch).unfold(2, patch, patch)
    return tiles.flatten(3).flatten(1, 2)
