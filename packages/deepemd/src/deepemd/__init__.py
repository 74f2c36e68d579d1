"""Earth Mover's Distance of point clouds: fast, differentiable, certified, with the network included.

``deepemd.emd_loss(pred, target)`` is the training loss, ``deepemd.match(x, y)`` gives the matching and
its bounds, and ``deepemd.DeepEMD.from_pretrained("tiny")`` the network.
"""

from deepemd.api import EMDLoss, emd, emd_loss, explain, match, pairwise_emd
from deepemd.core.errors import NotConvergedError
from deepemd.core.model import DeepEMD
from deepemd.core.output import EMDOutput

__version__ = "0.1.0"

__all__ = [
    "DeepEMD",
    "EMDLoss",
    "EMDOutput",
    "NotConvergedError",
    "emd",
    "emd_loss",
    "explain",
    "match",
    "pairwise_emd",
]
