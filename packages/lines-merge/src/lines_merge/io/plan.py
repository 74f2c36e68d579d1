"""What a merge of files will do, before a tensor is read: memory, passes, shards, bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..bracket import KEPT, WIDEST
from ..cells import CELL
from ..engine import Engine
from ..merges import Merge
from ..scaling import Scaling
from ..sources import TensorInfo
from .header import Layout, layout

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[_letter] = _UNITS[f"{_letter}b"] = 1000**_power
    _UNITS[f"{_letter}ib"] = 1024**_power
_MIB = 2**20
_MARGIN = 24 * _MIB  # allocator slack, headers, threads' stacks
_LARGEST_CHUNK = 16 * CELL


def parse_size(size: int | str, name: str) -> int:
    """Return bytes.

    >>> parse_size("1.5GiB", "max_memory"), parse_size("5GB", "shard_size")
    (1610612736, 5000000000)

    Raises:
        ValueError: not a positive size.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*)\s*", size.lower())
        if match is None or match[2] not in _UNITS:
            raise ValueError(f"{name} must look like '512MiB' or '5GB', got {size!r}")
        size = int(float(match[1]) * _UNITS[match[2]])
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise ValueError(f"{name} must be a positive size, got {size!r}")
    return size


@dataclass(frozen=True)
class Budget:
    """How the memory is spent: threads, elements that each reads at once, bytes kept between passes."""

    threads: int
    chunk: int
    cache: int
    peak: int


def plan_memory(
    max_memory: int, threads: int | None, models: int, outputs: int, width: int
) -> Budget:
    """Fit threads and chunks into the memory.

    Args:
        max_memory: bytes above the interpreter.
        threads: wish, None for the cores at hand (at most 4).
        models: number of models.
        outputs: results that are written at once.
        width: bytes of the widest element.

    Raises:
        ValueError: it is too little even for one thread and the smallest chunk.
    """
    if threads is not None and (isinstance(threads, bool) or threads < 1):
        raise ValueError(f"threads must be at least 1, got {threads!r}")
    wish = threads or min(4, _cores())
    compute = max(width, 4)
    # of one selection for each model: histograms of both kinds, and elements kept to find ties
    selection = (models + 1) * (WIDEST * 8 + KEPT * 12 + 65536 * 8 * 3)

    def need(count: int, chunk: int) -> int:
        cells = CELL * compute * (3 * models + 24)
        return _MARGIN + selection + count * (cells + chunk * width * (models + 1 + outputs))

    options = [
        (count, chunk)
        for count in range(wish, 0, -1)
        for chunk in (_LARGEST_CHUNK, _LARGEST_CHUNK // 4, 2 * CELL, CELL)
    ]
    for count, chunk in options:
        if need(count, chunk) <= max_memory:
            spare = max_memory - need(count, chunk)
            return Budget(count, chunk, spare * 3 // 4, need(count, chunk))
    least = need(1, CELL)
    raise ValueError(
        f"max_memory must be at least {least / _MIB:.0f} MiB for {models} models, "
        f"got {max_memory / _MIB:.0f} MiB"
    )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def physical_memory() -> int | None:
    """Return the machine's memory in bytes, where it can be asked."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def shards(engine: Engine, shard_size: int) -> list[Layout]:
    """Distribute the results over files of at most `shard_size`, in order of names."""
    groups: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for entry in engine.entries.values():
        info = TensorInfo(engine.output_dtype(entry), entry.info.shape)
        if groups[-1] and filled + info.nbytes > shard_size:
            groups.append({})
            filled = 0
        groups[-1][entry.name] = info
        filled += info.nbytes
    return [layout(group) for group in groups]


@dataclass(frozen=True)
class MergePlan:
    """What `merge_files` would do.

    Attributes:
        passes: names of the data passes, the last one writes. A sample that misleads, or too many equal
            magnitudes at a threshold, add some.
        bytes_per_pass: bytes that each pass reads.
        bytes_written: bytes of all results.
        peak_memory: bytes above the interpreter that the engine may hold.
        threads: worker threads.
        shards: files of each result.
    """

    passes: tuple[str, ...]
    bytes_per_pass: int
    bytes_written: int
    peak_memory: int
    threads: int
    shards: int

    def __str__(self) -> str:
        """Return the plan as a table."""
        total = self.bytes_per_pass * len(self.passes)
        return "\n".join(
            [
                f"passes       {len(self.passes)} ({', '.join(self.passes)})",
                f"read         {total / 1e9:.3f} GB ({self.bytes_per_pass / 1e9:.3f} GB a pass)",
                f"written      {self.bytes_written / 1e9:.3f} GB in {self.shards} file(s)",
                f"peak memory  {self.peak_memory / _MIB:.0f} MiB above the interpreter",
                f"threads      {self.threads}",
            ]
        )


def passes(method: Merge, scaling: Scaling, models: int) -> tuple[str, ...]:
    """Name the data passes of a merge."""
    closed = getattr(method, "closed_alpha", lambda _: None)(models)
    names = [f"statistics {i + 1}" for i in range(method.passes)]
    if scaling.lines and scaling.alpha == "auto" and closed is None:
        names.append("norms")
    return (*names, "write")


def written(layouts: Sequence[Layout]) -> int:
    """Return the bytes of one result."""
    return sum(item.size for item in layouts)
