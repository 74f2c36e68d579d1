"""The token mixers that the paper compares with, small and clean, in one residual structure."""

from hypermixer.baselines.encoder import (
    MixerClassifier,
    MixerLayer,
    count_parameters,
    match_parameters,
)
from hypermixer.baselines.mixers import (
    Attention,
    FourierMixing,
    GatedMLPMixing,
    LinearAttention,
    MLPMixing,
    StaticMixing,
    make_mixer,
    mixer_names,
)

__all__ = [
    "Attention",
    "FourierMixing",
    "GatedMLPMixing",
    "LinearAttention",
    "MLPMixing",
    "MixerClassifier",
    "MixerLayer",
    "StaticMixing",
    "count_parameters",
    "make_mixer",
    "match_parameters",
    "mixer_names",
]
