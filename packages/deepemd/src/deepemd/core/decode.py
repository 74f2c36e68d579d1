"""From logits to a matching: the paper's argmax, soft plans, and certified bijections (2.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from deepemd.core.bounds import guarded, potentials_from_matching
from deepemd.core.distance import cost_matrix
from deepemd.core.model import MASKED, DeepEMD
from deepemd.core.output import Solution
from deepemd.solvers._auction import Costs, auction
from deepemd.solvers._exact import assignment, solve_exact
from deepemd.solvers._sinkhorn import round_plan

DECODERS = ("argmax", "both", "soft", "sinkhorn", "round", "refine")
STREAMED = ("argmax", "both")
MAX_ROUNDS = (
    20_000  # of an auction; at N = 1024 the worst clouds that were tried took about this many
)
_ENTRIES = 1 << 24


def decode_streamed(
    model: DeepEMD,
    x: Tensor,
    y: Tensor,
    mask_x: Tensor | None = None,
    mask_y: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    normalize: str | None = None,
) -> Solution:
    """Row and column argmax of the attention matrix, block by block: O(N) memory beyond the tokens.

    The rows of ``index`` are the paper's matching (its Eq. 10); ``inverse`` is the argmax of each column.
    Neither is one-to-one in general.
    """
    if chunk_size is None:
        chunk_size = max(_ENTRIES // (max(len(x), 1) * y.shape[1]), 1)
    parts = []
    best = torch.full(y.shape[:2], -torch.inf, device=x.device)
    inverse = torch.zeros(y.shape[:2], dtype=torch.long, device=x.device)
    with torch.no_grad():
        for rows, s in model.scores_chunked(
            x, y, mask_x, mask_y, chunk_size=chunk_size, normalize=normalize
        ):
            parts.append(s.argmax(2))
            if mask_x is not None:
                s = s.masked_fill(~mask_x[:, rows].unsqueeze(2), MASKED)
            high, at = s.max(1)
            better = high > best
            best = torch.where(better, high.to(best.dtype), best)
            inverse = torch.where(better, at + (rows.start or 0), inverse)
    index = torch.cat(parts, 1)
    if mask_x is not None:
        index = index.masked_fill(~mask_x, -1)
    if mask_y is not None:
        inverse = inverse.masked_fill(~mask_y, -1)
    converged = torch.ones(len(x), dtype=torch.bool, device=x.device)
    return Solution(index, inverse, converged=converged)


def soft_plan(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return ``softmax_j(S / temperature) / N``: rows sum to 1/N, columns to anything."""
    return (logits / temperature).softmax(2) / logits.shape[1]


def sinkhorn_plan(logits: Tensor, n_iter: int = 10, temperature: float = 1.0) -> Tensor:
    """Normalise rows to 1/N and columns to 1/M in turn, in the log domain; the columns come last.

    >>> sinkhorn_plan(torch.tensor([[[2.0, 0.0], [2.0, 1.0]]]), 50).sum(2)
    tensor([[0.5000, 0.5000]])
    """
    n, m = logits.shape[1:]
    log_plan = logits / temperature
    for _ in range(n_iter):
        log_plan = log_plan.log_softmax(2)
        log_plan = log_plan.log_softmax(1)
    return log_plan.exp() / m if n else log_plan


def round_scores(
    logits: Tensor, *, workers: int | None = None, max_iter: int = MAX_ROUNDS
) -> Solution:
    """Return the matching of largest total score: exact on a CPU, by auction on an accelerator."""
    cost = logits.detach().log_softmax(2).neg()
    if cost.device.type == "cpu":
        index = assignment(cost.double(), workers=workers)
        done = torch.ones(len(cost), dtype=torch.bool, device=cost.device)
    else:
        found = auction(Costs.of(cost), eps=1e-4, max_iter=max_iter)
        assert found.index is not None
        assert found.converged is not None
        index, done = found.index, found.converged
    inverse = torch.full((len(cost), cost.shape[2]), -1, dtype=torch.long, device=cost.device)
    b, i = (index >= 0).nonzero(as_tuple=True)
    inverse[b, index[b, i]] = i
    return Solution(index, inverse, converged=done)


def with_bounds(x: Tensor, y: Tensor, found: Solution, p: int = 1, sweeps: int = 16) -> Solution:
    """Attach the bounds and potentials that a bijection implies."""
    assert found.index is not None
    cost = cost_matrix(x, y, p)
    _, f, g = potentials_from_matching(cost, found.index, sweeps)
    lower, f = guarded(f, g)
    lower = torch.maximum(lower, torch.maximum(cost.amin(1).mean(1), cost.amin(2).mean(1)))
    upper = cost.gather(2, found.index.unsqueeze(2)).mean((1, 2))
    return found.replace(f=f, g=g, lower=torch.minimum(lower, upper), upper=upper)


def refine(
    x: Tensor,
    y: Tensor,
    found: Solution,
    *,
    p: int = 1,
    rtol: float = 1e-2,
    sweeps: int = 16,
    max_iter: int = MAX_ROUNDS,
    exact: bool | None = None,
    workers: int | None = None,
) -> Solution:
    """Improve a bijection until its certified gap is at most ``rtol``.

    The potentials that the matching implies are often certificate enough. The pairs for which they are
    not are solved from there: on a CPU exactly, on the reduced costs ``C - f - g``; on an accelerator by
    an auction with prices ``-g`` and a small ε.

    Args:
        x, y: (B, N, D), of equal sizes.
        found: a matching, for example of :func:`round_scores`.
        p: exponent of the cost.
        rtol: the gap ``(upper - lower) / upper`` to reach.
        sweeps: see :func:`~deepemd.core.bounds.potentials_from_matching`.
        max_iter: rounds of the auction; the best matching and bound until then are kept.
        exact: solve the rest exactly rather than by auction (default: on a CPU).
        workers: processes for that.
    """
    found = with_bounds(x, y, found, p, sweeps)
    assert found.lower is not None
    assert found.upper is not None
    assert found.g is not None
    met = found.upper - found.lower <= rtol * found.upper
    left = (~met).nonzero().squeeze(1)
    if len(left) == 0:
        return found.replace(converged=met)
    if x.device.type == "cpu" if exact is None else exact:
        cost = cost_matrix(x[left].double(), y[left].double(), p)
        assert found.f is not None
        shift = found.f[left].double().unsqueeze(2) + found.g[left].double().unsqueeze(1)
        index = assignment(cost - shift, workers=workers)
        best = Solution(index, index.argsort(1))
        best = with_bounds(x[left], y[left], best, p, sweeps).replace(iterations=0)
        best = best.replace(lower=best.upper)
        return _merge(found, best, left, rtol)
    gap = (found.upper - found.lower)[left]
    costs = Costs(x[left], y[left], p, dense=True)
    start = float((gap / costs.spread().clamp_min(torch.finfo(gap.dtype).tiny)).max())
    better = auction(
        costs, eps=None, rtol=rtol, prices=-found.g[left], eps_start=min(start, 0.2),
        max_iter=max_iter,
    )  # fmt: skip
    return _merge(found, better, left, rtol)


def _merge(found: Solution, better: Solution, left: Tensor, rtol: float) -> Solution:
    """Take the better matching and the better bound of each of the pairs ``left``."""
    assert found.upper is not None
    assert found.lower is not None
    assert better.upper is not None
    assert better.lower is not None
    merged: dict[str, Tensor] = {}
    wins = better.upper <= found.upper[left]
    for name in ("index", "inverse", "upper"):
        merged[name] = _choose(getattr(found, name), getattr(better, name), left, wins)
    wins = better.lower >= found.lower[left]
    for name in ("f", "g", "lower"):
        merged[name] = _choose(getattr(found, name), getattr(better, name), left, wins)
    merged["lower"] = torch.minimum(merged["lower"], merged["upper"])  # two sums of the same costs
    met = merged["upper"] - merged["lower"] <= rtol * merged["upper"]
    return found.replace(**merged, iterations=better.iterations, converged=met)


def _choose(old: Tensor, new: Tensor, where: Tensor, wins: Tensor) -> Tensor:
    out = old.clone()
    out[where[wins]] = new[wins]
    return out


def _bounded_plan(x: Tensor, y: Tensor, found: Solution, p: int, rtol: float) -> Solution:
    """Attach the bounds of a plan for uniform weights: rounded to them, and by nearest neighbours."""
    assert found.plan is not None
    cost = cost_matrix(x, y, p)
    plan = found.plan.detach().to(cost.dtype)
    a, b = (
        torch.full_like(cost[:, :, 0], 1 / cost.shape[1]),
        torch.full_like(cost[:, 0], 1 / cost.shape[2]),
    )
    upper = (round_plan(plan, a, b) * cost).sum((1, 2))
    lower = torch.maximum(cost.amin(1).mean(1), cost.amin(2).mean(1))
    lower = torch.minimum(lower, upper)
    return found.replace(lower=lower, upper=upper, converged=upper - lower <= rtol * upper)


def _partial(
    x: Tensor, y: Tensor, p: int, rtol: float, max_iter: int, workers: int | None
) -> Solution:
    """Match the smaller cloud at least cost: exactly on a CPU, by auction on an accelerator."""
    if x.device.type != "cpu":
        return auction(Costs(x, y, p, dense=True), eps=None, rtol=rtol, max_iter=max_iter)
    found = solve_exact(x, y, p=p, workers=workers)
    assert found.index is not None
    cost = cost_matrix(x, y, p).gather(2, found.index.clamp_min(0).unsqueeze(2)).squeeze(2)
    matched = found.index >= 0
    upper = torch.where(matched, cost, torch.zeros_like(cost)).sum(1) / matched.sum(1)
    return found.replace(lower=upper, upper=upper)


def decode_logits(
    logits: Tensor,
    x: Tensor,
    y: Tensor,
    how: str,
    *,
    p: int = 1,
    rtol: float = 1e-2,
    partial: bool = False,
    sinkhorn_iters: int = 10,
    temperature: float = 1.0,
    workers: int | None = None,
    max_iter: int = MAX_ROUNDS,
) -> Solution:
    """Decode the logits (B, N, M) of pairs without padding; see :data:`DECODERS`.

    For N != M a bijection does not exist. ``round`` gives the Sinkhorn plan, or with ``partial`` the
    matching of largest score of the smaller cloud. ``refine`` gives the plan with its own bounds, and
    ``converged`` only where these happen to be within ``rtol``: a plan is not improved. With ``partial``
    it solves the pair for its costs, as potentials of one matching certify nothing there.
    """
    done = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if how == "soft":
        return Solution(plan=soft_plan(logits, temperature), converged=done)
    unequal = x.shape[1] != y.shape[1]
    if how == "sinkhorn" or (unequal and not partial):
        plan = sinkhorn_plan(logits, sinkhorn_iters, temperature)
        found = Solution(plan=plan, iterations=sinkhorn_iters, converged=done)
        return _bounded_plan(x, y, found, p, rtol) if how == "refine" else found
    if unequal and how == "refine":
        return _partial(x, y, p, rtol, max_iter, workers)
    found = round_scores(logits, workers=workers, max_iter=max_iter)
    if unequal:
        return found
    if how == "round":
        return with_bounds(x, y, found, p)
    return refine(x, y, found, p=p, rtol=rtol, max_iter=max_iter, workers=workers)
