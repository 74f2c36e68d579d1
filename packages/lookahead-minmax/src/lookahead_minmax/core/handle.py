"""The handle that undoes a registration, as `torch.utils.hooks` has one."""

from __future__ import annotations

from collections.abc import Callable


class Handle:
    """Undoes a registration."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo

    def remove(self) -> None:
        """Undo the registration; a second call does nothing."""
        if self._undo is not None:
            self._undo()
        self._undo = None
