"""Looking at a layer: what depends on what, and what it costs."""

from hypermixer.analysis.cost import LayerCost, layer_cost
from hypermixer.analysis.pseudo_attention import pseudo_attention

__all__ = ["LayerCost", "layer_cost", "pseudo_attention"]
