r"""Problems with a known Pareto set: convex quadratics, and a front with a hollow middle.

:math:`L_t(w) = ‖w − c_t‖²` has the simplex of the c_t as its Pareto set, reached at
:math:`w = Σ_t λ_t c_t` by linear scalarisation: a linear layer with T adapters recovers it.
VLMOP2's front is not convex: linear scalarisation reaches only its ends, Tchebycheff the middle.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import palora
from palora.front import Front

__all__ = ["pareto_gap", "train_quadratic", "train_vlmop2", "vlmop2"]


def train_quadratic(
    centres: Tensor, steps: int = 1500, lr: float = 0.02, seed: int = 0
) -> nn.Module:
    """Train a one-layer model whose output w should equal Σ λ_t c_t.

    Args:
        centres: ``(T, d)``.
        steps: optimiser steps.
        lr: learning rate.
        seed: of the initial weights.
    """
    torch.manual_seed(seed)
    tasks, width = centres.shape
    model = palora.inject(nn.Linear(1, width, bias=False), tasks, rank=1)
    optimizer = torch.optim.Adam(palora.param_groups(model, lr))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    schedule = palora.Schedule(tasks, num=max(5, tasks), mode="fixed")
    one = torch.ones(1, 1)

    def losses(w: Tensor) -> list[Tensor]:
        return [(w[0] - c).square().sum() for c in centres]

    for step in range(steps):
        out = palora.step_loss(model, losses, (one,), schedule((step + 1) / steps))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        decay.step()
    return model


def pareto_gap(model: nn.Module, centres: Tensor, resolution: int = 20) -> float:
    """Largest distance of the model's w(λ) from Σ λ_t c_t over a lattice."""
    grid = palora.simplex_grid(len(centres), resolution)
    with torch.no_grad():
        w = palora.multi(model, grid, torch.ones(1, 1))[:, 0]
    return float((w - grid @ centres).norm(dim=1).max())


def vlmop2(w: Tensor) -> list[Tensor]:
    """The two objectives of VLMOP2 for ``w (d,)``: 1 − exp(−‖w ∓ 1/√d‖²)."""
    shift = w.numel() ** -0.5
    return [1 - torch.exp(-(w - shift).square().sum()), 1 - torch.exp(-(w + shift).square().sum())]


def train_vlmop2(kind: str = "linear", steps: int = 1500, seed: int = 0) -> Front:
    """Learn VLMOP2's front with one of the scalarisations, and evaluate it at 21 preferences."""
    torch.manual_seed(seed)
    model = palora.inject(nn.Linear(1, 2, bias=False), 2, rank=1)
    optimizer = torch.optim.Adam(palora.param_groups(model, 0.01))
    schedule = palora.Schedule(2, num=11, mode="fixed")
    one = torch.ones(1, 1)
    for step in range(steps):
        out = palora.step_loss(
            model,
            lambda w: vlmop2(w[0]),
            (one,),
            schedule((step + 1) / steps),
            scalarization=kind,  # type: ignore[arg-type]
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    grid = palora.simplex_grid(2, 20)
    with torch.no_grad():
        w = palora.multi(model, grid, one)[:, 0]
        losses = torch.stack([torch.stack(vlmop2(row)) for row in w])
    return Front(grid.double().numpy(), losses.double().numpy())
