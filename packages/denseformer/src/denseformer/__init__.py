"""Depth-weighted averaging for any stack of blocks."""

from denseformer.core.dwa import DWA

__version__ = "0.1.0"
__all__ = ["DWA"]
