"""The interface of the authors' package, on this package's engine."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from denseformer.core.dwa import KeepsDtype
from denseformer.core.geometry import Geometry
from denseformer.core.plan import plan_of
from denseformer.core.run import DepthRun, check_stream


class _Row(nn.Module):
    """Holds one row under the key that the authors' ``nn.Linear`` had."""

    def __init__(self, size: int) -> None:
        super().__init__()
        weight = torch.zeros(1, size)
        weight[0, -1] = 1.0
        self.weight = nn.Parameter(weight)


class DWAModules(KeepsDtype):
    """Drop-in for the authors' class: same constructor, calls and state-dict keys ``alphas.{i}.weight``.

    Differences: any floating-point type, autocast keeps the stream's type, nothing is copied or kept after
    the last block, and blocks that come out of order or with another shape raise.

    Args:
        n_blocks: depth.
        dilation, period: see :class:`denseformer.DWA`.

    Raises:
        TypeError, ValueError: as :class:`denseformer.DWA`.
        RuntimeError: a block out of order.

    >>> dwa = DWAModules(2)
    >>> x = torch.ones(1, 3)
    >>> dwa.init_accumulators(x)
    >>> for i in range(2):
    ...     x = dwa(x + 1, block_idx=i)
    >>> x.tolist(), list(dwa.state_dict())
    ([[3.0, 3.0, 3.0]], ['alphas.0.weight', 'alphas.1.weight'])
    """

    def __init__(self, n_blocks: int, dilation: int = 1, period: int = 1) -> None:
        super().__init__()
        self.spec = Geometry.build(n_blocks, dilation, period)
        if not self.spec.rows:
            warnings.warn(
                f"period={period} is beyond n_blocks={n_blocks}: no average at all, a plain network",
                stacklevel=2,
            )
        self.plan = plan_of(self.spec)
        self.alphas = nn.ModuleDict(
            {str(i - 1): _Row(len(self.spec.sources(i))) for i in self.spec.rows}
        )
        self._run: DepthRun | None = None

    def init_accumulators(self, x: Tensor) -> None:
        """Start a forward pass from the embedding."""
        rows = [p.reshape(-1) for p in self.alphas.parameters()]
        weight = torch.cat(rows) if rows else torch.empty(0)
        check_stream(x, "x")
        self._run = DepthRun(self.plan, weight, x, [x])

    def __getstate__(self) -> dict[str, Any]:
        """Leave a pass that was not finished out of copies and pickles."""
        return {**self.__dict__, "_run": None}

    def forward(self, x: Tensor, block_idx: int) -> Tensor:
        """Take the output of block ``block_idx`` (from 0), return the next block's input."""
        run = self._run
        if run is None or run.depth != block_idx:
            expected = "init_accumulators(x)" if run is None else f"block_idx={run.depth}"
            raise RuntimeError(f"got block_idx={block_idx}, expected {expected}")
        y = run(x)
        if run.depth == self.spec.depth:
            self._run = None
        assert isinstance(y, Tensor)
        return y
