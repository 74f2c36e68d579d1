"""Selection in one pass: a sample brackets the k-th largest magnitude, one pass counts what lies inside.

The bracket is a guess, what it leads to is exact: the pass counts the entries above the bracket and keeps
or counts the bit patterns inside, so that a rank that falls outside shows, and the caller selects by radix
instead.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from .cells import Cell, CellFunction

Patterns = NDArray[np.int32]
Ties = dict[tuple[int, str], dict[int, int]]

SAMPLE = 16
"""One element in this many is sampled."""
KEPT = 1 << 18
"""Elements inside the bracket that are remembered for each model; more are counted."""
WIDEST = 1 << 18
"""Bit patterns in a bracket whose elements are counted: bins of the histogram."""
_BULK = 1 << 16
_MAGNITUDE = np.int32(0x7FFF_FFFF)


class Sampler(Protocol):
    """The passes that a bracket needs."""

    def scan(
        self, function: CellFunction, names: Sequence[str] | None = None, *, sample: int = 1
    ) -> None:
        """Call the function on every cell, or on the first part of every cell."""
        ...


@dataclass(frozen=True)
class Found:
    """Result of a selection, one item for each task.

    Attributes:
        patterns: bit pattern of the k-th largest magnitude.
        quotas: entries equal to it that belong to the k largest.
        equals: entries equal to it.
        ties: how many of them each cell has, by (task, tensor) and start; None if not remembered.
    """

    patterns: list[int]
    quotas: list[int]
    equals: list[int]
    ties: Ties | None


class _Counter:
    """A histogram of small integers that come in pieces, counted in bulk."""

    def __init__(self, size: int) -> None:
        self.counts = np.zeros(size, dtype=np.int64)
        self._pieces: list[Patterns] = []
        self._pending = 0
        self._lock = threading.Lock()

    def add(self, values: Patterns) -> None:
        with self._lock:
            self._pieces.append(values)
            self._pending += values.size
            if self._pending >= _BULK:
                self._flush()

    def _flush(self) -> None:
        if self._pieces:
            self.counts += np.bincount(np.concatenate(self._pieces), minlength=self.counts.size)
        self._pieces, self._pending = [], 0

    def total(self) -> NDArray[np.int64]:
        with self._lock:
            self._flush()
        return self.counts


def select(
    scanner: Sampler,
    ranks: Sequence[int],
    tasks: Sequence[int],
    numel: int,
    *,
    names: Sequence[str] | None,
    transform: Callable[[Cell], None] | None,
) -> Found | None:
    """Return the k-th largest magnitudes of float32 task vectors, None if the brackets do not hold them.

    Args:
        scanner: the passes.
        ranks: k for each task, from 1 to `numel`.
        tasks: rows of the deltas.
        numel: number of entries of each task vector.
        names: tensors to rank (default: all).
        transform: changes the deltas of a cell before they are ranked.
    """

    def patterns(cell: Cell) -> Iterator[tuple[int, Patterns]]:
        if transform is not None:
            transform(cell)
        out = cell.scratch(0).view(torch.int32).numpy()
        for row, task in enumerate(tasks):
            yield row, np.bitwise_and(cell.deltas[task].numpy().view(np.int32), _MAGNITUDE, out=out)

    coarse = [_Counter(1 << 15) for _ in tasks]

    def sample(cell: Cell) -> None:
        for row, values in patterns(cell):
            coarse[row].add(values >> 16)

    scanner.scan(sample, names, sample=SAMPLE)
    parts = [
        _Inside(*_bracket(counter.total(), rank / numel))
        for counter, rank in zip(coarse, ranks, strict=True)
    ]

    def count(cell: Cell) -> None:
        for row, values in patterns(cell):
            parts[row].add(cell, values)

    scanner.scan(count, names)
    found = [part.select(rank) for part, rank in zip(parts, ranks, strict=True)]
    if not all(found):
        return None
    ties: Ties | None = {} if all(part.kept is not None for part in parts) else None
    for part, task, item in zip(parts, tasks, found, strict=True):
        if ties is not None and item is not None:
            part.fill(ties, task, item[0])
    rows = [item for item in found if item is not None]
    return Found([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows], ties)


def _bracket(counts: NDArray[np.int64], share: float) -> tuple[int, int]:
    """Return (first pattern, number of patterns) around the quantile of a sample of leading bits.

    Eight standard deviations of a binomial count: neighbours are alike, so that a sample of runs is
    worth less than its size.
    """
    size = int(counts.sum())
    margin = 8 * math.sqrt(size * share * (1 - share)) + 1
    from_top = np.cumsum(counts[::-1])
    last = len(counts) - 1
    high = last - int(np.searchsorted(from_top, share * size - margin))
    low = last - min(int(np.searchsorted(from_top, share * size + margin)), last)
    return low << 16, (high - low + 1) << 16


class _Inside:
    """What one pass learns of one task: entries above the bracket, and the patterns inside.

    The patterns are remembered up to `KEPT` of them, and counted into a histogram from there on.
    """

    def __init__(self, low: int, size: int) -> None:
        self._low, self._size = low, size
        self._above = self._number = 0
        self.kept: dict[tuple[str, int], Patterns] | None = {}
        self._counter: _Counter | None = None
        self._lock = threading.Lock()

    def add(self, cell: Cell, values: Patterns) -> None:
        """Take the patterns of a cell, which are overwritten."""
        values -= np.int32(self._low)
        above = int(np.count_nonzero(values >= self._size))
        found = values[values.view(np.uint32) < self._size]
        with self._lock:
            self._above += above
            self._number += found.size
            if self.kept is not None:
                self.kept[cell.name, cell.start] = found
                if self._number > KEPT:
                    self._spill()
            elif self._counter is not None:
                self._counter.add(found)

    def _spill(self) -> None:
        """Too many to remember: count them, unless the bracket is too wide for a histogram."""
        if self._size <= WIDEST:
            self._counter = _Counter(self._size)
            for found in (self.kept or {}).values():
                self._counter.add(found)
        self.kept = None

    def select(self, rank: int) -> tuple[int, int, int] | None:
        """Return (pattern of the rank-th largest, quota, equals); None if it is not inside."""
        rank -= self._above
        if not 0 < rank <= self._number:
            return None
        if self.kept is not None:
            values = np.concatenate(list(self.kept.values()))
            digit = int(np.partition(values, values.size - rank)[values.size - rank])
            more = int(np.count_nonzero(values > digit))
            equal = int(np.count_nonzero(values == digit))
        elif self._counter is not None:
            counts = self._counter.total()
            from_top = np.cumsum(counts[::-1])
            reverse = int(np.searchsorted(from_top, rank))
            digit = len(counts) - 1 - reverse
            equal = int(counts[digit])
            more = int(from_top[reverse]) - equal
        else:
            return None
        return self._low + digit, rank - more, equal

    def fill(self, ties: Ties, task: int, pattern: int) -> None:
        """Enter the number of entries with this pattern in each cell."""
        for (name, start), found in (self.kept or {}).items():
            number = int(np.count_nonzero(found == pattern - self._low))
            if number:
                ties.setdefault((task, name), {})[start] = number
