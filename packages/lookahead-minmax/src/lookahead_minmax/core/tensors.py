"""Element-wise arithmetic on lists of tensors: the fastest path for each device, local shards of DTensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def local(tensor: Tensor) -> Tensor:
    """Return the shard of a DTensor that this process holds; any other tensor as it is.

    The rules of this package are element-wise, so each rank applies them to its own shard without
    communication.
    """
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def pull_back(
    fast: Sequence[Tensor], slow: Sequence[Tensor], alpha: float, foreach: bool | None
) -> None:
    """Set `slow <- slow + alpha (fast - slow)` and then `fast <- slow`, in place (Algorithm 1).

    One pass over each tensor on a CPU, where the second operation finds it in the cache; grouped
    (`torch._foreach_*`) on an accelerator, where launches cost more than traffic. The interpolation
    happens in the slow copy's type; alpha = 1 leaves the fast weights as they are, bit for bit,
    unless the slow copies are of a shorter type.

    Args:
        fast: the live weights.
        slow: their slow copies, of the same shapes; type and device may differ.
        alpha: in (0, 1].
        foreach: forces the grouped path (True) or the loop (False); None chooses by device.
    """
    loop: list[tuple[Tensor, Tensor]] = []
    grouped: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for fast_tensor, slow_tensor in zip(map(local, fast), map(local, slow), strict=True):
        alike = fast_tensor.device == slow_tensor.device and fast_tensor.dtype == slow_tensor.dtype
        if alike and (fast_tensor.device.type != "cpu" if foreach is None else foreach):
            grouped[fast_tensor.device, fast_tensor.dtype].append((fast_tensor, slow_tensor))
        else:
            loop.append((fast_tensor, slow_tensor))
    for fast_tensor, slow_tensor in loop:
        slow_tensor.lerp_(fast_tensor.to(slow_tensor.device, slow_tensor.dtype), alpha)
        fast_tensor.copy_(slow_tensor, non_blocking=True)
    for pairs in grouped.values():
        fast_list, slow_list = map(list, zip(*pairs, strict=True))
        torch._foreach_lerp_(slow_list, fast_list, alpha)
        torch._foreach_copy_(fast_list, slow_list)


def copy_all(destination: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """Copy each source into its destination, in place."""
    for into, tensor in zip(map(local, destination), map(local, source), strict=True):
        into.copy_(tensor, non_blocking=True)


def all_finite(tensor: Tensor) -> bool:
    """Tell whether every element is finite; waits for the device."""
    return bool(torch.isfinite(local(tensor)).all())
