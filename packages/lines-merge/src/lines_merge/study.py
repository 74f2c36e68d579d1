"""Looking at an update before it is edited: where it is large, and whether two checkpoints fit together."""

from __future__ import annotations

from .cells import Cell, Sums, magnitude_sum
from .depth import DepthMap
from .engine import Engine
from .sources import TensorSource


def differences(base: TensorSource, other: TensorSource) -> list[str]:
    """Return one line for each tensor that is missing, extra, or of another shape or dtype."""
    lines = []
    for name in sorted(set(base.tensors) | set(other.tensors)):
        first, second = base.tensors.get(name), other.tensors.get(name)
        if first is None or second is None:
            lines.append(f"{name}: only in {(base if second is None else other).label}")
        elif (first.shape, first.dtype) != (second.shape, second.dtype):
            lines.append(
                f"{name}: {first.shape} {first.dtype} against {second.shape} {second.dtype}"
            )
    return lines


def block_norms(
    base: TensorSource, other: TensorSource, depth: DepthMap
) -> list[tuple[str, float, float]]:
    """Return (block, ||update||, ||base||), L2 norms, in order of depth; "outside" comes last."""
    engine = Engine(base, {"0": other}, strict=False, allow_nonfinite=True)
    sums: dict[str, Sums] = {}
    keys: dict[str, tuple[str, int]] = {}
    blocks = {name: depth[name] if name in depth else None for name in engine.entries}  # noqa: SIM401
    for name in engine.entries:
        block = blocks[name]
        label = f"{block.tower}.{block.index}" if block else "outside"
        keys[label] = (block.tower, block.index) if block else ("\uffff", 0)
        sums.setdefault(label, Sums(2))

    def measure(cell: Cell) -> None:
        block = blocks[cell.name]
        label = f"{block.tower}.{block.index}" if block else "outside"
        update = magnitude_sum(cell.deltas[0], 2, cell.scratch(0))
        sums[label].add(cell.name, update, magnitude_sum(cell.base, 2, cell.scratch(0)))

    engine.scan(measure)
    rows = []
    for label in sorted(sums, key=lambda label: keys[label]):
        update, size = sums[label].totals()
        rows.append((label, update**0.5, size**0.5))
    return rows
