"""Exceptions and warnings; each error subclasses the built-in that a caller would catch."""

from __future__ import annotations


class KeyMismatchError(KeyError):
    """The tensors of a model are not those of the base."""

    def __str__(self) -> str:
        """Return the message as it is (KeyError would print its repr)."""
        return str(self.args[0]) if self.args else ""


class ShapeMismatchError(ValueError):
    """A tensor has another shape in a model than in the base."""


class NonFiniteError(ValueError):
    """An input holds NaN or infinity."""


class ZeroTaskVectorError(ValueError):
    """The merged task vector is zero, so that the norm ratio of alpha is undefined."""


class DepthError(ValueError):
    """The depth of the blocks cannot be read off the parameter names."""


class AmbiguousDepthError(DepthError):
    """Two readings of the parameter names are equally good."""


class UnsupportedDtypeError(TypeError):
    """A tensor is quantised, or of a dtype without arithmetic; dequantise it first."""


class CheckpointError(OSError):
    """A checkpoint file is damaged, incomplete or unsafe to read."""


class UnrelatedBaseWarning(UserWarning):
    """The update of a model is large against the base: was it fine-tuned from this base?"""


class LargeAlphaWarning(UserWarning):
    """The norm ratio of alpha is above 1 (very sparse merged vectors)."""


class OverflowWarning(UserWarning):
    """The result exceeds the range of its dtype (float16)."""


class SkippedTensorsWarning(UserWarning):
    """With strict=False, tensors that a model lacks keep their base values."""
