"""LiNeS: layer-increasing scaling of fine-tuned and merged checkpoints, in memory or out of core.

`edit` restores what fine-tuning forgot, `merge` merges fine-tuned models with less interference.
"""

from .adapter import adapted
from .depth import Block, DepthMap
from .errors import (
    AmbiguousDepthError,
    CheckpointError,
    DepthError,
    KeyMismatchError,
    LargeAlphaWarning,
    NonFiniteError,
    OverflowWarning,
    ShapeMismatchError,
    SkippedTensorsWarning,
    UnrelatedBaseWarning,
    UnsupportedDtypeError,
    ZeroTaskVectorError,
)
from .io.plan import MergePlan
from .io.report import MergeReport
from .io.stream import merge_files, plan_files, run_recipe, sweep_files
from .lines import auto_alpha, edit, edit_, merge
from .masks import PackedMasks, magnitude_masks, tall_masks
from .merges import BaseMerge, Merge, register_merge
from .schedule import scales
from .soups import GreedySoup, greedy_soup, rewarded_soup, uniform_soup, wise_ft
from .tune import (
    BETA_GRID,
    GAMMA_GRID,
    TIES_GRID,
    ScaledModel,
    Tuner,
    TuneResult,
    forgetting_objective,
    tune,
)
from .vectors import TaskVector

__version__ = "0.1.0"

__all__ = [
    "BETA_GRID",
    "GAMMA_GRID",
    "TIES_GRID",
    "AmbiguousDepthError",
    "BaseMerge",
    "Block",
    "CheckpointError",
    "DepthError",
    "DepthMap",
    "GreedySoup",
    "KeyMismatchError",
    "LargeAlphaWarning",
    "Merge",
    "MergePlan",
    "MergeReport",
    "NonFiniteError",
    "OverflowWarning",
    "PackedMasks",
    "ScaledModel",
    "ShapeMismatchError",
    "SkippedTensorsWarning",
    "TaskVector",
    "TuneResult",
    "Tuner",
    "UnrelatedBaseWarning",
    "UnsupportedDtypeError",
    "ZeroTaskVectorError",
    "__version__",
    "adapted",
    "auto_alpha",
    "edit",
    "edit_",
    "forgetting_objective",
    "greedy_soup",
    "magnitude_masks",
    "merge",
    "merge_files",
    "plan_files",
    "register_merge",
    "rewarded_soup",
    "run_recipe",
    "scales",
    "sweep_files",
    "tall_masks",
    "tune",
    "uniform_soup",
    "wise_ft",
]
