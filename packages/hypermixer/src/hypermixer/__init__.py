"""HyperMixer: linear-time token mixing by hypernetworks, where attention stands now.

:class:`HyperMixing` is the layer, :class:`HyperMixingAttention` the same under
``nn.MultiheadAttention``'s signature, and :func:`convert` puts it into a model you already have.
"""

from hypermixer.adapters import Report, convert, from_reference
from hypermixer.attention import HyperMixingAttention
from hypermixer.layers import HyperConformerLayer, HyperMixerEncoderLayer
from hypermixer.mixing import HyperMixing
from hypermixer.models import (
    HyperMixerConfig,
    HyperMixerEncoder,
    HyperMixerForSequenceClassification,
)
from hypermixer.state import MixingState

__version__ = "0.1.0"

__all__ = [
    "HyperConformerLayer",
    "HyperMixerConfig",
    "HyperMixerEncoder",
    "HyperMixerEncoderLayer",
    "HyperMixerForSequenceClassification",
    "HyperMixing",
    "HyperMixingAttention",
    "MixingState",
    "Report",
    "convert",
    "from_reference",
]
