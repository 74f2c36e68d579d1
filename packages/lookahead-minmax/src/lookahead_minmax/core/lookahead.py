"""Single-objective Lookahead (Zhang et al. 2019): the game with one player, as a torch optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from lookahead_minmax.core.minmax import LookaheadMinmax
from lookahead_minmax.core.schedule import KSampler
from lookahead_minmax.core.wrapper import OptimizerWrapper


class Lookahead(OptimizerWrapper):
    r"""k steps of any optimizer, then one step back: :math:`\tilde w \leftarrow \tilde w + \alpha (w - \tilde w)`.

    Drop-in for a torch optimizer: it shares `param_groups`, `state` and `defaults` with its base, so
    schedulers, `GradScaler` and hooks work on either. For several coupled players use `LookaheadMinmax`;
    two separate Lookaheads are another algorithm.

    Args:
        base: the optimizer that makes the fast steps.
        k: base steps between synchronisations, default 5 (see `LookaheadMinmax`).
        alpha: step towards the fast weights, default 0.5.
        **options: as for `LookaheadMinmax`: `slow_init`, `state`, `modules`, `buffers`, `slow_dtype`,
            `slow_device`, `foreach`, `nonfinite`.

    Raises:
        TypeError: `base` is not an optimizer.
        ValueError: as for `LookaheadMinmax`.

    Example:
        >>> import torch
        >>> w = torch.tensor([1.0], requires_grad=True)
        >>> optimizer = Lookahead(torch.optim.SGD([w], lr=0.5), k=2, alpha=0.5)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     (w**2 / 2).sum().backward()
        ...     optimizer.step()
        >>> w.item()  # 1 -> 0.5 -> 0.25, half way back
        0.625
    """

    _is_lookahead = True
    _key = "lookahead"

    def __init__(
        self,
        base: Optimizer,
        k: int | Sequence[int] | KSampler = 5,
        alpha: float | Sequence[float] = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(base)
        self.lookahead = LookaheadMinmax(base, k=k, alpha=alpha, **options)

    def _after_step(self, before: Any) -> None:
        self.lookahead.step()

    def sync(self, level: int | None = None) -> None:
        """Step back now."""
        self.lookahead.sync(level)

    @contextmanager
    def slow_weights(self, level: int = 1) -> Iterator[None]:
        """Put the slow weights in place inside a `with` block."""
        with self.lookahead.slow_weights(level=level):
            yield

    def _own_state(self) -> dict[str, Any]:
        return self.lookahead.state_dict()

    def _load_own_state(self, state: dict[str, Any]) -> None:
        self.lookahead.load_state_dict(state)

    def _describe(self) -> str:
        return f"k={self.lookahead.k}, alpha={self.lookahead.alpha}, "
