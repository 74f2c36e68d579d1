"""Scenes of two triangles and two boxes, whose heights are to be averaged (after Fleuret 2019).

A model has to find, for every shape, its twin elsewhere in the signal and read the twin's height.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LENGTH = 100
_KINDS = (0, 0, 1, 1)  # two triangles, two boxes


class ShapeScenes(NamedTuple):
    """Scenes.

    Attributes:
        signal: (n, 100) input.
        target: (n, 100) the scene with the heights of each group averaged, without noise.
        support: (n, 4, 100) bool, where each shape is.
        twin: (n, 4) index of the shape that a shape's height is averaged with.
    """

    signal: Tensor
    target: Tensor
    support: Tensor
    twin: Tensor


def _draw(centre: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Return the four shapes of each scene, (n, 4, 100)."""
    t = torch.arange(LENGTH, dtype=centre.dtype)
    distance = (t - centre.unsqueeze(-1)).abs()
    h, w = height.unsqueeze(-1), width.unsqueeze(-1)
    triangle = F.relu(h - F.relu(distance - 0.5) * 2 * h / w)
    box = h * (distance < w / 2)
    return torch.where(torch.tensor(_KINDS).view(4, 1) == 0, triangle, box)


def make_shapes(
    num_samples: int, *, seed: int = 0, group: Literal["kind", "location"] = "kind"
) -> ShapeScenes:
    """Generate scenes.

    Args:
        num_samples: n.
        seed: of the draw.
        group: average the heights of equal shapes ("kind"), or of the two leftmost and the two
            rightmost ("location", which needs positions).

    Raises:
        ValueError: for an unknown group.

    Example:
        >>> make_shapes(8).signal.shape
        torch.Size([8, 100])
    """
    if group not in ("kind", "location"):
        raise ValueError(f"group must be 'kind' or 'location', got {group!r}")
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    centres, heights, widths = [], [], []
    found = 0
    while found < num_samples:
        candidates = max(1024, 8 * (num_samples - found))
        c = uniform(5.5, 94.5, candidates, 4)
        h = uniform(1, 25, candidates, 4)
        w = uniform(5, 11, candidates, 4)
        keep = ~_collides(_draw(c, h, w))
        keep &= ((h[:, 0] - h[:, 1]).abs() > 4) & ((h[:, 2] - h[:, 3]).abs() > 4)
        centres.append(c[keep])
        heights.append(h[keep])
        widths.append(w[keep])
        found += int(keep.sum())
    c, h, w = (torch.cat(parts)[:num_samples] for parts in (centres, heights, widths))
    if group == "kind":
        twin = torch.tensor([1, 0, 3, 2]).expand(num_samples, 4)
    else:
        order = c.argsort(1)
        twin = torch.empty(num_samples, 4, dtype=torch.long)
        for a, b in ((0, 1), (2, 3)):
            twin.scatter_(1, order[:, a : a + 1], order[:, b : b + 1])
            twin.scatter_(1, order[:, b : b + 1], order[:, a : a + 1])
    shapes = _draw(c, h, w)
    averaged = _draw(c, (h + h.gather(1, twin)) / 2, w)
    signal = shapes.amax(1) + uniform(-0.15, 0.15, num_samples, LENGTH)
    return ShapeScenes(signal, averaged.amax(1), shapes > 0, twin)


def _collides(shapes: Tensor) -> Tensor:
    """Tell (n,) whether dilated supports of two shapes meet."""
    dilated = F.max_pool1d((shapes > 0).float(), kernel_size=2, stride=1)
    return (dilated.sum(1) > 1).any(1)
