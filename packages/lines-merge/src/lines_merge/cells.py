"""Cells: the fixed runs of elements that every pass works on, their buffers, and exact sums over them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .sources import TensorInfo

CELL = 65_536
"""Elements of a cell: a few float32 buffers of it fit the second-level cache."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the base and what is to happen to it."""

    name: str
    info: TensorInfo
    merged: bool
    """False for integers, booleans and tensors that a model lacks: copied from the base."""
    limits: tuple[int, ...] = ()
    """Elements that each model shares with the base: fewer if its embedding lacks rows."""


@dataclass
class Cell:
    """A cell under way: where it lies, its raw elements, and buffers that a merge may use."""

    entry: Entry
    start: int
    """Index of the first element in the flattened tensor."""
    size: int
    keys: Sequence[str]
    """Names of the models."""
    base: Tensor
    """Base weights, (n,), in the arithmetic's dtype."""
    deltas: Tensor
    """Task vectors, (models, n); a merge may overwrite them."""
    raw_base: Tensor
    raw_models: Sequence[Tensor]
    worker: Worker
    depth: float = 0.0
    """Relative depth of the tensor, in [0, 1]; see `schedule.position`."""

    @property
    def name(self) -> str:
        """Name of the tensor."""
        return self.entry.name

    def scratch(self, index: int) -> Tensor:
        """Return float buffer number `index`, (n,), with arbitrary content."""
        return self.worker.scratch(index, self.base.dtype)[: self.size]


class Worker:
    """Buffers of one thread, allocated once and used for every cell."""

    def __init__(self) -> None:
        self._scratch: dict[tuple[int, torch.dtype], Tensor] = {}
        self._blocks: dict[torch.dtype, Tensor] = {}
        self._reads: dict[tuple[int, torch.dtype], Tensor] = {}

    def scratch(self, index: int, dtype: torch.dtype) -> Tensor:
        """Return a buffer of one cell."""
        key = (index, dtype)
        if key not in self._scratch:
            self._scratch[key] = torch.empty(CELL, dtype=dtype)
        return self._scratch[key]

    def block(self, rows: int, dtype: torch.dtype) -> Tensor:
        """Return the buffer of base and models, (rows, CELL)."""
        if dtype not in self._blocks:
            self._blocks[dtype] = torch.empty(rows, CELL, dtype=dtype)
        return self._blocks[dtype]

    def chunk(self, index: int, dtype: torch.dtype, size: int) -> Tensor:
        """Return the reading (or writing) buffer number `index`."""
        key = (index, dtype)
        if key not in self._reads or self._reads[key].numel() < size:
            self._reads[key] = torch.empty(size, dtype=dtype)
        return self._reads[key][:size]


CellFunction = Callable[[Cell], None]


class Sums:
    """Exact sums of per-cell float64 values, whatever the order in which cells arrive.

    >>> sums = Sums(1)
    >>> for value in (1e16, 1.0, -1e16):
    ...     sums.add("w", value)
    >>> sums.totals()
    [1.0]
    """

    def __init__(self, columns: int) -> None:
        self._cells: dict[str, list[list[float]]] = {}
        self._columns = columns
        self._lock = threading.Lock()

    def add(self, name: str, *values: float) -> None:
        """Record the values of one cell of a tensor."""
        with self._lock:
            columns = self._cells.setdefault(name, [[] for _ in range(self._columns)])
            for column, value in zip(columns, values, strict=True):
                if value:
                    column.append(value)

    def totals(self) -> list[float]:
        """Return the totals: exact within a tensor and over tensors."""
        return [
            math.fsum(value for columns in self._cells.values() for value in columns[index])
            for index in range(self._columns)
        ]


def magnitude_sum(values: Tensor, norm: float, scratch: Tensor) -> float:
    """Return the sum of |values|^norm (norm 1 or 2) in float64, in an order fixed by the length."""
    array = values.numpy()
    if norm == 1:
        return float(np.abs(array, out=scratch.numpy()).sum(dtype=np.float64))
    return float(np.square(array, dtype=np.float64).sum())
