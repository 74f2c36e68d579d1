"""What can go wrong, each as a subclass of the built-in error that a caller would catch."""

from __future__ import annotations


class InfeasibleDesign(ValueError):
    """No design satisfies the constraints, or the initial one does not."""


class DegenerateData(ValueError):
    """The events carry no signal: x or y is the same in all of them."""


class SimulationError(RuntimeError):
    """A simulator failed or returned something unusable.

    Attributes:
        design: index of the design in its iteration, or None.
        seed: seed of the failed call, to reproduce it, or None.
        reason: what happened.

    Example:
        >>> print(SimulationError(3, 17, "y has NaN"))
        design 3, seed 17: y has NaN
    """

    def __init__(self, design: int | None, seed: int | None, reason: str) -> None:
        super().__init__(design, seed, reason)
        self.design, self.seed, self.reason = design, seed, reason

    def __str__(self) -> str:
        """Return where it happened and why."""
        where = [f"design {self.design}"] if self.design is not None else []
        where += [f"seed {self.seed}"] if self.seed is not None else []
        return ", ".join(where) + (": " if where else "") + self.reason


class SurrogateError(RuntimeError):
    """The surrogate proposed a design that is not finite, twice."""


class CheckpointMismatch(ValueError):
    """The folder holds a run of another configuration."""


class CheckpointLocked(OSError):
    """Another process is writing to the folder."""


class Geant4DataMissing(OSError):
    """Geant4's data sets are not on this machine."""


class MissingExtra(ImportError):
    """A library of an extra of this package is not installed."""


def missing(library: str, extra: str) -> MissingExtra:
    """Return the error that says which extra brings a library.

    Example:
        >>> print(missing("matplotlib", "plot"))
        this needs matplotlib: pip install "mi-surrogates[plot]"
    """
    return MissingExtra(f'this needs {library}: pip install "mi-surrogates[{extra}]"')
