"""How the averages of one network are computed: rows, groups of rows, and what is alive when.

The unit of cost is N, one representation read or written once. Row after row ("pull"), the full
DenseFormer of depth d moves about d²/2 of them. Grouping s consecutive rows, and computing what the
older representations contribute to all s in one product, moves about d²/(2s) + ds/2, so that the best
s grows as √d and the cost as d^1.5. The plan chooses s by counting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from denseformer.core.geometry import Geometry


@dataclass(frozen=True)
class Row:
    """One average: the columns it reads, and the columns that it is the first row to come after."""

    index: int
    sources: tuple[int, ...]
    owned: tuple[int, ...]  # appeared since the last row and read by this row or a later one
    inside: tuple[int, ...]  # the sources that its group owns, the last of `sources`
    done: tuple[int, ...]  # columns that nothing needs after it
    offset: int  # of its first weight in the packed vector
    group: int
    slot: int  # position of owned[0] among the columns of its group


@dataclass(frozen=True)
class Group:
    """Consecutive rows ``start <= r < stop``: older columns reach them through one product."""

    start: int
    stop: int
    cols: tuple[int, ...]  # owned by its rows
    old: tuple[int, ...]  # owned by rows of earlier groups and read here


@dataclass(frozen=True)
class Plan:
    """The schedule of a run.

    Columns are representations in order of appearance: the first ``first`` are there at the start (the
    embedding), then one per block. ``row_at[i]`` is the row after block i; rows beyond the last block
    (``tail``) are partial sums that a pipeline stage hands on.
    """

    depth: int
    first: int
    sources: tuple[tuple[int, ...], ...]
    steps: tuple[int, ...]  # block after which each row is computed; depth + 1 for the tail
    size: int  # rows of a group
    keep: tuple[int, ...] = ()  # columns that the next pipeline stage wants
    payload: tuple[
        int, ...
    ] = ()  # rows for the next stage; -1 is a partial sum passed on as it came

    def __post_init__(self) -> None:
        _ = self.rows, self.row_at, self.tail  # known before torch.compile traces a run

    def __deepcopy__(self, memo: object) -> Plan:
        return self

    @cached_property
    def columns(self) -> int:
        """Number of columns."""
        return self.first + self.depth

    @cached_property
    def nnz(self) -> int:
        """Number of weights."""
        return sum(map(len, self.sources))

    @cached_property
    def last_reader(self) -> tuple[int, ...]:
        """Index of the last row that reads a column, -1 where none does."""
        found = [-1] * self.columns
        for r, sources in enumerate(self.sources):
            for c in sources:
                found[c] = r
        return tuple(found)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """All rows in order."""
        made: list[Row] = []
        seen = offset = slot = start = 0
        several, last = self.size < len(self.sources), len(self.sources) - 1
        for r, (sources, step) in enumerate(zip(self.sources, self.steps, strict=True)):
            known = self.first + min(step, self.depth)
            owned = tuple(c for c in range(seen, known) if self.last_reader[c] >= r)
            if r % self.size == 0:
                slot, start = 0, seen
            inside = tuple(c for c in sources if c >= start)
            end = r if r % self.size == self.size - 1 or r == last else -1
            # a group's last row saves all of its columns, so they stay until then
            done = tuple(
                c
                for c in range(known)
                if c not in self.keep
                and (
                    (self.last_reader[c] <= r and (c < start or not several))
                    or self.last_reader[c] <= end
                )
            )
            made.append(Row(r, sources, owned, inside, done, offset, r // self.size, slot))
            seen, offset, slot = known, offset + len(sources), slot + len(owned)
        return tuple(made)

    @cached_property
    def readers(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each column the rows that read it, and the positions of their weights for it."""
        found: list[list[tuple[int, int]]] = [[] for _ in range(self.columns)]
        for row in self.rows:
            for n, c in enumerate(row.sources):
                found[c].append((row.index, row.offset + n))
        return tuple(map(tuple, found))

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All groups in order."""
        made = []
        for start in range(0, len(self.rows), self.size):
            part = self.rows[start : start + self.size]
            cols = tuple(c for row in part for c in row.owned)
            read = {c for row in part for c in row.sources}
            made.append(Group(start, start + len(part), cols, tuple(sorted(read - set(cols)))))
        return tuple(made)

    @cached_property
    def row_at(self) -> dict[int, Row]:
        """Row of each block that has one."""
        return {s: row for s, row in zip(self.steps, self.rows, strict=True) if s <= self.depth}

    @cached_property
    def tail(self) -> tuple[Row, ...]:
        """Rows beyond the last block."""
        return tuple(r for s, r in zip(self.steps, self.rows, strict=True) if s > self.depth)

    @cached_property
    def width(self) -> int:
        """Columns of the widest group that has later rows: the room for its partial gradients."""
        return max((len(g.cols) for g in self.groups[:-1]), default=0)

    @cached_property
    def traffic(self) -> int:
        """Representations read and written by the averages of one forward pass."""
        total = 0
        for group in self.groups:
            rows = group.stop - group.start
            total += len(group.old) + 2 * rows * bool(group.old) + rows
            old = set(group.old)
            total += sum(
                c not in old for row in self.rows[group.start : group.stop] for c in row.sources
            )
        return total

    @cached_property
    def switch(self) -> int:
        """Block after which partial sums of the future rows are fewer than the columns they replace."""
        for i in range(self.depth + 1):
            known = self.first + i
            rows = [s for s, at in zip(self.sources, self.steps, strict=True) if at > i]
            live = {c for s in rows for c in s if c < known}
            if sum(s[0] < known for s in rows) < len(live):
                return i
        return self.depth + 1

    def positions(self, device: torch.device) -> Tensor:
        """Return where each packed weight stands in the flattened dense matrix (rows, columns)."""
        return _positions(self.sources, self.columns, device)


@lru_cache(maxsize=256)
def _positions(sources: tuple[tuple[int, ...], ...], columns: int, device: torch.device) -> Tensor:
    flat = [r * columns + c for r, row in enumerate(sources) for c in row]
    with torch.inference_mode(False):
        return torch.tensor(flat, dtype=torch.long, device=device)


def best_plan(
    depth: int,
    first: int,
    sources: Sequence[Sequence[int]],
    steps: Sequence[int],
    keep: Sequence[int] = (),
    payload: Sequence[int] = (),
) -> Plan:
    """Return the plan with the group size of least traffic, or plain pull (one group) if that costs less.

    For the comparison an old column counts four times: it is also written to a buffer, read from it, and
    multiplied by the zeros of a dilated geometry (measured; pull reads only what a row needs).
    """
    args = (depth, first, tuple(map(tuple, sources)), tuple(steps))
    sizes = [s for s in range(2, len(steps)) if s * s <= 4 * len(steps)]
    ends = (tuple(keep), tuple(payload))
    whole = Plan(*args, max(len(steps), 1), *ends)
    blocked = min((Plan(*args, s, *ends) for s in sizes), key=lambda p: p.traffic, default=whole)
    old = sum(len(group.old) for group in blocked.groups)
    return blocked if blocked.traffic + 3 * old < whole.traffic else whole


@lru_cache(maxsize=64)
def plan_of(geometry: Geometry) -> Plan:
    """Return the plan of a whole network.

    >>> plan = plan_of(Geometry(48))
    >>> plan.size, plan.traffic, plan_of(Geometry(48, 4, 5)).traffic
    (8, 477, 71)
    """
    sources = [geometry.sources(i) for i in geometry.rows]
    return best_plan(geometry.depth, 1, sources, geometry.rows)
