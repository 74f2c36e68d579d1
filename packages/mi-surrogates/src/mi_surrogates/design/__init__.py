"""Designs: their space, local surrogates and the trust region."""

from mi_surrogates.design.choice import Choice, Relaxed
from mi_surrogates.design.space import DesignSpace, Parameter, Soft, box_penalty
from mi_surrogates.design.surrogate import (
    EnsembleSurrogate,
    GPSurrogate,
    MLPSurrogate,
    QuadraticSurrogate,
    make_surrogate,
)
from mi_surrogates.design.trust import Region, Step, ascend

__all__ = [
    "Choice",
    "DesignSpace",
    "EnsembleSurrogate",
    "GPSurrogate",
    "MLPSurrogate",
    "Parameter",
    "QuadraticSurrogate",
    "Region",
    "Relaxed",
    "Soft",
    "Step",
    "ascend",
    "box_penalty",
    "make_surrogate",
]
