"""A stack of blocks with depth-weighted averages, for code that builds its own network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as checkpoint_block

from denseformer.core.dwa import DWA
from denseformer.models.recompute import recomputing

CHECKPOINT = (False, True, "mix")


def check_checkpoint(value: bool | str) -> bool | str:
    """Return a valid ``checkpoint`` argument."""
    if not any(value is c or value == c == "mix" for c in CHECKPOINT):  # 1 is none of them
        raise ValueError(f"checkpoint must be False, True or 'mix', got {value!r}")
    return value


class DenseStack(nn.Module):
    """Blocks in sequence, each followed by its depth-weighted average.

    Replaces an ``nn.Sequential`` or the loop over an ``nn.ModuleList``. Further arguments go to every
    block. Where blocks return tuples, element 0 is averaged and the rest is collected: the result is then
    ``(y, [rest of block 1, ...])``.

    Args:
        blocks: whole residual blocks. One module may appear several times (tied weights).
        dilation, period: see :class:`DWA`; further keyword arguments go there too.
        checkpoint: ``True``: while gradients are on, every block is recomputed in backward and so is the mix
            before it; what stays is one X per block. ``"mix"``: only the mix is recomputed.

    Raises:
        ValueError: no block, or another ``checkpoint``.

    >>> stack = DenseStack([nn.Linear(4, 4) for _ in range(3)])
    >>> stack(torch.ones(2, 4)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        dilation: int = 1,
        period: int = 1,
        *,
        checkpoint: bool | str = False,
        **dwa_kwargs: Any,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.checkpoint = check_checkpoint(checkpoint)
        if not len(self.blocks):
            raise ValueError("blocks must hold at least one module")
        self.dwa = DWA(len(self.blocks), dilation, period, **dwa_kwargs)

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return Y_d, or ``(Y_d, rests)`` where the blocks return tuples."""
        save = bool(self.checkpoint) and torch.is_grad_enabled()
        run = self.dwa.begin(x, recompute=save)
        rests = []
        for block in self.blocks:
            with recomputing(run):
                if save and self.checkpoint is True:
                    out = checkpoint_block(block, x, *args, use_reentrant=False, **kwargs)
                else:
                    out = block(x, *args, **kwargs)
            if isinstance(out, tuple):
                rests.append(out[1:])
                out = out[0]
            x = run(out)
        return (x, rests) if rests else x

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> nn.Module:
        return self.blocks[index]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.blocks)
