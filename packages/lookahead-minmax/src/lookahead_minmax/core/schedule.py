"""When a round ends a period: the numbers k and alpha of every level, checked, and random periods."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class KSampler(Protocol):
    """Draws the length of the next period, once for all players, after every synchronisation."""

    def sample(self) -> int:
        """Return the number of rounds until the next synchronisation."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to draw the same numbers."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        ...


class UniformK:
    """Periods drawn uniformly from {low, ..., high}; the authors' code offers {3, ..., 1000}.

    Args:
        low: smallest period, at least 1.
        high: largest period, included.
        seed: of the private random stream.

    Raises:
        TypeError: a bound is not an integer.
        ValueError: not 1 <= low <= high.

    Example:
        >>> k = UniformK(3, 5, seed=0)
        >>> sorted({k.sample() for _ in range(50)})
        [3, 4, 5]
    """

    def __init__(self, low: int = 3, high: int = 1000, seed: int = 0) -> None:
        for name, value in (("low", low), ("high", high)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
        if not 1 <= low <= high:
            raise ValueError(f"UniformK needs 1 <= low <= high, got low={low}, high={high}")
        self.low, self.high = low, high
        self._random = random.Random(seed)

    def sample(self) -> int:
        """Return the next period."""
        return self._random.randint(self.low, self.high)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the stream as plain lists and numbers."""
        version, internal, gauss = self._random.getstate()
        return {"low": self.low, "high": self.high, "random": [version, list(internal), gauss]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the stream of another sampler."""
        version, internal, gauss = state["random"]
        self.low, self.high = state["low"], state["high"]
        self._random.setstate((version, tuple(internal), gauss))

    def __repr__(self) -> str:
        """Show the bounds."""
        return f"UniformK({self.low}, {self.high})"


def check_periods(k: int | Sequence[int]) -> list[int]:
    """Return the periods of all levels as a list.

    Raises:
        TypeError: an entry is not an int (a bool is none).
        ValueError: an entry is below 1, or a level is not a larger multiple of the level below it.
    """
    periods: list[Any] = list(k) if isinstance(k, (list, tuple)) else [k]
    for period in periods:
        if isinstance(period, bool) or not isinstance(period, int):
            raise TypeError(f"k must be an int, a sequence of ints or a KSampler, got {period!r}")
        if period < 1:
            raise ValueError(f"k must be at least 1, got {period}")
    if not periods:
        raise ValueError("k is an empty sequence: give one period for each level")
    for level, (inner, outer) in enumerate(pairwise(periods), start=1):
        if outer <= inner or outer % inner:
            raise ValueError(
                f"k of level {level + 1} must be a larger multiple of k of level {level}, "
                f"got {outer} and {inner}"
            )
    return periods


def check_alphas(
    alpha: float | Sequence[float] | Mapping[str, float], players: Iterable[str], levels: int
) -> list[dict[str, float]]:
    """Return alpha as one mapping {player: value} for each level.

    Args:
        alpha: one number, one for each level, or one for each player.
        players: the names of the players.
        levels: the number of levels.

    Raises:
        KeyError: a mapping has unknown or missing names.
        TypeError: a value is not a number.
        ValueError: a value is outside (0, 1], or the number of values is not the number of levels.
    """
    players = list(players)
    table: list[dict[str, Any]]
    if isinstance(alpha, Mapping):
        if set(alpha) != set(players):
            raise KeyError(
                f"alpha has the names {sorted(alpha)}, the players are {sorted(players)}"
            )
        table = [dict(alpha) for _ in range(levels)]
    elif isinstance(alpha, (list, tuple)):
        if len(alpha) != levels:
            raise ValueError(f"alpha has {len(alpha)} values, k has {levels} levels")
        table = [dict.fromkeys(players, value) for value in alpha]
    else:
        table = [dict.fromkeys(players, alpha) for _ in range(levels)]
    for row in table:
        for value in row.values():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"alpha must be a number, got {value!r}")
            if math.isnan(value) or not 0 < value <= 1:
                raise ValueError(f"alpha must be in (0, 1], got {value}")
    return table


class Schedule:
    """Counts rounds for every level and knows which level is due, and by how much it steps back.

    Args:
        k: periods, see `check_periods`, or a sampler of them.
        alpha: see `check_alphas`.
        players: the names of the players.
    """

    sampler: KSampler | None
    periods: list[int]

    def __init__(
        self,
        k: int | Sequence[int] | KSampler,
        alpha: float | Sequence[float] | Mapping[str, float],
        players: Iterable[str],
    ) -> None:
        self.players = list(players)
        self._set_periods(k)
        self.set_alpha(alpha)
        self.reset()

    def _set_periods(self, k: int | Sequence[int] | KSampler) -> None:
        if isinstance(k, KSampler):
            self.sampler, self.periods = k, check_periods(k.sample())
        else:
            self.sampler, self.periods = None, check_periods(k)

    @property
    def levels(self) -> int:
        """Number of nested levels."""
        return len(self.periods)

    def get_k(self) -> int | list[int] | KSampler:
        """Return k in the form in which it was given."""
        if self.sampler is not None:
            return self.sampler
        return self.periods[0] if self.levels == 1 else list(self.periods)

    def set_k(self, k: int | Sequence[int] | KSampler) -> None:
        """Change the periods, not the number of levels."""
        before = (self.sampler, self.periods)
        self._set_periods(k)
        if len(self.periods) != len(before[1]):
            self.sampler, self.periods = before
            raise ValueError(f"k must keep its {self.levels} levels, got {k!r}")

    def get_alpha(self) -> float | list[float] | dict[str, float]:
        """Return alpha in the form in which it was given."""
        if any(len(set(row.values())) > 1 for row in self.alphas):
            return dict(self.alphas[0])
        values = [next(iter(row.values())) for row in self.alphas]
        return values[0] if self.levels == 1 else values

    def set_alpha(self, alpha: float | Sequence[float] | Mapping[str, float]) -> None:
        """Change the factors."""
        self.alphas = check_alphas(alpha, self.players, self.levels)

    def reset(self) -> None:
        """Set every counter to zero."""
        self.since = [0] * self.levels
        self.started = [False] * self.levels

    def tick(self) -> None:
        """Count a round."""
        self.since = [since + 1 for since in self.since]

    def is_due(self, level: int) -> bool:
        """Tell whether a level (0-based) has reached its period."""
        return self.since[level] >= self.periods[level]

    def check_level(self, level: int) -> None:
        """Refuse a level (1-based) that there is not."""
        if not 1 <= level <= self.levels:
            raise ValueError(f"level must be in 1..{self.levels}, got {level}")

    def due(self) -> int:
        """Return how many levels to synchronise: the highest that is due and all below it."""
        return max((level + 1 for level in range(self.levels) if self.is_due(level)), default=0)

    def undo_period(self) -> None:
        """Take the rounds since the last synchronisation of level 1 out of every level's count."""
        lost = self.since[0]
        self.since = [since - lost for since in self.since]

    def finish(self, level: int) -> None:
        """Begin the next period of a level and of those below it."""
        self.started[level] = True
        self.since[: level + 1] = [0] * (level + 1)
        if self.sampler is not None:
            self.periods = check_periods(self.sampler.sample())

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as plain builtins."""
        return {
            "k": list(self.periods),
            "alpha": [dict(row) for row in self.alphas],
            "since_sync": list(self.since),
            "started": list(self.started),
            "sampler": None if self.sampler is None else self.sampler.state_dict(),
        }

    def mismatches(self, saved: Mapping[str, Any]) -> list[str]:
        """Say in what a saved `state_dict` does not fit."""
        found = []
        if len(saved["k"]) != self.levels:
            found.append(f"levels: saved {len(saved['k'])}, here {self.levels}")
        if (saved["sampler"] is None) != (self.sampler is None):
            found.append("k: one of saved and here is a sampler, the other is not")
        return found

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; `mismatches` must have found nothing."""
        self.periods = list(saved["k"])
        self.alphas = [dict(row) for row in saved["alpha"]]
        self.since, self.started = list(saved["since_sync"]), list(saved["started"])
        if self.sampler is not None:
            self.sampler.load_state_dict(saved["sampler"])
