"""Whether a task's data go to the device whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sequel.scenarios import Data

__all__ = ["wanted"]


def wanted(preload: bool | str, data: Data, free: Callable[[], float]) -> bool:
    """``"auto"``: where the data take at most half of the device's free bytes."""
    if preload != "auto":
        return bool(preload)
    return 2 * (data.x.nbytes + data.y.nbytes + data.t.nbytes) <= free()
