"""How each output depends on each input, which takes the place of an attention map."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hypermixer._checks import one_of, positive


def pseudo_attention(
    layer: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    method: str = "exact",
    num_samples: int = 1,
    chunk_size: int = 256,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return E[i, j] = ‖∂ output_i / ∂ input_j‖ (Frobenius).

    HyperMixing has no attention matrix; this is what the paper plots instead. It costs M·d
    vector-Jacobian products ("exact") or M per probe ("probe"), and M·N numbers.

    Args:
        layer: any map (B, N, d) → (B, M, d'), such as a :class:`hypermixer.HyperMixing`.
        x: (B, N, d).
        method: "exact", or "probe": the root mean square of ‖J_ijᵀ u‖·√d' over random unit vectors
            u, an estimate of the same norm.
        num_samples: probes of each output token.
        chunk_size: vector-Jacobian products at a time.
        generator: of the probes.

    Returns:
        (B, M, N), without a graph.

    Raises:
        ValueError: for an unknown method or sizes that are not positive.

    Example:
        >>> doubled = pseudo_attention(lambda x: 2 * x, torch.zeros(1, 2, 3, dtype=torch.float64))
        >>> doubled.square().tolist()  # doctest: +NUMBER
        [[[12.0, 0.0], [0.0, 12.0]]]
    """
    one_of("method", method, ("exact", "probe"))
    positive("num_samples", num_samples)
    positive("chunk_size", chunk_size)
    return torch.stack(
        [_one(layer, row, method, num_samples, chunk_size, generator) for row in x.detach()]
    )


def _one(
    layer: Callable[[Tensor], Tensor],
    x: Tensor,
    method: str,
    num_samples: int,
    chunk_size: int,
    generator: torch.Generator | None,
) -> Tensor:
    y, pull = torch.func.vjp(lambda t: layer(t.unsqueeze(0)).squeeze(0), x)  # type: ignore[misc]
    outputs, width = y.shape
    per_token = width if method == "exact" else num_samples
    energy = x.new_zeros(outputs, x.shape[0])
    total = outputs * per_token
    for start in range(0, total, chunk_size):
        number = torch.arange(start, min(start + chunk_size, total), device=x.device)
        token = number // per_token
        probes = x.new_zeros(len(number), outputs, width)
        if method == "exact":
            probes[torch.arange(len(number)), token, number % per_token] = 1.0
        else:
            unit = torch.randn(len(number), width, generator=generator).to(x)
            unit = unit / unit.norm(dim=-1, keepdim=True) * (width / num_samples) ** 0.5
            probes[torch.arange(len(number)), token] = unit
        (pulled,) = torch.func.vmap(pull)(probes)
        energy.index_add_(0, token, pulled.square().sum(-1))
    return energy.sqrt().detach()
