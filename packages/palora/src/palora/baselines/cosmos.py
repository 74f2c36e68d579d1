"""COSMOS: the preference is a further input of the network (Ruchte & Grabocka, 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from palora.core.loss import scalarize

__all__ = ["COSMOS", "cosmos_loss"]


class COSMOS(nn.Module):
    """A model whose first input carries λ: as T more features, or T constant image channels.

    Args:
        model: accepts the widened input.
    """

    takes_preference = True

    def __init__(self, model: nn.Module) -> None:
        """Wrap ``model``."""
        super().__init__()
        self.model = model

    def forward(self, lam: Tensor, x: Tensor, *inputs: Any, **kw: Any) -> Any:
        """Append λ along dimension 1 and run the model."""
        if x.dim() < 2:
            raise ValueError(f"COSMOS appends λ along dimension 1; got an input {tuple(x.shape)}")
        shape = (x.shape[0], len(lam), *x.shape[2:])
        channels = lam.to(x).view(1, -1, *([1] * (x.dim() - 2))).expand(shape)
        return self.model(torch.cat([x, channels], 1), *inputs, **kw)


def cosmos_loss(losses: Tensor, lam: Tensor, coefficient: float = 1.0) -> Tensor:
    """Return Σ λ_t L_t − c·cos(λ, L)."""
    lam = lam.to(losses)
    angle = torch.cosine_similarity(lam, losses, dim=-1)
    return scalarize(losses, lam) - coefficient * angle
