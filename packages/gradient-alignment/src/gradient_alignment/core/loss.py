"""A classification loss and its regularisers, in one pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradient_alignment.core.modes import BatchNormMode, active_norms
from gradient_alignment.core.regularizers import Regularizer
from gradient_alignment.core.shared import SharedPass


class RegularizedLoss(nn.Module):
    r"""A classification loss with regularisers, :math:`\ell(f(x), y) + \sum_r R_r`, in one pass.

    The logits and the input gradient are computed once, whatever the number of regularisers. With
    bn="frozen" and active batch normalisation, and under autocast, the regularisers make a second pass.

    Args:
        model: classifier, maps (B, ...) to logits (B, C).
        *regularizers: see `ScoreMatching`, `AntiScoreMatching`, `GradientNorm`.
        loss_fn: maps (logits, y) to a scalar.

    Raises:
        ValueError: regularisers that disagree about `bn`.

    Example:
        >>> import torch
        >>> from gradient_alignment import GradientNorm, ScoreMatching
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Softplus(10), torch.nn.Linear(8, 3))
        >>> loss_fn = RegularizedLoss(net, ScoreMatching(), GradientNorm(1e-2))
        >>> loss_fn(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])).backward()
        >>> net[0].weight.grad.shape
        torch.Size([8, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        *regularizers: Regularizer,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> None:
        super().__init__()
        self.model = model
        self.regularizers = nn.ModuleList(regularizers)
        self.loss_fn = loss_fn
        modes = {regularizer.bn for regularizer in regularizers}
        if len(modes) > 1:
            raise ValueError(f"the regularisers disagree about bn: {', '.join(sorted(modes))}")
        self.bn: BatchNormMode = modes.pop() if modes else "shared"
        self.logits: Tensor | None = None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss, 0-dimensional; `logits` of the pass are kept, detached, for the accuracy."""
        frozen = self.bn == "frozen" and bool(active_norms(self.model))
        separate = frozen or torch.is_autocast_enabled(x.device.type)
        shared: SharedPass | None = None
        if separate or not len(self.regularizers):
            logits = self.model(x)
            if len(self.regularizers):
                shared = SharedPass(self.model, x, y, bn=self.bn, again=True)
        else:
            shared = SharedPass(self.model, x, y, bn=self.bn)
            logits = shared.logits
        self.logits = logits.detach()
        loss: Tensor = self.loss_fn(logits, y)
        for regularizer in self.regularizers:
            assert isinstance(regularizer, Regularizer)
            assert shared is not None
            loss = loss + regularizer.evaluate(shared)
        return loss

    @property
    def terms(self) -> dict[str, Tensor]:
        """The parts of the last value, as "Regularizer.term"; a second one of a kind is "Regularizer2"."""
        seen: Counter[str] = Counter()
        terms: dict[str, Tensor] = {}
        for regularizer in self.regularizers:
            assert isinstance(regularizer, Regularizer)
            kind = type(regularizer).__name__
            seen[kind] += 1
            label = kind if seen[kind] == 1 else f"{kind}{seen[kind]}"
            terms |= {f"{label}.{name}": value for name, value in regularizer.terms.items()}
        return terms
