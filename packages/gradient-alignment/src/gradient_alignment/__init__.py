"""Score matching for classifiers: regularisers of input gradients, Hessian traces, and what gradients mean."""

from gradient_alignment.core.objectives import score, score_matching_loss
from gradient_alignment.core.regularizers import (
    AntiScoreMatching,
    GradientNorm,
    RegularizedLoss,
    Regularizer,
    ScoreMatching,
)
from gradient_alignment.core.targets import class_logit
from gradient_alignment.core.trace import hessian_diagonal, hessian_trace

__version__ = "0.1.0"

__all__ = [
    "AntiScoreMatching",
    "GradientNorm",
    "RegularizedLoss",
    "Regularizer",
    "ScoreMatching",
    "__version__",
    "class_logit",
    "hessian_diagonal",
    "hessian_trace",
    "score",
    "score_matching_loss",
]
