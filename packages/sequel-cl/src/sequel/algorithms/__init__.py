"""The algorithms, each a frozen dataclass of hyper-parameters over one backend-free definition."""

from sequel.algorithms.base import Algorithm, Batch, Context, Info, MemorySpec
from sequel.algorithms.distill import LFL, LwF
from sequel.algorithms.ewc import EWC
from sequel.algorithms.icarl import ICaRL
from sequel.algorithms.kcl import KCL
from sequel.algorithms.lamaml import LaMAML
from sequel.algorithms.mas import MAS
from sequel.algorithms.mcsgd import MCSGD
from sequel.algorithms.naive import Joint, Naive, StableSGD
from sequel.algorithms.projection import AGEM, GEM
from sequel.algorithms.quadratic import Quadratic
from sequel.algorithms.replay import DER, ER, DERpp
from sequel.algorithms.si import SI

ALGORITHMS: dict[str, type[Algorithm]] = {
    "naive": Naive,
    "joint": Joint,
    "stablesgd": StableSGD,
    "ewc": EWC,
    "si": SI,
    "mas": MAS,
    "lwf": LwF,
    "lfl": LFL,
    "er": ER,
    "agem": AGEM,
    "gem": GEM,
    "der": DER,
    "derpp": DERpp,
    "mcsgd": MCSGD,
    "lamaml": LaMAML,
    "icarl": ICaRL,
    "kcl": KCL,
}

__all__ = [
    "AGEM",
    "ALGORITHMS",
    "DER",
    "ER",
    "EWC",
    "GEM",
    "KCL",
    "LFL",
    "MAS",
    "MCSGD",
    "SI",
    "Algorithm",
    "Batch",
    "Context",
    "DERpp",
    "ICaRL",
    "Info",
    "Joint",
    "LaMAML",
    "LwF",
    "MemorySpec",
    "Naive",
    "Quadratic",
    "StableSGD",
]
