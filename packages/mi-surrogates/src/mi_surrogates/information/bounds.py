"""Bounds on mutual information as functions of a critic's scores, in nats.

`pos` are the scores T(x, y) of true pairs, `neg` those of pairs drawn independently. All functions are
differentiable, reduce the last dimension(s) and keep the leading ones; half precision is raised to
float32 before the exponentials.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(scores: Tensor) -> Tensor:
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


def log_mean_exp(scores: Tensor) -> Tensor:
    """Return log of the mean of e^T over the last dimension, without overflow.

    Example:
        >>> log_mean_exp(torch.tensor([800.0, 800.0])).item()
        800.0
    """
    return torch.logsumexp(_wide(scores), -1) - math.log(scores.shape[-1])


def donsker_varadhan(pos: Tensor, neg: Tensor) -> Tensor:
    """Return I_DV = E_p[T] − log E_q[e^T], the bound of MINE.

    Args:
        pos: (..., B) scores of true pairs.
        neg: (..., K) scores of independent pairs.

    Example:
        >>> donsker_varadhan(torch.tensor([2.0, 2.0]), torch.zeros(3)).item()
        2.0
    """
    return _wide(pos).mean(-1) - log_mean_exp(neg)


def nwj(pos: Tensor, neg: Tensor) -> Tensor:
    """Return I_NWJ = E_p[T] − e^{-1} E_q[e^T] (MINE-f); the optimal T is 1 + the log ratio.

    Args:
        pos: (..., B) scores of true pairs.
        neg: (..., K) scores of independent pairs.

    Example:
        >>> nwj(torch.ones(4), torch.ones(4)).item()
        0.0
    """
    return _wide(pos).mean(-1) - torch.exp(log_mean_exp(neg) - 1)


def infonce(scores: Tensor) -> Tensor:
    """Return I_NCE = mean_i[S_ii − log((1/B) Σ_j e^{S_ij})], never above log B.

    Args:
        scores: (..., B, B), S_ij = T(x_i, y_j).

    Raises:
        ValueError: the last two dimensions differ.

    Example:
        >>> abs(infonce(torch.eye(4) * 100).item() - math.log(4)) < 1e-5
        True
    """
    if scores.shape[-1] != scores.shape[-2]:
        raise ValueError(f"scores must be (..., B, B), got {tuple(scores.shape)}")
    scores = _wide(scores)
    return (scores.diagonal(dim1=-2, dim2=-1) - log_mean_exp(scores)).mean(-1)


def smile(pos: Tensor, neg: Tensor, tau: float = 5.0) -> Tensor:
    """Return E_p[T] − log E_q[e^{clip(T, −τ, τ)}]; τ = inf is Donsker–Varadhan.

    Example:
        >>> smile(torch.full((2,), 9.0), torch.full((2,), 9.0)).item()
        4.0
    """
    return _wide(pos).mean(-1) - log_mean_exp(_wide(neg).clamp(-tau, tau))


def js(pos: Tensor, neg: Tensor) -> Tensor:
    """Return the Jensen–Shannon objective E_p[−softplus(−T)] − E_q[softplus(T)].

    A training objective, not an estimate: its optimal T is the log ratio.

    Example:
        >>> round(js(torch.zeros(2), torch.zeros(2)).item(), 6)
        -1.386294
    """
    return -F.softplus(-_wide(pos)).mean(-1) - F.softplus(_wide(neg)).mean(-1)


def mine_loss(
    pos: Tensor, neg: Tensor, ema_state: Tensor | None = None, alpha: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Return MINE's loss with its bias-corrected gradient, and the new moving average.

    m ← (1 − α) m + α mean(e^T), and the gradient of the second term is mean(e^T ∇T) / m. The value of
    the loss is −I_DV of the batch.

    Args:
        pos: (..., B) scores of true pairs.
        neg: (..., K) scores of independent pairs.
        ema_state: (...) log m of the last call, or None at the start.
        alpha: weight of this batch in the average; 1 is the plain gradient of I_DV.

    Returns:
        The loss (...) and log m (...), detached.

    Example:
        >>> loss, state = mine_loss(torch.ones(2), torch.zeros(2))
        >>> loss.item(), state.item()
        (-1.0, 0.0)
    """
    batch = log_mean_exp(neg)
    state = batch.detach()
    if ema_state is not None and alpha < 1:
        state = torch.logaddexp(ema_state + math.log1p(-alpha), state + math.log(alpha))
    ratio = torch.exp(batch - state)  # at most 1/α
    loss = batch.detach() - _wide(pos).mean(-1) + (ratio - ratio.detach())
    return loss, state
