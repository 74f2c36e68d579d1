"""Colour transfer: move the palette of one picture onto another along the optimal matching."""

from __future__ import annotations

import torch
from torch import Tensor

from deepemd.api import match


def transfer(source: Tensor, target: Tensor, **options: object) -> tuple[Tensor, float]:
    """Give every colour of one palette the colour of another that the matching assigns to it.

    Args:
        source, target: (N, 3) colours in [0, 1].
        **options: of :func:`deepemd.match`; the default method must give a matching.

    Returns:
        The recoloured palette (N, 3), in the order of ``source``, and the EMD.

    >>> grey = torch.linspace(0, 1, 8)[:, None].expand(8, 3)
    >>> transfer(grey, grey.flip(0))[0].equal(grey)
    True
    """
    out = match(source, target, **options)  # type: ignore[arg-type]
    if out.index is None:
        raise ValueError(f"method {out.method!r} gives no matching")
    return target[out.index.clamp_min(0)], float(out.distance.detach())


def main() -> None:
    """Recolour ``china.jpg`` with ``flower.jpg`` and print the EMD of their palettes."""
    from deepemd.examples.clouds import photo_colours

    source, target = photo_colours("china.jpg"), photo_colours("flower.jpg", seed=1)
    for method in ("exact", "deepemd"):
        recoloured, distance = transfer(source, target, method=method)
        error = float((recoloured.sort(0).values - target.sort(0).values).abs().max())
        print(f"{method}: EMD {distance:.4f}, palettes differ by {error:.1e}")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
