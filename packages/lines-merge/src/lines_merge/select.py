"""Exact order statistics of magnitudes by histograms of bit patterns, without holding the vector.

The bit pattern of a non-negative IEEE float grows with its value. For float32 one pass is enough where a
sample brackets the k-th largest magnitude (`bracket`). Otherwise it is found 16 bits at a time: a histogram
of the leading 16 bits over the whole vector, then one of the next 16 bits inside the chosen bin, and so on
(two passes for float32, four for float64).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from . import bracket
from .cells import Cell, CellFunction, Entry

_BINS = 1 << 16
Transform = Callable[[Cell], None]


class Scanner(Protocol):
    """The passes that selection needs; `engine.Engine` has them."""

    entries: dict[str, Entry]

    def scan(
        self, function: CellFunction, names: Sequence[str] | None = None, *, sample: int = 1
    ) -> None:
        """Call the function on every cell, or on the first part of every cell."""
        ...

    def scan_cell(self, function: CellFunction, name: str, start: int) -> None:
        """Call the function on one cell."""
        ...

    def compute_dtype(self, entry: Entry) -> torch.dtype:
        """Return the dtype of the arithmetic."""
        ...


@dataclass(frozen=True)
class Cut:
    """Which entries of one task vector survive: those above `value`, and the first ones equal to it.

    Attributes:
        value: magnitude of the k-th largest entry; 0 keeps everything, infinity nothing.
        last: (tensor name, flat index) of the last entry equal to `value` that is kept, in the order of
            sorted names; None keeps all of them.
    """

    value: float
    last: tuple[str, int] | None = None

    def mask(self, name: str, start: int, values: Tensor) -> Tensor:
        """Return which entries of a cell survive."""
        magnitudes = values.double().abs_()  # the value need not be a number of their dtype
        index = torch.arange(start, start + len(values))
        if self.last is None or name < self.last[0]:
            return magnitudes >= self.value
        ties = index <= self.last[1] if name == self.last[0] else torch.zeros_like(index).bool()
        return (magnitudes > self.value) | ((magnitudes == self.value) & ties)

    def apply(self, name: str, start: int, values: Tensor) -> None:
        """Set what is trimmed from a cell to zero, in place."""
        if self.value == 0:
            return
        above = _floor(self.value, values.dtype)
        equal = _below(above, values.dtype) if above == self.value else above
        ties = len(values)
        if self.last is not None and name >= self.last[0]:
            ties = 0 if name > self.last[0] else min(max(self.last[1] + 1 - start, 0), ties)
        for part, bound in ((values[:ties], equal), (values[ties:], above)):
            if part.numel():
                torch.ops.aten.hardshrink.out(part, bound, out=part)


@lru_cache(maxsize=256)
def _floor(value: float, dtype: torch.dtype) -> float:
    """Return the largest number of the dtype that is not above `value`."""
    rounded = torch.tensor(value, dtype=dtype).item()
    return rounded if rounded <= value else _below(rounded, dtype)


@lru_cache(maxsize=256)
def _below(value: float, dtype: torch.dtype) -> float:
    number = torch.tensor(value, dtype=dtype)
    return float(torch.nextafter(number, torch.tensor(-math.inf, dtype=dtype)))


def keep_count(numel: int, density: float) -> int:
    """Return floor(density * numel), the number of entries that a trim keeps.

    A density such as 0.29 is the nearest binary number to what was meant; a product within rounding of
    an integer counts as that integer, so that 0.29 of 100 entries are 29, not 28.

    >>> keep_count(100, 0.29)
    29
    """
    product = density * numel
    nearest = round(product)
    return nearest if abs(product - nearest) <= 1e-15 * numel else int(product)


def cuts(
    scanner: Scanner,
    ranks: Sequence[int],
    *,
    names: Sequence[str] | None = None,
    transform: Transform | None = None,
    keep_ties: bool = False,
) -> list[Cut]:
    """Return, for each model, the cut that keeps its `rank` largest entries in magnitude.

    Args:
        scanner: the passes over base and models.
        ranks: number of entries to keep, for each model; the number of entries or more keeps all.
        names: tensors whose entries are ranked together (default: all).
        transform: changes the deltas of a cell before they are ranked.
        keep_ties: keep every entry equal to the smallest one kept, instead of exactly `rank` entries.
    """
    entries = [scanner.entries[n] for n in names] if names is not None else None
    chosen = entries or [entry for entry in scanner.entries.values() if entry.merged]
    numel = sum(entry.info.numel for entry in chosen)
    wide = any(scanner.compute_dtype(entry) == torch.float64 for entry in chosen)
    search = _Search(scanner, names, transform, 64 if wide else 32)
    active = [t for t, rank in enumerate(ranks) if 0 < rank < numel]
    result = [Cut(math.inf) if rank <= 0 else Cut(0.0) for rank in ranks]
    if not active:
        return result
    chosen_ranks = [ranks[t] for t in active]
    found = None
    if not wide:
        found = bracket.select(
            scanner, chosen_ranks, active, numel, names=names, transform=transform
        )
    if found is None:
        found = search.kth(chosen_ranks, active)
    quotas, equals = found.quotas, found.equals
    values = [_value(pattern, wide) for pattern in found.patterns]
    split = [
        t
        for t, quota, equal, value in zip(active, quotas, equals, values, strict=True)
        if quota < equal and not keep_ties and value != 0
    ]
    wanted = {t: (values[active.index(t)], quotas[active.index(t)]) for t in split}
    lasts = search.locate(wanted, found.ties) if wanted else {}
    for t, value in zip(active, values, strict=True):
        result[t] = Cut(value, lasts.get(t))
    return result


def _value(pattern: int, wide: bool) -> float:
    integer: np.generic = np.uint64(pattern) if wide else np.uint32(pattern)
    return float(integer.view(np.float64 if wide else np.float32))


class _Search:
    """The passes of one selection."""

    def __init__(
        self,
        scanner: Scanner,
        names: Sequence[str] | None,
        transform: Transform | None,
        bits: int,
    ) -> None:
        self._scanner, self._names, self._transform, self._bits = scanner, names, transform, bits
        self._lock = threading.Lock()

    def _magnitudes(self, cell: Cell, tasks: Sequence[int]) -> Iterable[tuple[int, Tensor]]:
        """Yield (task, magnitudes); float32 cells are widened if another tensor is float64."""
        if self._transform is not None:
            self._transform(cell)
        for task in tasks:
            values = cell.deltas[task]
            magnitude = torch.abs(values, out=cell.scratch(0))
            yield task, magnitude.double() if self._bits == 64 else magnitude

    def kth(self, ranks: Sequence[int], tasks: Sequence[int]) -> bracket.Found:
        """Select by radix."""
        prefixes = [0] * len(tasks)
        quotas = list(ranks)
        counts = np.zeros((len(tasks), _BINS), dtype=np.int64)
        kind = torch.int64 if self._bits == 64 else torch.int32
        for shift in range(self._bits - 16, -1, -16):
            counts[:] = 0

            def count(cell: Cell, shift: int = shift) -> None:
                for row, (_, magnitude) in enumerate(self._magnitudes(cell, tasks)):
                    pattern = magnitude.view(kind)
                    if shift == self._bits - 16:
                        digits = pattern >> shift
                    else:
                        upper = pattern.numpy() >> (shift + 16)
                        inside = np.flatnonzero(upper == prefixes[row])
                        digits = torch.from_numpy(pattern.numpy()[inside] >> shift & (_BINS - 1))
                    found = torch.bincount(digits).numpy()
                    with self._lock:
                        counts[row, : len(found)] += found

            self._scanner.scan(count, self._names)
            for row, quota in enumerate(quotas):
                from_top = np.cumsum(counts[row, ::-1])
                reverse = int(np.searchsorted(from_top, quota))
                digit = _BINS - 1 - reverse
                quotas[row] = quota - int(from_top[reverse] - counts[row, digit])
                prefixes[row] = prefixes[row] << 16 | digit
        equals = [int(counts[row, prefix & (_BINS - 1)]) for row, prefix in enumerate(prefixes)]
        return bracket.Found(prefixes, quotas, equals, None)

    def locate(
        self, wanted: dict[int, tuple[float, int]], ties: bracket.Ties | None
    ) -> dict[int, tuple[str, int]]:
        """Return where the quota-th entry of magnitude `value` lies, for {task: (value, quota)}."""
        tasks = sorted(wanted)
        tables: bracket.Ties = ties or {}

        def count(cell: Cell) -> None:
            for task, magnitude in self._magnitudes(cell, tasks):
                number = int(np.count_nonzero(magnitude.numpy() == wanted[task][0]))
                if number:
                    with self._lock:
                        tables.setdefault((task, cell.name), {})[cell.start] = number

        if ties is None:
            self._scanner.scan(count, self._names)
        found: dict[int, tuple[str, int]] = {}
        for task in tasks:
            value, quota = wanted[task]
            for name in sorted(name for t, name in tables if t == task):
                total = sum(tables[task, name].values())
                if quota <= total:
                    found[task] = (name, self._within(task, name, value, quota, tables[task, name]))
                    break
                quota -= total
        return found

    def _within(self, task: int, name: str, value: float, quota: int, table: dict[int, int]) -> int:
        """Return the flat index of the quota-th tie in one tensor, whose ties per cell are known."""
        for start in sorted(table):
            if quota <= table[start]:
                break
            quota -= table[start]
        result: list[int] = []

        def find(cell: Cell) -> None:
            for _, magnitude in self._magnitudes(cell, [task]):
                ties = np.flatnonzero(magnitude.numpy() == value)
                result.append(start + int(ties[quota - 1]))

        self._scanner.scan_cell(find, name, start)
        return result[0]
