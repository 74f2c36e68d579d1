"""Dilation and period for a depth."""

from __future__ import annotations

from dataclasses import dataclass

from denseformer.core.geometry import Geometry, check_int
from denseformer.core.plan import plan_of


@dataclass(frozen=True)
class Suggestion:
    """One k × p: its averages and weights, and its traffic in representations moved per forward pass."""

    dilation: int
    period: int
    rows: int
    weights: int
    traffic: int
    live: int


def suggest(depth: int, most: int = 8) -> list[Suggestion]:
    """List dilations and periods with p = 1 (mod k), cheapest last.

    Only there can a row read the first output that was computed from the row before it; the paper
    recommends 4 × 5. ``live`` is what inference keeps at most beside the stream.

    Args:
        depth: number of blocks.
        most: largest dilation and period.

    Raises:
        TypeError, ValueError: not ints of at least 1.

    >>> best = suggest(48, most=5)[-1]
    >>> best.dilation, best.period, best.weights
    (4, 5, 62)
    """
    check_int("depth", depth)
    check_int("most", most)
    found = []
    for k in range(1, min(most, depth) + 1):
        for p in range(1, min(most, depth) + 1):
            if p % k == 1 % k:
                g = Geometry(depth, k, p)
                live = max(min(len(g.live(i)), len(g.pending(i))) for i in range(depth + 1))
                found.append(Suggestion(k, p, len(g.rows), g.nnz, plan_of(g).traffic, live))
    return sorted(found, key=lambda s: (-s.traffic, s.dilation, s.period))
