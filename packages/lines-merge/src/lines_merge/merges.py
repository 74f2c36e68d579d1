"""Merge functions g: task vectors of T models in, one merged task vector out, a cell at a time."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from .cells import Cell, CellFunction, Entry, Sums, magnitude_sum
from .noise import uniform_words
from .schedule import NUMBER
from .select import Cut, cuts, keep_count

Weight = float | Sequence[float]


class Stats(Protocol):
    """What a merge may ask of the whole model before it is applied: passes over all cells."""

    entries: dict[str, Entry]
    keys: list[str]
    passes: int

    @property
    def num_models(self) -> int:
        """Number of models."""
        ...

    def scan(
        self, function: CellFunction, names: Sequence[str] | None = None, *, sample: int = 1
    ) -> None:
        """Call a function on every cell, from several threads; sums must not depend on the order.

        With `sample` above 1 it sees the first n-th of every cell only.
        """
        ...

    def scan_cell(self, function: CellFunction, name: str, start: int) -> None:
        """Call a function on the one cell of a tensor that starts there."""
        ...

    def hold(self, names: Sequence[str] | None = None) -> AbstractContextManager[bool]:
        """Keep the inputs of some tensors in memory between passes, if there is room."""
        ...

    def merged(self) -> list[Entry]:
        """Return the tensors with arithmetic, in flat order."""
        ...

    def compute_dtype(self, entry: Entry) -> torch.dtype:
        """Return the dtype of the arithmetic for one tensor."""
        ...


@runtime_checkable
class Merge(Protocol):
    """A merge function.

    Attributes:
        passes: data passes that `prepare` takes, as far as they are known beforehand.
    """

    passes: int

    def prepare(self, stats: Stats) -> None:
        """Gather global statistics; called once before any cell is merged."""
        ...

    def __call__(self, base: Tensor, deltas: Tensor, ctx: Cell) -> Tensor:
        """Return the merged task vector of one cell.

        Args:
            base: base weights, (n,).
            deltas: task vectors, (models, n); may be overwritten.
            ctx: the tensor's name, the cell's position, keys of the models, scratch buffers.

        Returns:
            (n,), in the dtype of `deltas`. Called from several threads at once.
        """
        ...


class BaseMerge:
    """Defaults for a merge without statistics."""

    passes = 0

    def prepare(self, stats: Stats) -> None:
        """Nothing to gather."""

    def closed_alpha(self, num_models: int) -> float | None:
        """Return the norm ratio of alpha (Eq. 2) where it is known without a pass."""
        return None

    def norms(self, stats: Stats, norm: int) -> tuple[float, float]:
        """Return the sums of ``|x|^norm`` over the sum of the task vectors and over the merged one."""
        sums = Sums(2)

        def measure(cell: Cell) -> None:
            total = magnitude_sum(add_up(cell.deltas, cell.scratch(0)), norm, cell.scratch(1))
            merged = self(cell.base, cell.deltas, cell)
            sums.add(cell.name, total, magnitude_sum(merged, norm, cell.scratch(1)))

        stats.scan(measure)
        total, merged = sums.totals()
        return total, merged

    def unresolved(self) -> list[str]:
        """Return tensors that have to be merged once more, now that statistics are complete."""
        return []

    def __call__(self, base: Tensor, deltas: Tensor, ctx: Cell) -> Tensor:
        """Return the merged task vector of one cell."""
        raise TypeError(f"{type(self).__name__} does not say how to merge")


def add_up(deltas: Tensor, out: Tensor) -> Tensor:
    """Sum the rows from first to last, one rounding a step; a single row is returned as it is."""
    if len(deltas) == 1:
        return deltas[0]
    torch.add(deltas[0], deltas[1], out=out)
    for row in deltas[2:]:
        out.add_(row)
    return out


def at_depth(value: Weight, depth: float) -> float:
    """Return a weight at a relative depth; a list is a gradient, interpolated linearly.

    >>> at_depth([0.0, 1.0, 0.5], 0.75)
    0.75
    """
    if isinstance(value, NUMBER):
        return float(value)
    place = depth * (len(value) - 1)
    low = min(int(place), max(len(value) - 2, 0))
    high = min(low + 1, len(value) - 1)
    return value[low] + (value[high] - value[low]) * (place - low)


def check_weights(weights: Sequence[Weight] | None) -> Sequence[Weight] | None:
    """Raise ValueError unless every weight, or member of a gradient, is a finite number."""
    if weights is None:
        return None
    weights = list(weights)  # an array, too
    for weight in weights:
        values = [weight] if isinstance(weight, NUMBER) else list(weight)
        if not values or not all(math.isfinite(value) for value in values):
            raise ValueError(f"weights must be finite numbers or lists of them, got {weight!r}")
    return weights


def check_density(density: float, name: str = "density") -> float:
    """Raise ValueError unless a fraction was given."""
    if not isinstance(density, float | int) or not 0 < density <= 1:
        raise ValueError(
            f"{name} must be a fraction in (0, 1], got {density!r}; 20 percent is {name}=0.2"
        )
    return float(density)


def apply_weights(weights: Sequence[Weight] | None, deltas: Tensor, ctx: Cell) -> list[float]:
    """Multiply each row by its weight, in place; return the weights at this depth."""
    if weights is None:
        return [1.0] * len(deltas)
    values = [at_depth(weight, ctx.depth) for weight in weights]
    for row, value in zip(deltas, values, strict=True):
        if value != 1:
            row.mul_(value)
    return values


def require_count(weights: Sequence[Any] | None, stats: Stats, name: str = "weights") -> None:
    """Raise ValueError unless there is one item for each model."""
    if weights is not None and len(weights) != stats.num_models:
        raise ValueError(f"{name} has {len(weights)} items for {stats.num_models} models")


class TaskArithmetic(BaseMerge):
    """Sum of the task vectors, `sum_t w_t tau_t` (Ilharco et al. 2023).

    Args:
        weights: one number w_t for each model (default 1), or a list of numbers: a gradient over depth.
    """

    def __init__(self, weights: Sequence[Weight] | None = None) -> None:
        self.weights = check_weights(weights)

    def prepare(self, stats: Stats) -> None:
        """Check the number of weights."""
        require_count(self.weights, stats)

    def closed_alpha(self, num_models: int) -> float | None:
        """Return 1/T if every weight is 1."""
        ones = self.weights is None or all(weight == 1 for weight in self.weights)
        return 1 / num_models if ones else None

    def __call__(self, base: Tensor, deltas: Tensor, ctx: Cell) -> Tensor:
        """Add up."""
        apply_weights(self.weights, deltas, ctx)
        return add_up(deltas, ctx.scratch(0))


class Average(BaseMerge):
    """Mean of the task vectors: the average of the models."""

    def closed_alpha(self, num_models: int) -> float | None:
        """Return 1: the merged vector is the average itself."""
        return 1.0

    def __call__(self, base: Tensor, deltas: Tensor, ctx: Cell) -> Tensor:
        """Add up and divide by the number of models."""
        total = add_up(deltas, ctx.scratch(0))
        return total if len(deltas) == 1 else total.div_(len(deltas))


class Trim:
    """Keep the largest entries of every task vector.

    Args:
        density: fraction of entries that is kept, in (0, 1].
        scope: "global" ranks all parameters together, "tensor" each tensor on its own.
        compat: "reference" keeps everything not below the entry of rank floor(density * n) + 1, as the
            authors' code does; None keeps exactly floor(density * n), earlier entries first.
        drop: changes the deltas before they are ranked (DARE).
    """

    def __init__(
        self,
        density: float,
        scope: str = "global",
        compat: str | None = None,
        drop: Callable[[Cell], None] | None = None,
    ) -> None:
        self.density = check_density(density)
        if scope not in {"global", "tensor"}:
            raise ValueError(f"scope must be 'global' or 'tensor', got {scope!r}")
        if compat not in {None, "reference"}:
            raise ValueError(f"compat must be None or 'reference', got {compat!r}")
        self.scope, self.compat, self.drop = scope, compat, drop
        self.cuts: dict[str, list[Cut]] = {}

    @property
    def passes(self) -> int:
        """One, after a sample of the parameters; a sample that misleads takes two more."""
        return int(self.density < 1)

    def prepare(self, stats: Stats) -> None:
        """Find the cuts."""
        self.cuts = {}
        if self.density == 1:
            return
        entries = stats.merged()
        if self.scope == "global":
            found = self._cuts(stats, sum(entry.info.numel for entry in entries), None)
            self.cuts = {entry.name: found for entry in entries}
            return
        for entry in entries:
            with stats.hold([entry.name]):
                self.cuts[entry.name] = self._cuts(stats, entry.info.numel, [entry.name])
        stats.passes += 1

    def _cuts(self, stats: Stats, numel: int, names: Sequence[str] | None) -> list[Cut]:
        reference = self.compat == "reference"
        rank = int(numel * self.density) + 1 if reference else keep_count(numel, self.density)
        ranks = [rank] * stats.num_models
        return cuts(stats, ranks, names=names, transform=self.drop, keep_ties=reference)

    def __call__(self, deltas: Tensor, ctx: Cell) -> None:
        """Trim a cell, in place."""
        if self.drop is not None:
            self.drop(ctx)
        if self.cuts:
            for cut, row in zip(self.cuts[ctx.name], deltas, strict=True):
                cut.apply(ctx.name, ctx.start, row)


class Magnitude(BaseMerge):
    """Sum of the task vectors, each with its largest entries only (magnitude masking).

    Args:
        density: fraction of entries that is kept, in (0, 1].
        scope: see `Trim`.
        compat: see `Trim`.
        weights: see `TaskArithmetic`.
    """

    def __init__(
        self,
        density: float = 0.2,
        *,
        scope: str = "global",
        compat: str | None = None,
        weights: Sequence[Weight] | None = None,
    ) -> None:
        self.trim = Trim(density, scope, compat)
        self.weights = check_weights(weights)
        self.passes = self.trim.passes

    def prepare(self, stats: Stats) -> None:
        """Find the cuts."""
        require_count(self.weights, stats)
        self.trim.prepare(stats)

    def __call__(self, base: Tensor, deltas: Tensor, ctx: Cell) -> Tensor:
        """Trim and add up."""
        self.trim(deltas, ctx)
        apply_weights(self.weights, deltas, ctx)
        return add_up(deltas, ctx.scratch(0))


class Drop:
    """DARE's random drop (Yu et al. 2024): entries vanish with probability p, survivors grow by 1/(1-p).

    Args:
        p: probability, in [0, 1).
        seed: of the counter-based generator; the result depends on (seed, model, tensor, index) alone.
    """

    def __init__(self, p: float, seed: int) -> None:
        if not isinstance(p, float | int) or not 0 <= p < 1:
            raise ValueError(f"p must be a probability in [0, 1), got {p!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an integer, got {seed!r}")
        self.p, self.seed = float(p), seed

    def __call__(self, ctx: Cell) -> None:
        """Drop and rescale, in place."""
        if self.p == 0:
            return
        bound = np.uint64(round(self.p * 2**32))
        for key, row in zip(ctx.keys, ctx.deltas, strict=True):
            words = uniform_words(self.seed, key, ctx.name, ctx.start, ctx.size)
            row.mul_(torch.from_numpy(words >= bound))
            row.mul_(1 / (1 - self.p))


class Dare(BaseMerge):
    """DARE followed by task arithmetic.

    Args:
        p: see `Drop`.
        seed: see `Drop`.
        weights: see `TaskArithmetic`.
    """

    def __init__(
        self, p: float = 0.9, *, seed: int = 0, weights: Sequence[Weight] | None = None
    ) -> None:
        self.drop = Drop(p, seed)
        self.weights = check_weights(weights)

    def prepare(self, stats: Stats) -> None:
        """Check the number of weights."""
        require_count(self.weights, stats)

    def __call__(self, base: Tensor, deltas: Tensor, ctx: Cell) -> Tensor:
        """Drop and add up."""
        self.drop(ctx)
        apply_weights(self.weights, deltas, ctx)
        return add_up(deltas, ctx.scratch(0))


_REGISTRY: dict[str, Callable[..., Merge]] = {}


def register_merge(name: str, factory: Callable[..., Merge]) -> None:
    """Make a merge function available by name.

    Args:
        name: what callers pass as `method`.
        factory: called with the method's keyword arguments, returns a `Merge`.

    Example:
        >>> class Median(BaseMerge):
        ...     def __call__(self, base, deltas, ctx):
        ...         return deltas.median(dim=0).values
        >>> register_merge("median", Median)
    """
    _REGISTRY[name] = factory


def make_merge(method: str | Merge, **arguments: Any) -> Merge:
    """Return the merge that a name stands for, or the given one.

    Raises:
        ValueError: unknown name.
        TypeError: an argument that this method does not take.
    """
    if isinstance(method, str):
        if method not in _REGISTRY:
            raise ValueError(f"unknown method {method!r}; allowed: {', '.join(sorted(_REGISTRY))}")
        factory = _REGISTRY[method]
        allowed = inspect.signature(factory).parameters
        wrong = sorted(set(arguments) - {name for name in allowed if not name.startswith("_")})
        if wrong and not any(p.kind is p.VAR_KEYWORD for p in allowed.values()):
            takes = ", ".join(name for name in allowed if not name.startswith("_")) or "none"
            raise TypeError(
                f"method {method!r} takes no {', '.join(wrong)}; its arguments: {takes}"
            )
        return factory(**arguments)
    if not isinstance(method, Merge):
        raise TypeError(f"method must be a name or a Merge, got {type(method).__name__}")
    if arguments:
        raise TypeError(f"arguments {sorted(arguments)} need a method given by name")
    return method


register_merge("average", Average)
register_merge("task_arithmetic", TaskArithmetic)
register_merge("magnitude", Magnitude)
register_merge("dare", Dare)
