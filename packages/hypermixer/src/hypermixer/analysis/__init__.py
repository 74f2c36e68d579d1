"""Looking at a layer: what depends on what, and what it costs."""

from hypermixer.analysis.cost import LayerCost, layer_cost
from hypermixer.analysis.memory import MemoryUse, measure_memory
from hypermixer.analysis.pseudo_attention import pseudo_attention

__all__ = ["LayerCost", "MemoryUse", "layer_cost", "measure_memory", "pseudo_attention"]
