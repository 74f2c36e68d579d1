"""What a synchronisation does besides stepping back: the choices, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

VERSION = 1  # of the saved state
OPTIONS = ("slow_init", "state", "buffers", "nonfinite")
ROLLBACK = (
    "{} is not finite: all players went back to their slow weights and their optimizers' state was reset "
    "(further rollbacks are counted in `rollbacks`)"
)

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


def check_saved(state_dict: Mapping[str, Any]) -> None:
    """Check that a saved state is one of this version and whole.

    Raises:
        ValueError: it is not.
    """
    if state_dict.get("version") != VERSION:
        raise ValueError(f"version: saved {state_dict.get('version')!r}, here {VERSION}")
    counters = {"k", "alpha", "since_sync", "started", "sampler", "rounds", "moved", "rollbacks"}
    missing = (counters | {"options", "players"}) - set(state_dict)
    if missing:
        raise ValueError(f"the saved state has no entries {sorted(missing)}")
