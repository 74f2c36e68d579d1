"""The auction algorithm with ε-scaling, batched: all unassigned bidders of all pairs bid at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deepemd.core.bounds import guarded
from deepemd.core.distance import cost_matrix, row_blocks
from deepemd.core.output import Solution

_BLOCK = 1 << 22  # entries of a block of bids: 16 MB in float32


class Costs:
    """Costs of a batch of pairs, stored or recomputed from the coordinates row by row."""

    def __init__(self, x: Tensor, y: Tensor, p: int, *, dense: bool) -> None:
        self.x, self.y, self.p = x, y, p
        self.shape = (len(x), x.shape[1], y.shape[1])
        self.cost = cost_matrix(x, y, p) if dense else None

    @classmethod
    def of(cls, cost: Tensor) -> Costs:
        """Wrap given matrices (B, N, M)."""
        empty = cost.new_empty(*cost.shape[:2], 0)
        self = cls(empty, cost.new_empty(len(cost), cost.shape[2], 0), 1, dense=False)
        self.cost = cost
        return self

    def transposed(self) -> Costs:
        """Swap the two sides."""
        if self.cost is not None:
            return Costs.of(self.cost.transpose(1, 2).contiguous())
        return Costs(self.y, self.x, self.p, dense=False)

    def rows(self, b: Tensor, i: Tensor) -> Tensor:
        """Return the rows (U, M) of the bidders ``(b, i)``, in fresh memory."""
        if self.cost is not None:
            return self.cost[b, i]
        if len(self.y) == 1:
            return cost_matrix(self.x[b, i].unsqueeze(0), self.y, self.p)[0]
        return cost_matrix(self.x[b, i].unsqueeze(1), self.y[b], self.p).squeeze(1)

    def blocks(self, which: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the costs of some pairs in blocks of rows."""
        x, y = self.x[which], self.y[which]
        size = max(_BLOCK // (max(len(which), 1) * self.shape[2]), 1)
        for part in row_blocks(self.shape[1], size):
            if self.cost is not None:
                yield part, self.cost[which, part]
            else:
                yield part, cost_matrix(x[:, part], y, self.p)

    def spread(self) -> Tensor:
        """Return the range of the costs of each pair, from 0 or the least cost if that is negative."""
        everything = torch.arange(self.shape[0], device=self.x.device)
        high, low = zip(
            *[(c.amax((1, 2)), c.amin((1, 2))) for _, c in self.blocks(everything)], strict=True
        )
        return torch.stack(high).amax(0) - torch.stack(low).amin(0).clamp_max(0)

    def certify(
        self, which: Tensor, index: Tensor, price: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the mean cost of the matchings, the dual bound of the prices, and its potentials."""
        square = self.shape[1] == self.shape[2]
        g = -price if square else price.amin(1, keepdim=True) - price  # leftover objects: 0
        new_g = torch.full_like(g, torch.inf)
        matched = torch.zeros(len(which), dtype=g.dtype, device=g.device)
        fs, nearest = [], torch.zeros_like(matched)
        for part, cost in self.blocks(which):
            f = (cost - g.unsqueeze(1)).amin(2)
            new_g = torch.minimum(new_g, (cost - f.unsqueeze(2)).amin(1))
            nearest += cost.amin(2).sum(1)
            matched += cost.gather(2, index[:, part].unsqueeze(2)).sum((1, 2))
            fs.append(f)
        g = new_g if square else g
        _, f = guarded(torch.cat(fs, 1), g)
        upper, bound = (part / self.shape[1] for part in (matched, f.sum(1) + g.sum(1)))
        bound = torch.maximum(bound, nearest / self.shape[1])
        return upper, torch.minimum(bound, upper), f, g


def _bids(costs: Costs, price: Tensor, b: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
    """Return each bidder's best object and the margin of its value over the second best."""
    m = price.shape[1]
    objects, margins = [], []
    for part in row_blocks(len(b), max(_BLOCK // m, 1)):
        value = costs.rows(b[part], i[part]).add_(price[b[part]])
        if m == 1:
            objects.append(torch.zeros_like(b[part]))
            margins.append(torch.zeros_like(value[:, 0]))
            continue
        two = value.topk(2, dim=1, largest=False) if m > 2 else value.sort(dim=1)
        objects.append(two.indices[:, 0])
        margins.append(two.values[:, 1] - two.values[:, 0])
    return torch.cat(objects), torch.cat(margins)


def solve_auction(
    x: Tensor,
    y: Tensor,
    *,
    p: int = 1,
    eps: float | None = 1e-3,
    rtol: float | None = None,
    prices: Tensor | None = None,
    scaling: float = 5.0,
    eps_start: float | None = None,
    max_iter: int = 100_000,
    dense: bool | None = None,
) -> Solution:
    """Match pairs of one size each by a forward auction (spec 2.10).

    Each unassigned ``i`` bids for its best object ``j1``: the price becomes
    ``p_{j1} + (v_{j1} - v_{j2}) + ε``; the highest bid wins and evicts the owner. With ε-complementary
    slackness the mean cost ends at most ε above the optimum, and ``g = -p`` with its c-transform is a
    lower bound.

    Args:
        x, y: (B, N, D) and (B, M, D). For N != M every point of the smaller cloud is matched, from equal
            prices (``prices`` do not apply), in one phase, or with ``rtol`` in phases that start anew.
        p: exponent of the cost.
        eps: the target ε relative to the largest cost of the pair; None with ``rtol``.
        rtol: stop after the phase whose certified gap is at most this. Without ``eps`` the flag
            ``converged`` says so; a distance below about 1e-4 of the largest cost has no such bound in
            float32.
        prices: (B, M) starting prices in cost units: minus the potentials of a network (default 0).
        scaling: factor of ε from phase to phase, over 1.
        eps_start: ε of the first phase relative to the largest cost (default 1/``scaling``).
        max_iter: rounds of bidding; what is left then is matched greedily and flagged.
        dense: keep the cost matrices; by default where they have at most 2^26 entries. Otherwise rows
            are recomputed from the coordinates and the memory is O(B N).

    Returns:
        A :class:`~deepemd.core.output.Solution` with matching, potentials and both bounds.
    """
    if not scaling > 1:
        raise ValueError(f"scaling must be over 1, got {scaling}")
    if eps is None and rtol is None:
        raise ValueError("give eps, rtol or both")
    if eps is not None and not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    if dense is None:
        dense = len(x) * x.shape[1] * y.shape[1] <= 1 << 26
    return auction(
        Costs(x, y, p, dense=dense), eps=eps, rtol=rtol, prices=prices, scaling=scaling,
        eps_start=eps_start, max_iter=max_iter,
    )  # fmt: skip


def auction(
    costs: Costs,
    *,
    eps: float | None = 1e-3,
    rtol: float | None = None,
    prices: Tensor | None = None,
    scaling: float = 5.0,
    eps_start: float | None = None,
    max_iter: int = 100_000,
) -> Solution:
    """Run the auction of :func:`solve_auction` on any costs: coordinates or given matrices."""
    if not scaling > 1:
        raise ValueError(f"scaling must be over 1, got {scaling}")
    if eps is None and rtol is None:
        raise ValueError("give eps, rtol or both")
    if eps is not None and not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    batch, n, m = costs.shape
    if n > m:
        found = auction(costs.transposed(), eps=eps, rtol=rtol, scaling=scaling, max_iter=max_iter)
        return found.replace(index=found.inverse, inverse=found.index, f=found.g, g=found.f)
    top = costs.spread()
    dtype, device = top.dtype, top.device
    target = torch.maximum(
        (eps if eps is not None else 0.0) * top, 16 * torch.finfo(dtype).eps * top
    )
    price = torch.zeros(batch, m, dtype=dtype, device=device)
    step = target.clone()
    if n == m or rtol is not None:
        step = torch.maximum((eps_start if eps_start is not None else 1 / scaling) * top, target)
        if n == m and prices is not None:
            price = prices.to(dtype, copy=True)
    owner = torch.full((batch, m), -1, dtype=torch.long, device=device)
    mine = torch.full((batch, n), -1, dtype=torch.long, device=device)
    lower = torch.full((batch,), -torch.inf, dtype=dtype, device=device)
    upper = torch.full_like(lower, torch.inf)
    best_index = torch.zeros_like(mine)
    best_f = torch.zeros(batch, n, dtype=dtype, device=device)
    best_g = torch.zeros_like(price)
    done = torch.zeros_like(top, dtype=torch.bool)
    flat_pairs = (top <= 0).nonzero().squeeze(1)  # all costs equal: any matching is optimal
    mine[flat_pairs] = torch.arange(n, device=device)

    def certify(which: Tensor) -> None:
        """Record bounds for the pairs in ``which``, all of whose bidders are assigned."""
        cost, bound, f, g = costs.certify(which, mine[which], price[which])
        better = bound > lower[which]
        lower[which] = torch.where(better, bound, lower[which])
        best_f[which] = torch.where(better.unsqueeze(1), f, best_f[which])
        best_g[which] = torch.where(better.unsqueeze(1), g, best_g[which])
        better = cost < upper[which]
        upper[which] = torch.where(better, cost, upper[which])
        best_index[which] = torch.where(better.unsqueeze(1), mine[which], best_index[which])

    rounds = 0
    while not bool(done.all()):
        free = (mine < 0) & ~done.unsqueeze(1)
        ready = ((mine >= 0).all(1) & ~done).nonzero().squeeze(1)
        if len(ready):
            certify(ready)
            met = step[ready] <= target[ready]
            if rtol is not None:
                met = met | (upper[ready] - lower[ready] <= rtol * upper[ready])
            done[ready[met]] = True
            again = ready[~met]
            step[again] = torch.maximum(step[again] / scaling, target[again])
            mine[again], owner[again] = -1, -1
            if n < m:  # unsold objects must end at the common start
                price[again] = 0
            continue
        if rounds >= max_iter:
            break
        rounds += 1
        _round(costs, price, step, mine, owner, free)
    if not bool(done.all()):
        left = (~done).nonzero().squeeze(1)
        _complete(mine, left, m)
        certify(left)
    if eps is None and rtol is not None:  # the smallest step may not have been enough
        done &= upper - lower <= rtol * upper
    inverse = torch.full((batch, m), -1, dtype=torch.long, device=device)
    inverse.scatter_(1, best_index, torch.arange(n, device=device).expand(batch, n))
    return Solution(best_index, inverse, None, best_f, best_g, lower, upper, rounds, done)


def _round(
    costs: Costs, price: Tensor, step: Tensor, mine: Tensor, owner: Tensor, free: Tensor
) -> None:
    """Let every free bidder bid once; the highest bid for each object wins it. In place."""
    batch, m = price.shape
    b, i = free.nonzero(as_tuple=True)
    j, margin = _bids(costs, price, b, i)
    flat = b * m + j
    bid = price.flatten()[flat] + margin + step[b]
    highest = torch.full((batch * m,), -torch.inf, dtype=price.dtype, device=price.device)
    highest.scatter_reduce_(0, flat, bid, "amax")
    winner = torch.full((batch * m,), -1, dtype=torch.long, device=price.device)
    best = bid == highest[flat]
    winner[flat[best]] = i[best]  # one of several equal bids
    sold = (winner >= 0).nonzero().squeeze(1)
    sold_b, sold_j, new = sold // m, sold % m, winner[sold]
    old = owner[sold_b, sold_j]
    evicted = old >= 0
    mine[sold_b[evicted], old[evicted]] = -1
    owner[sold_b, sold_j] = new
    mine[sold_b, new] = sold_j
    price[sold_b, sold_j] = highest[sold]


def _complete(mine: Tensor, which: Tensor, m: int) -> None:
    """Give the free bidders of the pairs in ``which`` the free objects, in order."""
    for b in which.tolist():
        taken = torch.zeros(m, dtype=torch.bool, device=mine.device)
        taken[mine[b][mine[b] >= 0]] = True
        free = (mine[b] < 0).nonzero().squeeze(1)
        mine[b, free] = (~taken).nonzero().squeeze(1)[: len(free)]
