"""Score matching for classifiers: regularisers of input gradients, Hessian traces, and what gradients mean."""

from gradient_alignment.adapters.soften import SoftenReport, soften
from gradient_alignment.core.loss import RegularizedLoss
from gradient_alignment.core.objectives import score, score_matching_loss
from gradient_alignment.core.regularizers import (
    AntiScoreMatching,
    GradientNorm,
    Regularizer,
    ScoreMatching,
)
from gradient_alignment.core.targets import class_logit
from gradient_alignment.core.trace import hessian_diagonal, hessian_trace
from gradient_alignment.generate.density import alignment, density_ratio
from gradient_alignment.generate.sampling import GanTest, gan_test, sample
from gradient_alignment.interpret.fooling import (
    ShiftedLogits,
    ShiftInvariant,
    fit_shift,
    fool,
    linear_shift,
    shift_invariant,
    shift_sensitivity,
    train_fooled,
)
from gradient_alignment.interpret.perturb import Curve, pixel_perturbation
from gradient_alignment.interpret.saliency import input_gradient, reduce_channels, smoothgrad

__version__ = "0.1.0"

__all__ = [
    "AntiScoreMatching",
    "Curve",
    "GanTest",
    "GradientNorm",
    "RegularizedLoss",
    "Regularizer",
    "ScoreMatching",
    "ShiftInvariant",
    "ShiftedLogits",
    "SoftenReport",
    "__version__",
    "alignment",
    "class_logit",
    "density_ratio",
    "fit_shift",
    "fool",
    "gan_test",
    "hessian_diagonal",
    "hessian_trace",
    "input_gradient",
    "linear_shift",
    "pixel_perturbation",
    "reduce_channels",
    "sample",
    "score",
    "score_matching_loss",
    "shift_invariant",
    "shift_sensitivity",
    "smoothgrad",
    "soften",
    "train_fooled",
]
