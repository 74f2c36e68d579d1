"""Linear scalarisation: one fixed preference, one model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["LinearScalarization"]


class LinearScalarization(nn.Module):
    """A plain model that ignores the preference it is asked for.

    Train it on :func:`palora.scalarize` with one fixed λ.
    """

    takes_preference = True

    def __init__(self, model: nn.Module) -> None:
        """Wrap ``model``."""
        super().__init__()
        self.model = model

    def forward(self, lam: Tensor, *inputs: Any, **kw: Any) -> Any:
        """Run the model."""
        return self.model(*inputs, **kw)
