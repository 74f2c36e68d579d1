"""Floating-point operations of a layer, from its sizes."""

from __future__ import annotations

from dataclasses import dataclass

from hypermixer.functional import crossover_length
from hypermixer.kernels import choose_direct
from hypermixer.mixing import HyperMixing


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs for one sequence of N tokens, mixed with itself.

    Attributes:
        parameters: trained numbers.
        direct: FLOPs of the direct form; N(4d² + 8dd')/H untied, with h = f and k = d'/H.
        factored: FLOPs of the factored form; 8N d²/H + 4d²d'/H² likewise.
        chosen: FLOPs of what ``algorithm`` takes.
        crossover: N*, from which the factored form is cheaper.
    """

    parameters: int
    direct: int
    factored: int
    chosen: int
    crossover: float


def layer_cost(layer: HyperMixing, length: int) -> LayerCost:
    """Count the matrix products' FLOPs (2 per multiply-add; no biases, norm or activations).

    Args:
        layer: the layer.
        length: N.

    Example:
        >>> cost = layer_cost(HyperMixing(32, 128, num_heads=4), 50)
        >>> cost.direct, cost.factored
        (460800, 135168)
    """
    heads, k, h = layer.w1.fc2_weight.shape
    f = layer.embed_dim // heads
    sides = 1 if layer.tied else 2
    project = 2 * length * f * h * sides
    generated = 2 * length * h * k * sides

    def total(key_direct: bool, query_direct: bool) -> int:
        shared = generated // sides if key_direct else 0
        key = shared + 2 * length * k * f if key_direct else 2 * length * h * f + 2 * k * h * f
        again = 0 if layer.tied and key_direct else generated // sides
        query = again + 2 * length * k * f if query_direct else 2 * length * h * f + 2 * k * h * f
        return heads * (project + key + query)

    tied = layer.tied
    return LayerCost(
        parameters=sum(p.numel() for p in layer.parameters()),
        direct=total(True, True),
        factored=total(False, False),
        chosen=total(*choose_direct(layer.algorithm, length, length, k, h, f, tied=tied)),
        crossover=crossover_length(k, h, f, tied=tied),
    )
