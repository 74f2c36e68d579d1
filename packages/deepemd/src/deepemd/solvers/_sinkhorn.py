"""Sinkhorn in the log domain, with annealing of ε, weights, bounds and debiasing (2.10)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deepemd.core.bounds import guarded
from deepemd.core.distance import cost_matrix
from deepemd.core.output import Solution, plan_cost


def _log_weights(weight: Tensor | None, cloud: Tensor) -> Tensor:
    batch, n = cloud.shape[:2]
    if weight is None:
        return torch.full((batch, n), -math.log(n), dtype=cloud.dtype, device=cloud.device)
    return weight.to(cloud.dtype).log()


def round_plan(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Move a nearly feasible plan onto the transport polytope: marginals ``a`` and ``b`` exactly.

    Scale rows down to ``a``, columns down to ``b``, and add the rank-one rest; the change is at most
    twice the violation in L1 (Altschuler, Weed and Rigollet 2017, Algorithm 2).
    """
    rows = plan.sum(2)
    plan = plan * (a / rows.clamp_min(torch.finfo(plan.dtype).tiny)).clamp_max(1).unsqueeze(2)
    columns = plan.sum(1)
    plan = plan * (b / columns.clamp_min(torch.finfo(plan.dtype).tiny)).clamp_max(1).unsqueeze(1)
    left, right = (a - plan.sum(2)).clamp_min(0), (b - plan.sum(1)).clamp_min(0)
    total = left.sum(1, keepdim=True).clamp_min(torch.finfo(plan.dtype).tiny)
    return plan + left.unsqueeze(2) * (right / total).unsqueeze(1)


def solve_sinkhorn(
    x: Tensor,
    y: Tensor,
    *,
    p: int = 1,
    a: Tensor | None = None,
    b: Tensor | None = None,
    reg: float = 1e-2,
    relative: bool = True,
    n_iter: int = 1000,
    anneal: bool = True,
    scaling: float = 0.9,
    tol: float = 1e-3,
    value: str = "sharp",
) -> Solution:
    """Solve entropic transport: ``f = -ε LSE_j((g_j - C_ij)/ε + log b_j)``, and ``g`` likewise.

    Args:
        x, y: (B, N, D) and (B, M, D).
        p: exponent of the cost.
        a, b: weights (B, N) and (B, M), uniform by default.
        reg: ε, relative to the mean cost of each pair unless ``relative`` is False.
        n_iter: sweeps in all, those of the annealing included.
        anneal: start at the largest cost and shrink ε by ``scaling`` per sweep down to ``reg``.
        tol: stop when the marginals are violated by less than this in L1.
        value: ``"sharp"`` reports ``<P, C>``; ``"entropic"`` adds ``ε KL(P | a b)``.

    Returns:
        A solution with the plan (its columns exact, its rows to ``tol``), feasible potentials, the
        lower bound of one hard c-transform, and the upper bound of the plan rounded to the polytope.
        ``converged`` says whether ``tol`` was met.
    """
    if not reg > 0:
        raise ValueError(f"reg must be positive, got {reg}")
    if not 0 < scaling < 1:
        raise ValueError(f"scaling must lie between 0 and 1, got {scaling}")
    if value not in ("sharp", "entropic"):
        raise ValueError(f"value must be 'sharp' or 'entropic', got {value!r}")
    cost = cost_matrix(x, y, p)
    log_a, log_b = _log_weights(a, x), _log_weights(b, y)
    tiny = torch.finfo(cost.dtype).tiny
    final = reg * cost.mean((1, 2)) if relative else torch.full_like(cost[:, 0, 0], reg)
    final = final.clamp_min(tiny**0.5)
    eps = torch.maximum(cost.amax((1, 2)), final) if anneal else final
    f, g = torch.zeros_like(log_a), torch.zeros_like(log_b)
    violation = torch.full_like(final, torch.inf)
    sweeps = 0
    for sweeps in range(1, n_iter + 1):
        e = eps.view(-1, 1, 1)
        scaled = cost / e
        f = -eps.unsqueeze(1) * (g.unsqueeze(1) / e - scaled + log_b.unsqueeze(1)).logsumexp(2)
        g = -eps.unsqueeze(1) * (f.unsqueeze(2) / e - scaled + log_a.unsqueeze(2)).logsumexp(1)
        look = sweeps % 5 == 0 or sweeps == n_iter  # one costs a sweep and a synchronisation
        if look and bool((eps <= final).all()):
            rows = _plan(cost, f, g, eps, log_a, log_b).sum(2)
            violation = (rows - log_a.exp()).abs().sum(1)
            if bool((violation < tol).all()):
                break
        eps = torch.maximum(eps * scaling, final)
    plan = _plan(cost, f, g, eps, log_a, log_b)
    wa, wb = log_a.exp(), log_b.exp()
    upper = (round_plan(plan, wa, wb) * cost).sum((1, 2))
    hard_f = (cost - g.unsqueeze(1)).amin(2)
    hard_g = (cost - hard_f.unsqueeze(2)).amin(1)
    _, hard_f = guarded(hard_f, hard_g)
    lower = ((wa * hard_f).sum(1) + (wb * hard_g).sum(1)).clamp_min(0)
    lower = torch.minimum(lower, upper)
    reported = None
    if value == "entropic":
        ratio = (f.unsqueeze(2) + g.unsqueeze(1) - cost) / eps.view(-1, 1, 1)
        extra = eps * (torch.where(plan > 0, plan * ratio, 0.0).sum((1, 2)) - plan.sum((1, 2)) + 1)
        sharp = plan_cost(x, y, plan, p)
        reported = sharp + extra.detach()
    return Solution(
        plan=plan, f=hard_f, g=hard_g, lower=lower, upper=upper, iterations=sweeps,
        converged=violation < tol, value=reported,
    )  # fmt: skip


def _plan(cost: Tensor, f: Tensor, g: Tensor, eps: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    exponent = (f.unsqueeze(2) + g.unsqueeze(1) - cost) / eps.view(-1, 1, 1)
    return (exponent + log_a.unsqueeze(2) + log_b.unsqueeze(1)).exp()
