"""TIES-Merging (Yadav et al. 2023): trim, elect signs, merge what agrees; and Consensus masks (Wang 2024)."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .cells import Cell, Sums, magnitude_sum
from .merges import (
    BaseMerge,
    Drop,
    Stats,
    TaskArithmetic,
    Trim,
    Weight,
    add_up,
    apply_weights,
    check_weights,
    register_merge,
    require_count,
)


class Ties(BaseMerge):
    """Trim each task vector, elect a sign for every entry, merge the entries of that sign.

    The elected sign is that of the sum of the trimmed task vectors; where this sum is exactly zero it is
    the majority among the signs of all parameters.

    Args:
        density: fraction of entries of each task vector that is kept, in (0, 1].
        merge: "mean" of the kept entries, "sum", or "max" (the largest magnitude, with the elected sign).
        scope: see `merges.Trim`.
        compat: see `merges.Trim`.
        weights: one for each model, applied between trimming and electing; the mean is then weighted.
    """

    def __init__(
        self,
        density: float = 0.2,
        *,
        merge: str = "mean",
        scope: str = "global",
        compat: str | None = None,
        weights: Sequence[Weight] | None = None,
        _drop: Drop | None = None,
    ) -> None:
        if merge not in {"mean", "sum", "max"}:
            raise ValueError(f"merge must be 'mean', 'sum' or 'max', got {merge!r}")
        self.merge = merge
        self.trim = Trim(density, scope, compat, _drop)
        self.weights = check_weights(weights)
        self.passes = self.trim.passes
        self._majority: int | None = None
        self._reset()

    def _reset(self) -> None:
        self._signs = 0
        self._open: set[str] = set()
        self._lock = threading.Lock()

    def prepare(self, stats: Stats) -> None:
        """Find the cuts."""
        require_count(self.weights, stats)
        self._majority = None
        self._reset()
        self.trim.prepare(stats)

    def norms(self, stats: Stats, norm: int) -> tuple[float, float]:
        """Measure under both hypotheses about the majority sign, which the same pass finds."""
        sums = Sums(4)

        def measure(cell: Cell) -> None:
            total = magnitude_sum(add_up(cell.deltas, cell.scratch(0)), norm, cell.scratch(1))
            values, weights = self._trimmed(cell)
            elected = add_up(values, cell.scratch(2))
            merged, cancels = self._record(values, weights, elected, cell)
            plus = minus = 0.0
            measured = magnitude_sum(merged, norm, cell.scratch(4))
            if cancels:
                zeros = elected == 0
                part = merged[zeros]
                plus = magnitude_sum(part, norm, torch.empty_like(part))
                part = self._disjoint(values, weights, elected, -1, cell)[zeros]
                minus = magnitude_sum(part, norm, torch.empty_like(part))
            sums.add(cell.name, total, measured, plus, minus)

        stats.scan(measure)
        self.unresolved()
        total, merged, plus, minus = sums.totals()
        if self._majority == 0 and self.merge == "max":
            return total, merged - plus
        return total, merged if self._majority == 1 else merged - plus + minus

    def settle(self, stats: Stats) -> None:
        """Find the majority sign in a pass of its own."""

        def look(cell: Cell) -> None:
            values, weights = self._trimmed(cell)
            self._record(values, weights, add_up(values, cell.scratch(2)), cell)

        stats.scan(look)
        self.unresolved()

    def unresolved(self) -> list[str]:
        """Settle the majority sign; return the tensors that were merged before it was known."""
        if self._majority is not None:
            return []
        self._majority = (self._signs > 0) - (self._signs < 0)
        return sorted(self._open) if self._majority != 1 else []

    def __call__(self, base: Tensor, deltas: Tensor, ctx: Cell) -> Tensor:
        """Trim, elect, merge."""
        values, weights = self._trimmed(ctx)
        elected = add_up(values, ctx.scratch(2))
        if self._majority is None:
            return self._record(values, weights, elected, ctx)[0]
        return self._disjoint(values, weights, elected, self._majority, ctx)

    def _trimmed(self, ctx: Cell) -> tuple[Tensor, list[float]]:
        self.trim(ctx.deltas, ctx)
        return ctx.deltas, apply_weights(self.weights, ctx.deltas, ctx)

    def _record(
        self, values: Tensor, weights: list[float], elected: Tensor, ctx: Cell
    ) -> tuple[Tensor, bool]:
        """Merge as if the majority were positive; count signs; return whether a sum cancels anywhere.

        Where nothing cancels, a zero sum means that nothing was kept, and the merged entry is zero, too.
        """
        merged = self._agreeing(values, weights, elected, 1, ctx)
        zeros = int(np.count_nonzero(elected.numpy() == 0))
        cancels = int(np.count_nonzero(merged.numpy() == 0)) < zeros
        signs = int(ctx.scratch(3).sum().item()) - zeros
        with self._lock:
            self._signs += signs
            if cancels:
                self._open.add(ctx.name)
        return self._signed(merged, weights, elected, 1, ctx), cancels

    def _disjoint(
        self, values: Tensor, weights: list[float], elected: Tensor, majority: int, ctx: Cell
    ) -> Tensor:
        """Merge the entries that have the elected sign; `majority` decides where `elected` is zero."""
        merged = self._agreeing(values, weights, elected, majority, ctx)
        return self._signed(merged, weights, elected, majority, ctx)

    def _agreeing(
        self, values: Tensor, weights: list[float], elected: Tensor, majority: int, ctx: Cell
    ) -> Tensor:
        """Add up (or take the maximum of) the magnitudes of the entries that have the elected sign.

        With s the elected sign, s * tau is positive for the entries that are kept, so that clamping at
        zero drops the others. Adding +0 turns a sum of -0 into +0 before its sign is taken.
        """
        sign, part = ctx.scratch(3), ctx.scratch(4)
        if majority > 0:
            torch.add(elected, 0.0, out=part)
            torch.copysign(ctx.scratch(5).fill_(1), part, out=sign)
        else:
            torch.neg(elected, out=part).add_(0.0)
            torch.copysign(ctx.scratch(5).fill_(1), part, out=sign).neg_()
        merged, count = ctx.scratch(0), ctx.scratch(1)
        for index, (row, weight) in enumerate(zip(values, weights, strict=True)):
            kept = torch.mul(row, sign, out=part if index else merged).clamp_min_(0)
            if self.merge == "max":
                torch.maximum(merged, kept, out=merged)
            elif index:
                merged.add_(kept)
            if self.merge == "mean":
                hit = torch.sign(kept, out=ctx.scratch(5) if index else count)
                if weight != 1:
                    hit.mul_(abs(weight))
                if index:
                    count.add_(hit)
        return merged

    def _signed(
        self, merged: Tensor, weights: list[float], elected: Tensor, majority: int, ctx: Cell
    ) -> Tensor:
        """Turn the sum into the mean where that is asked for, and give it its sign back."""
        sign, count = ctx.scratch(3), ctx.scratch(1)
        if self.merge == "mean":
            least = min((abs(weight) for weight in weights if weight), default=1.0)
            merged.div_(count.clamp_min_(least))
        if self.merge == "max" and majority == 0:
            sign.mul_(elected != 0)
        return merged.mul_(sign)


def tall_mask(delta: Tensor, merged: Tensor, threshold: float, out: Tensor) -> Tensor:
    """Return m = 1[|tau_t| > lambda_t |tau_MTL - tau_t|], where a task relies on its own weights.

    The published form compares |theta_0 - theta_t| with |theta_MT - theta_t|; with
    theta_MT = theta_0 + tau_MTL these are the same differences.

    Args:
        delta: task vector tau_t, (n,).
        merged: merged task vector tau_MTL, (n,).
        threshold: lambda_t.
        out: scratch, (n,).
    """
    torch.sub(merged, delta, out=out).abs_().mul_(threshold)
    return delta.abs() > out


class Consensus(BaseMerge):
    """Keep the merged entries that at least k tasks rely on (Wang et al. 2024).

    Args:
        k: number of TALL masks that must hold an entry: 2 drops what no task or a single one uses, 0 keeps
            everything, more than the number of models leaves the base.
        lambdas: threshold lambda_t of the masks, one number or one for each model.
        inner: the merge that is masked.
    """

    def __init__(
        self, k: int, lambdas: float | Sequence[float], inner: TaskArithmetic | Ties
    ) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 0:
            raise ValueError(f"k must be an integer of at least 0, got {k!r}")
        values = [lambdas] if isinstance(lambdas, (int, float)) else list(lambdas)
        if not values or not all(0 <= value < float("inf") for value in values):
            raise ValueError(f"lambdas must be non-negative numbers, got {lambdas!r}")
        self.k, self.lambdas, self.inner = k, lambdas, inner
        self.passes = inner.passes + isinstance(inner, Ties)

    def prepare(self, stats: Stats) -> None:
        """Prepare the merge that is masked."""
        if not isinstance(self.lambdas, (int, float)):
            require_count(self.lambdas, stats, "lambdas")
        self.inner.prepare(stats)
        if isinstance(self.inner, Ties):
            self.inner.settle(stats)

    def __call__(self, base: Tensor, deltas: Tensor, ctx: Cell) -> Tensor:
        """Merge and mask."""
        own = [ctx.scratch(8 + t).copy_(row) for t, row in enumerate(deltas)]
        merged = self.inner(base, deltas, ctx)
        single = isinstance(self.lambdas, (int, float))
        votes = torch.zeros(ctx.size, dtype=torch.int16)
        for t, delta in enumerate(own):
            threshold = self.lambdas if single else self.lambdas[t]  # type: ignore[index]
            votes += tall_mask(delta, merged, threshold, ctx.scratch(7))  # type: ignore[arg-type]
        return merged.mul_(votes >= self.k)


def _consensus(
    k: int = 2,
    *,
    lambdas: float | Sequence[float] = 0.4,
    weights: Sequence[Weight] | None = None,
) -> Consensus:
    return Consensus(k, lambdas, TaskArithmetic(weights))


def _consensus_ties(
    k: int = 2,
    *,
    lambdas: float | Sequence[float] = 0.4,
    density: float = 0.2,
    scope: str = "global",
    compat: str | None = None,
) -> Consensus:
    return Consensus(k, lambdas, Ties(density, merge="sum", scope=scope, compat=compat))


def _dare_ties(
    p: float = 0.9,
    *,
    seed: int = 0,
    density: float = 1.0,
    merge: str = "mean",
    scope: str = "global",
    weights: Sequence[Weight] | None = None,
) -> Ties:
    return Ties(density, merge=merge, scope=scope, weights=weights, _drop=Drop(p, seed))


register_merge("ties", Ties)
register_merge("consensus", _consensus)
register_merge("consensus_ties", _consensus_ties)
register_merge("dare_ties", _dare_ties)
