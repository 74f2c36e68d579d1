"""Depth-weighted averaging for any stack of blocks."""

from denseformer.compat import DWAModules
from denseformer.core.dwa import DWA
from denseformer.core.geometry import Geometry
from denseformer.core.run import DepthRun
from denseformer.models.gains import GainedResidual, SkipsWithGains
from denseformer.models.recompute import recomputing
from denseformer.models.stack import DenseStack
from denseformer.models.surgery import densify, report, skip_block, undensify
from denseformer.optim import param_groups

__version__ = "0.1.0"
__all__ = [
    "DWA",
    "DWAModules",
    "DenseStack",
    "DepthRun",
    "GainedResidual",
    "Geometry",
    "SkipsWithGains",
    "densify",
    "param_groups",
    "recomputing",
    "report",
    "skip_block",
    "undensify",
]
