"""Low-curvature neural networks from the network that you already have.

``lcnn.convert(model, example_input)`` replaces activations, batch norms and convolutions by forms of
controlled curvature and slope, ``lcnn.param_groups`` feeds the optimizer, ``lcnn.LCNNLoss`` is the objective,
``lcnn.curvature`` measures, ``lcnn.restore`` gives a plain network back.
"""

from lcnn.adapters.calibrate import calibrate
from lcnn.adapters.convert import convert
from lcnn.adapters.report import Entry, Report
from lcnn.adapters.restore import load_pretrained, restore
from lcnn.core.activation import CenteredSoftplus, centered_softplus
from lcnn.core.bound import Bound, hessian_bound
from lcnn.core.loss import LCNNLoss, Penalty, param_groups
from lcnn.core.norm import (
    LipschitzBatchNorm1d,
    LipschitzBatchNorm2d,
    LipschitzBatchNorm3d,
    LipschitzNorm,
    LipschitzSyncBatchNorm,
    from_batchnorm,
)
from lcnn.core.operator import conv_operator_norm
from lcnn.core.parametrize import ConvSpectralNorm, conv_spectral_norm, linear_spectral_norm
from lcnn.core.penalty import (
    cure_penalty,
    curvature_surrogate,
    gradnorm_penalty,
    jvp_penalty,
    penalty,
)
from lcnn.recipes import models
from lcnn.study.attacks import pgd_l2, robust_accuracy
from lcnn.study.curvature import CurvatureResult, curvature, gradient_stability

__version__ = "0.1.0"

__all__ = [
    "Bound",
    "CenteredSoftplus",
    "ConvSpectralNorm",
    "CurvatureResult",
    "Entry",
    "LCNNLoss",
    "LipschitzBatchNorm1d",
    "LipschitzBatchNorm2d",
    "LipschitzBatchNorm3d",
    "LipschitzNorm",
    "LipschitzSyncBatchNorm",
    "Penalty",
    "Report",
    "calibrate",
    "centered_softplus",
    "conv_operator_norm",
    "conv_spectral_norm",
    "convert",
    "cure_penalty",
    "curvature",
    "curvature_surrogate",
    "from_batchnorm",
    "gradient_stability",
    "gradnorm_penalty",
    "hessian_bound",
    "jvp_penalty",
    "linear_spectral_norm",
    "load_pretrained",
    "models",
    "param_groups",
    "penalty",
    "pgd_l2",
    "restore",
    "robust_accuracy",
]
