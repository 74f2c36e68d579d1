"""Callbacks on synchronisations, and the handle that undoes a registration, as torch has one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial


class Handle:
    """Undoes a registration."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo

    def remove(self) -> None:
        """Undo the registration; a second call does nothing."""
        if self._undo is not None:
            self._undo()
        self._undo = None


class Callbacks:
    """What is called after a synchronisation, by the lowest level that it waits for."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[Callable[[], object], int]] = {}

    def add(self, callback: Callable[[], object], level: int) -> Handle:
        """Register a callback."""
        key = max(self._entries, default=-1) + 1
        self._entries[key] = (callback, level)
        return Handle(partial(self._entries.__delitem__, key))

    def call(self, reached: int) -> None:
        """Call what waits for a level up to `reached`."""
        for callback, level in list(self._entries.values()):
            if reached >= level:
                callback()
