"""What a synchronisation does besides stepping back: the choices, by name."""

from __future__ import annotations

from typing import Literal, get_args

SlowInit = Literal["start", "first_sync"]
StatePolicy = Literal["keep", "reset", "interpolate"]
BufferPolicy = Literal["keep", "interpolate"]
NonfinitePolicy = Literal["ignore", "raise", "rollback"]


def check_policies(slow_init: str, state: str, buffers: str, nonfinite: str) -> None:
    """Check the four choices of `LookaheadMinmax`.

    Raises:
        ValueError: a name is unknown; the message lists the known ones.
    """
    for name, value, choices in (
        ("slow_init", slow_init, SlowInit),
        ("state", state, StatePolicy),
        ("buffers", buffers, BufferPolicy),
        ("nonfinite", nonfinite, NonfinitePolicy),
    ):
        if value not in get_args(choices):
            raise ValueError(f"{name} must be one of {get_args(choices)}, got {value!r}")
