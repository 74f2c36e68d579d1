"""HyperMixing written down from its equations, head by head and token by token, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2.0)))


def position_row(position: int, d: int, style: str) -> Tensor:
    row = []
    for j in range(d):
        if style == "idiap":
            angle = (position + 1) / 10000.0 ** (2 * j / d)
        else:
            angle = position / 10000.0 ** (2 * (j // 2) / d)
        row.append(math.sin(angle) if j % 2 == 0 else math.cos(angle))
    return torch.tensor(row, dtype=torch.float64)


def inform(x: Tensor, style: str | None, positions: list[int] | None = None) -> Tensor:
    if style is None:
        return x
    n, d = x.shape
    rows = [position_row(p, d, style) for p in (positions or range(n))]
    table = torch.stack(rows) if n else x
    return (math.sqrt(d) if style == "idiap" else 1.0) * x + table


def weights(x: Tensor, state: dict[str, Tensor], side: str, head: int) -> Tensor:
    """W (N, k) of one head, row by row."""
    f = state[f"{side}.fc1_weight"].shape[2]
    rows = []
    for token in x[:, head * f : (head + 1) * f]:
        hidden = state[f"{side}.fc1_weight"][head] @ token
        if f"{side}.fc1_bias" in state:
            hidden = hidden + state[f"{side}.fc1_bias"][head]
        out = state[f"{side}.fc2_weight"][head] @ gelu(hidden)
        if f"{side}.fc2_bias" in state:
            out = out + state[f"{side}.fc2_bias"][head]
        rows.append(out)
    return torch.stack(rows)


def mix(
    state: dict[str, Tensor],
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    style: str | None = "sinusoidal",
    eps: float = 1e-5,
) -> Tensor:
    """One sequence, no masks: query (M, d), key and value (N, d) → (M, d)."""
    key = query if key is None else key
    value = key if value is None else value
    heads = state["w1.fc1_weight"].shape[0]
    reader = "w2" if "w2.fc1_weight" in state else "w1"
    f = query.shape[1] // heads
    out = []
    for head in range(heads):
        w1 = weights(inform(key, style), state, "w1", head)
        w2 = weights(inform(query, style), state, reader, head)
        v = value[:, head * f : (head + 1) * f]
        p = sum(torch.outer(w1[j], v[j]) for j in range(len(v)))
        out.append(torch.stack([row @ gelu(p) for row in w2]))
    y = torch.cat(out, dim=1)
    if "norm.weight" not in state:
        return y
    centred = y - y.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + eps).sqrt()
    return normed * state["norm.weight"] + state["norm.bias"]


def state_of(layer: torch.nn.Module) -> dict[str, Tensor]:
    return dict(layer.named_parameters())
