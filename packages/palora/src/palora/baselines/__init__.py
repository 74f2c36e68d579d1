"""Other ways to learn a continuum of trade-offs, for side-by-side study.

Each is a module called ``model(lam, *inputs)``. For gradient-based multi-task aggregators (MGDA,
CAGrad, PCGrad, ...) use TorchJD.
"""

from palora.baselines.cosmos import COSMOS, cosmos_loss
from palora.baselines.linear import LinearScalarization
from palora.baselines.pamal import PaMaL
from palora.baselines.phn import PHN

__all__ = ["COSMOS", "PHN", "LinearScalarization", "PaMaL", "cosmos_loss"]
