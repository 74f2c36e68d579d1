"""Pareto Manifold Learning (PaMaL, arXiv 2210.09759): T weight copies, mixed by λ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["PaMaL"]


class PaMaL(nn.Module):
    """An ensemble of T models of one architecture, run at the weights Σ_t λ_t θ_t.

    Args:
        members: T models, usually of different random initialisation.

    Raises:
        ValueError: fewer than two members, or different architectures.
    """

    takes_preference = True

    def __init__(self, members: Sequence[nn.Module]) -> None:
        """Hold the members; buffers (running statistics) are the first one's."""
        super().__init__()
        if len(members) < 2:
            raise ValueError(f"PaMaL needs at least 2 members, got {len(members)}")
        shapes = [{k: p.shape for k, p in m.named_parameters()} for m in members]
        if any(s != shapes[0] for s in shapes[1:]):
            raise ValueError("the members must have one architecture")
        self.members = nn.ModuleList(members)

    def forward(self, lam: Tensor, *inputs: Any, **kw: Any) -> Any:
        """Run the mixture at λ."""
        stacks = zip(*(m.named_parameters() for m in self.members), strict=True)
        mixed = {}
        for entries in stacks:
            name, first = entries[0]
            weights = lam.to(first)
            mixed[name] = sum(
                (w * p for w, (_, p) in zip(weights[1:], entries[1:], strict=True)),
                weights[0] * first,
            )
        return functional_call(self.members[0], mixed, inputs, kw)
