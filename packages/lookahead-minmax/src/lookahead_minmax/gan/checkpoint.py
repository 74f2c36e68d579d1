"""A run on disk: everything that a GAN experiment needs to go on where it was interrupted."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch


class Stateful(Protocol):
    """What can be saved: modules, optimizers, lookahead, averages."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take a state over."""
        ...


def read(path: Path) -> dict[str, Any]:
    """Return what `Checkpoint.save` wrote: "recipe", "parts", "draws" and "numbers".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file.
    """
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        if set(state) == {"recipe", "parts", "draws", "numbers"}:
            return state
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError):
        pass
    raise ValueError(f"{path} is no checkpoint of a GAN run")


class Checkpoint:
    """Saves and restores the parts of a run, its random stream and its numbers.

    Args:
        path: the file.
        recipe: the run's settings, plain builtins; a file of other settings is refused.
        parts: what has a state, by name.
        draws: the run's random stream.
    """

    def __init__(
        self,
        path: Path,
        recipe: Mapping[str, Any],
        parts: Mapping[str, Stateful],
        draws: torch.Generator,
    ) -> None:
        self.path, self.recipe, self.parts, self.draws = path, dict(recipe), parts, draws

    def save(self, numbers: Mapping[str, Any]) -> None:
        """Write the file anew; an interruption leaves the last one whole."""
        state = {
            "recipe": self.recipe,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "draws": self.draws.get_state(),
            "numbers": dict(numbers),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".part")
        torch.save(state, temporary)
        os.replace(temporary, self.path)

    def load(self) -> dict[str, Any]:
        """Restore the parts and the stream, and return the numbers.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is that of other settings, or no checkpoint.
        """
        state = read(self.path)
        if state["recipe"] != self.recipe:
            other = sorted(
                key for key, value in self.recipe.items() if state["recipe"].get(key) != value
            )
            raise ValueError(f"{self.path} is of a run with other settings: {other}")
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self.draws.set_state(state["draws"])
        numbers: dict[str, Any] = state["numbers"]
        return numbers
