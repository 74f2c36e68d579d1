"""Which block outputs each depth-weighted average reads: the index sets S_i of the paper."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

PATTERNS = ("dilated", "last_k", "final", "mask")


def check_int(name: str, value: object) -> int:
    """Return ``value`` if it is an int of at least 1; raise with the argument's name otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _check_mask(mask: Tensor, depth: int) -> tuple[tuple[int, ...], ...]:
    """Return the sources of each depth from a boolean mask (depth, depth + 1)."""
    import torch

    if mask.dtype != torch.bool or tuple(mask.shape) != (depth, depth + 1):
        raise ValueError(
            f"a pattern mask must be boolean of shape ({depth}, {depth + 1}), row i - 1 for depth i; "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    found = []
    for i, line in enumerate(mask.tolist(), start=1):
        sources = tuple(j for j, kept in enumerate(line) if kept)
        if sources and sources[-1] > i:
            raise ValueError(
                f"mask row {i} reads X_{sources[-1]}, which does not exist before depth {i + 1}"
            )
        if sources and sources[-1] != i:
            raise ValueError(f"mask row {i} must include its diagonal, X_{i}, or be empty")
        found.append(sources)
    return tuple(found)


@dataclass(frozen=True)
class Geometry:
    """The index sets of a k × p DenseFormer and of the paper's sparsity patterns.

    With depth d, dilation k and period p (paper, section 3), the row of depth i exists where p divides
    i and reads ``S_i = {j : 0 <= j <= i, j = i (mod k)}``; the embedding is number 0. Other patterns:
    ``"last_k"`` (every row reads X_0 and the last K of X_1..X_i), ``"final"`` (one row, after the last
    block, over everything), or a boolean mask (d, d + 1) whose non-empty rows include their diagonal.
    ``groups=g`` is the variant of the authors' experiment code: only every g-th output is stored, and
    dilation and period count in groups.

    Raises:
        TypeError: an argument is not an int (a bool is none).
        ValueError: below 1, an unknown pattern, a bad mask, or groups that do not divide the depth.

    >>> g = Geometry(48, dilation=4, period=5)
    >>> g.nnz, g.rows[:3], g.sources(10)
    (62, (5, 10, 15), (2, 6, 10))
    """

    depth: int
    dilation: int = 1
    period: int = 1
    pattern: str = "dilated"
    last_k: int = 4
    groups: int = 1
    mask: tuple[tuple[int, ...], ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("depth", "dilation", "period", "last_k", "groups"):
            check_int(name, getattr(self, name))
        if self.pattern not in PATTERNS:
            raise ValueError(
                f"pattern must be 'dilated', 'last_k', 'final' or a boolean mask, got {self.pattern!r}"
            )
        if (self.pattern == "mask") != (self.mask is not None):
            raise ValueError("pass the boolean mask itself as `pattern`")
        if self.pattern != "dilated" and (self.dilation, self.period, self.groups) != (1, 1, 1):
            raise ValueError(
                f"dilation, period and groups belong to pattern='dilated', not to {self.pattern!r}"
            )
        if self.depth % self.groups:
            raise ValueError(f"groups={self.groups} does not divide depth={self.depth}")

    @classmethod
    def build(
        cls,
        depth: int,
        dilation: int = 1,
        period: int = 1,
        pattern: str | Tensor = "dilated",
        last_k: int = 4,
        groups: int = 1,
    ) -> Geometry:
        """Make a geometry; ``pattern`` may be a boolean mask tensor (depth, depth + 1)."""
        if isinstance(pattern, Tensor):
            mask = _check_mask(pattern, check_int("depth", depth))
            return cls(depth, dilation, period, "mask", last_k, groups, mask)
        return cls(depth, dilation, period, pattern, last_k, groups)

    def sources(self, i: int) -> tuple[int, ...]:
        """Return S_i in ascending order; empty where depth i (1-based) has no average."""
        if not 1 <= i <= self.depth:
            raise ValueError(f"i must be a depth from 1 to {self.depth}, got {i}")
        if self.mask is not None:
            return self.mask[i - 1]
        if self.pattern == "final":
            return tuple(range(i + 1)) if i == self.depth else ()
        if self.pattern == "last_k":
            return (0, *range(max(1, i - self.last_k + 1), i + 1))
        g, (m, rest) = self.groups, divmod(i, self.groups)
        if rest or m % self.period:
            return ()
        return tuple(g * j for j in range(m % self.dilation, m + 1, self.dilation))

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """Depths (1-based) that have an average."""
        return tuple(i for i in range(1, self.depth + 1) if self.sources(i))

    @cached_property
    def nnz(self) -> int:
        """Number of weights; d(d + 3)/2 for the full 1 × 1 DenseFormer."""
        return sum(len(self.sources(i)) for i in self.rows)

    @cached_property
    def sparsity(self) -> float:
        """Share of the full DenseFormer's weights that this geometry leaves out."""
        return 1 - self.nnz / (self.depth * (self.depth + 3) / 2)

    def live(self, i: int) -> tuple[int, ...]:
        """Return the X_j, j <= i, that some row deeper than i reads."""
        later = {j for m in self.rows if m > i for j in self.sources(m)}
        return tuple(j for j in range(i + 1) if j in later)

    def pending(self, i: int) -> tuple[int, ...]:
        """Return the rows deeper than i that read any X_j, j <= i."""
        return tuple(m for m in self.rows if m > i and self.sources(m)[0] <= i)

    def code(self) -> list[int]:
        """Return the seven integers stored in a state dict: format, d, k, p, groups, pattern, last_k.

        For a mask the last is a checksum of it.
        """
        last = zlib.crc32(repr(self.mask).encode()) if self.mask is not None else self.last_k
        kind = PATTERNS.index(self.pattern)
        return [1, self.depth, self.dilation, self.period, self.groups, kind, last]

    def __str__(self) -> str:
        name = f"{self.dilation}x{self.period}" if self.pattern == "dilated" else self.pattern
        name += f", last_k={self.last_k}" if self.pattern == "last_k" else ""
        name += f", groups={self.groups}" if self.groups > 1 else ""
        return f"{name}, depth {self.depth}, {len(self.rows)} rows, {self.nnz} weights"


def describe_code(code: list[int]) -> str:
    """Describe a stored geometry in words, for error messages."""
    if len(code) != 7 or code[0] != 1 or not 0 <= code[5] < len(PATTERNS):
        return f"unknown format {code}"
    _, depth, k, p, groups, kind, last = code
    pattern = PATTERNS[kind]
    extra = f", {'checksum' if pattern == 'mask' else 'last_k'}={last}" if kind in (1, 3) else ""
    return f"depth={depth}, dilation={k}, period={p}, groups={groups}, pattern={pattern!r}{extra}"
