"""The one exception of this package; everything else is a built-in with the fix in its message."""

from __future__ import annotations


class NotConvergedError(RuntimeError):
    """A solver stopped before its certificate was met, and ``strict=True`` was asked for."""
