"""Balancing the losses: by their gradients' norms, by their own size, or by both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["FullBalance", "GradBalance", "LossBalance"]


class LossBalance:
    r"""Weigh each loss by one minus its share of the recent losses (``lb`` in the authors' code).

    After more than ``window`` earlier calls, :math:`w_t = 1 − |m_t| / \sum_u |m_u|` with m the
    mean of the newest ``window`` loss vectors; before that w = 1. The memory advances once per ray.

    Args:
        window: length of the mean; 25 in the authors' code.
        mode: ``"mean"`` is the released behaviour; ``"ratio"`` divides that mean by the mean of
            the ``window`` vectors before it, which the released code computes and then drops.

    Example:
        >>> balance = LossBalance(window=1)
        >>> for _ in range(3): w = balance(torch.tensor([3., 1.]))
        >>> w
        tensor([0.2500, 0.7500])
    """

    def __init__(self, window: int = 25, mode: Literal["mean", "ratio"] = "mean") -> None:
        """Start with an empty memory."""
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if mode not in ("mean", "ratio"):
            raise ValueError(f"mode must be 'mean' or 'ratio', got {mode!r}")
        self.window, self.mode, self.calls = window, mode, 0
        self.memory: Tensor | None = None

    def __call__(self, losses: Tensor) -> Tensor:
        """Take in one loss vector ``(T,)`` and return its weights (detached)."""
        losses = losses.detach()
        if self.memory is None:
            self.memory = losses.new_ones(2 * self.window, losses.numel())
        self.memory = torch.cat([self.memory[1:].to(losses), losses[None]])
        self.calls += 1
        if self.calls <= self.window + 1:
            return torch.ones_like(losses)
        mean = self.memory[self.window :].mean(0)
        if self.mode == "ratio":
            mean = mean / self.memory[: self.window].mean(0)
        share = mean.abs()
        return 1 - share / share.sum().clamp_min(torch.finfo(share.dtype).tiny)

    def state_dict(self) -> dict[str, Any]:
        """Memory and number of calls."""
        return {"memory": self.memory, "calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.memory, self.calls = state["memory"], state["calls"]


class GradBalance:
    r"""Divide each loss by the norm of its gradient (``gb``): :math:`\sum_t λ_t L_t/(n_t+ξ)`.

    :math:`n_t = ‖∇L_t‖_2` over the shared parameters, detached, one set for each ray. The T
    gradients are taken once and combined, so that a ray costs T backward passes, not T+1. A
    parameter that a loss does not reach counts as zero. A loss with zero gradient is weighed by
    1/ξ, which is large; ``max_weight`` clips.

    Args:
        xi: ξ; 1e-3 in the authors' code.
        params: ``"shared"``: the parameters that at least two losses reach (the encoder with its
            adapters, not the heads; all, where no parameter is shared); or a function from the
            model to parameters.
        max_weight: upper bound of 1/(n_t+ξ).
        batched: take the T gradients in one vectorised backward pass (``is_grads_batched``); for
            models whose operations support it.
    """

    def __init__(
        self,
        xi: float = 1e-3,
        params: Literal["shared"] | Callable[[nn.Module], Iterable[nn.Parameter]] = "shared",
        *,
        max_weight: float | None = None,
        batched: bool = False,
    ) -> None:
        """Store the options; see the class."""
        if xi < 0:
            raise ValueError(f"xi must not be negative, got {xi}")
        if not callable(params) and params != "shared":
            raise ValueError(f"params must be 'shared' or a function of the model, got {params!r}")
        self.xi, self.params, self.max_weight, self.batched = xi, params, max_weight, batched

    def gradients(
        self, model: nn.Module, losses: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[list[Tensor | None]], Tensor]:
        """Return the parameters, each loss's gradients by them, and the weights 1/(n_t+ξ)."""
        parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        grads = _batched(losses, parameters) if self.batched else _one_by_one(losses, parameters)
        zero = torch.zeros((), dtype=torch.float64, device=losses[0].device)
        squares = torch.stack(
            [
                torch.stack([zero if g is None else g.double().pow(2).sum() for g in row])
                for row in grads
            ]
        )
        if callable(self.params):
            chosen = {id(p) for p in self.params(model)}
            shared = torch.tensor([id(p) in chosen for p in parameters], device=zero.device)
        else:
            shared = _shared(grads, squares)
        norms = torch.where(shared, squares, zero).sum(1).sqrt().to(losses[0].dtype)
        weights = 1 / (norms + self.xi)
        if self.max_weight is not None:
            weights = weights.clamp(max=self.max_weight)
        return parameters, grads, weights


def _shared(grads: list[list[Tensor | None]], squares: Tensor) -> Tensor:
    """Which parameters at least two losses reach; all where none is.

    A gradient of None tells that a loss does not reach a parameter. Losses that come from one
    tensor (stacked, or heads joined in one output) reach every parameter, some with zeros: then
    it is the zeros that tell.
    """
    known = [[g is not None for g in row] for row in grads]
    by_zeros = all(all(row) for row in known)
    reached = squares != 0 if by_zeros else torch.tensor(known, device=squares.device)
    shared = reached.sum(0) > 1
    return shared | ~shared.any()


def _one_by_one(losses: Sequence[Tensor], parameters: list[Tensor]) -> list[list[Tensor | None]]:
    last = len(losses) - 1
    rows: list[list[Tensor | None]] = []
    for t, loss in enumerate(losses):
        if not loss.requires_grad:
            rows.append([None] * len(parameters))
            continue
        row: Any = torch.autograd.grad(loss, parameters, retain_graph=t < last, allow_unused=True)
        rows.append(list(row))
    return rows


def _batched(losses: Sequence[Tensor], parameters: list[Tensor]) -> list[list[Tensor | None]]:
    stacked = torch.stack(list(losses))
    eye = torch.eye(len(losses), dtype=stacked.dtype, device=stacked.device)
    found: Any = torch.autograd.grad(
        stacked, parameters, grad_outputs=eye, is_grads_batched=True, allow_unused=True
    )
    return [[None if g is None else g[t] for g in found] for t in range(len(losses))]


class FullBalance:
    """Loss balancing first, then gradient balancing of the weighted losses (``full``).

    Args:
        grad: the gradient part.
        loss: the loss part.
    """

    def __init__(self, grad: GradBalance | None = None, loss: LossBalance | None = None) -> None:
        """Store the two parts."""
        self.grad = GradBalance() if grad is None else grad
        self.loss = LossBalance() if loss is None else loss

    def state_dict(self) -> dict[str, Any]:
        """The loss part's state."""
        return self.loss.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.loss.load_state_dict(state)


class Precomputed(torch.autograd.Function):
    """A scalar whose gradients are known already: its backward pass only hands them out."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: list[Tensor | None], *parameters: Tensor) -> Tensor:
        """Return ``value``."""
        ctx.grads = grads
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """Return the stored gradients times ``g``."""
        scaled = [None if x is None else x * g.to(x.dtype) for x in ctx.grads]
        return (None, None, *scaled)
