"""Sequence parallelism: every rank holds a slice of the tokens, and only the states travel.

Plain mixing needs one all-reduce of S (H·h·f numbers a sequence, whatever the length) forward and one
of its gradient backward. Block-causal mixing needs the sum of the states of the earlier ranks.

The gradients of a rank's parameters are those of its own tokens' part of the loss: *sum* them over
ranks for the gradient of the summed loss. DDP and FSDP average, so there scale the loss by the number
of ranks (or define it as a mean over ranks).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class GroupRef:
    """Holds a process group so that ``copy.deepcopy`` of a module shares it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupRef:
        """Return self: a communicator is not copied."""
        return self

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Refuse pickling with a message that says what to save instead."""
        raise TypeError("a module with a process_group cannot be pickled; save its state_dict")


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ref: GroupRef) -> Tensor:
        ctx.ref = ref
        total = x.contiguous().clone()
        dist.all_reduce(total, group=ref.group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllReduceSum.apply(grad, ctx.ref), None  # type: ignore[no-untyped-call]


def _gather(x: Tensor, ref: GroupRef) -> Tensor:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(ref.group))]
    dist.all_gather(parts, x, group=ref.group)
    return torch.stack(parts)


class _ExclusiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ref: GroupRef, reverse: bool) -> Tensor:
        ctx.ref, ctx.reverse = ref, reverse
        rank = dist.get_rank(ref.group)
        parts = _gather(x, ref)
        return (parts[rank + 1 :] if reverse else parts[:rank]).sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        passed = _ExclusiveScan.apply(grad, ctx.ref, not ctx.reverse)  # type: ignore[no-untyped-call]
        return passed, None, None


def all_reduce_sum(x: Tensor, ref: GroupRef) -> Tensor:
    """Return Σ over ranks of x; the gradient is summed over ranks likewise."""
    total: Tensor = _AllReduceSum.apply(x, ref)  # type: ignore[no-untyped-call]
    return total


def exclusive_scan(x: Tensor, ref: GroupRef) -> Tensor:
    """Return Σ of x over the ranks before this one."""
    before: Tensor = _ExclusiveScan.apply(x, ref, False)  # type: ignore[no-untyped-call]
    return before


def rank_lengths(length: int, ref: GroupRef, device: torch.device) -> list[int]:
    """Return the number of tokens that every rank holds."""
    gathered = _gather(torch.tensor([length], device=device), ref)
    return [int(n) for n in gathered.flatten().tolist()]
