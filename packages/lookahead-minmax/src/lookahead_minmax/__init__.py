"""Lookahead-Minmax: joint lookahead for games, around the optimizers you already have."""

from lookahead_minmax.core.averages import EMA, UniformAverage, recalibrate
from lookahead_minmax.core.extragradient import ExtraGradient
from lookahead_minmax.core.handle import Handle
from lookahead_minmax.core.lookahead import Lookahead
from lookahead_minmax.core.minmax import LookaheadMinmax
from lookahead_minmax.core.optimistic import Optimistic
from lookahead_minmax.core.schedule import KSampler, UniformK

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "ExtraGradient",
    "Handle",
    "KSampler",
    "Lookahead",
    "LookaheadMinmax",
    "Optimistic",
    "UniformAverage",
    "UniformK",
    "__version__",
    "recalibrate",
]
