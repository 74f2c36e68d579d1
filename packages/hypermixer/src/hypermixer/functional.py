"""HyperMixing as pure tensor functions: the direct form and the exact factored form.

Symbols as in the paper: N keys, M queries, H heads, f features of a head, h hidden units of a
hypernetwork's head, k hidden units of the token-mixing MLP's head. With G = σ(F x̃ + a) the hidden
layer of a hypernetwork and U, c its output layer, the generated weights are W = G Uᵀ + 1 cᵀ, and

    direct      P = W1ᵀ V                         Y = W2 σ(P)
    factored    S = [G1 1]ᵀ V,  P = [U1 c1] S     R = [U2 c2]ᵀ σ(P),  Y = [G2 1] R

are the same numbers by associativity; the factored form never has a tensor of N·k elements.

:func:`hyper_mix` and :func:`mix_direct` take the usual layout (B, H, N, ·). The building blocks take
the *head-major* layout (H, B, N, ·), in which the projections of all heads are one batched product.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]

# Asked once: torch.compile before 2.9 cannot trace the question.
_AUTOCAST = frozenset(
    kind
    for kind in ("cpu", "cuda", "hpu", "mps", "mtia", "xpu")
    if torch.amp.is_autocast_available(kind)
)


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": _identity,
}


def get_activation(activation: str | Activation) -> Activation:
    """Return an activation by name, or the callable itself.

    Raises:
        ValueError: for an unknown name.
    """
    if callable(activation):
        return activation
    if activation not in ACTIVATIONS:
        names = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation must be callable or one of {names}; got {activation!r}")
    return ACTIVATIONS[activation]


def crossover_length(hidden: int, hypernet: int, width: int, *, tied: bool = False) -> float:
    """Return N*: the number of tokens from which a side is cheaper factored than direct.

    One side costs 2N·k(h+f) multiply-adds times two direct and 2N·h·f + 2k·h·f factored, so
    N* = k·h·f / (k·h + k·f − h·f); with h = f this is f·k / (2k − f). Where the denominator is not
    positive the direct form always wins and N* is infinite. Tied self-mixing generates W once for
    both sides and decides for both together.

    Args:
        hidden: k, hidden units of one head of the token-mixing MLP.
        hypernet: h, hidden units of one head of a hypernetwork.
        width: f, features of one head.
        tied: the joint rule of tied self-mixing.

    Example:
        >>> crossover_length(64, 64, 64)
        64.0
    """
    k, h, f = hidden, hypernet, width
    saved = k * h + 2 * k * f - 2 * h * f if tied else k * h + k * f - h * f
    cost = 2 * k * h * f if tied else k * h * f
    return cost / saved if saved > 0 else float("inf")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over tokens are kept: float32 for the 16-bit types."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def output_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of Y before the norm: float16 would overflow, since Y grows with N."""
    return torch.float32 if dtype == torch.float16 else dtype


def exact_sums(x: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast, so that float32 sums stay float32."""
    kind = x.device.type
    if kind in _AUTOCAST and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def same_autocast(kind: str) -> Callable[[], AbstractContextManager[object]]:
    """Capture the autocast state of a device type, so that a recomputation runs under it."""
    if kind not in _AUTOCAST:
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)


def sum_over_tokens(weights: Tensor, value: Tensor) -> Tensor:
    """Return weightsᵀ·value (H, B, r, f), summed over tokens in float32 or better."""
    dtype = accumulation_dtype(torch.promote_types(weights.dtype, value.dtype))
    heads, batch = value.shape[:2]
    with exact_sums(value):
        left = weights.to(dtype).flatten(0, 1).transpose(1, 2)
        product = torch.bmm(left, value.to(dtype).flatten(0, 1))
        return product.view(heads, batch, *product.shape[1:])


def token_state(g: Tensor, value: Tensor, *, bias: bool) -> Tensor:
    """Return S = [G 1]ᵀ V (H, B, h(+1), f): everything that queries can learn about the keys."""
    state = sum_over_tokens(g, value)
    if bias:
        state = torch.cat([state, value.sum(-2, keepdim=True, dtype=state.dtype)], dim=-2)
    return state


def with_bias_column(u: Tensor, c: Tensor | None) -> Tensor:
    """Return [U c] (H, k, h+1), or U where there is no bias."""
    return u if c is None else torch.cat([u, c.unsqueeze(-1)], dim=-1)


def hidden_from_state(state: Tensor, u: Tensor, c: Tensor | None) -> Tensor:
    """Return P = [U c] S (H, B, k, f) for every sequence in one product per head."""
    heads, batch, rows, width = state.shape
    with exact_sums(state):
        wide = state.transpose(1, 2).reshape(heads, rows, batch * width)
        hidden = torch.bmm(with_bias_column(u, c).to(state.dtype), wide)
        return hidden.view(heads, u.shape[1], batch, width).transpose(1, 2)


def read_matrix(hidden: Tensor, u: Tensor, c: Tensor | None) -> Tensor:
    """Return R = [U c]ᵀ A (H, B, h(+1), f): what every query's hidden layer is multiplied with."""
    return hidden_from_state(hidden, with_bias_column(u, c).transpose(1, 2), None)


def read_tokens(g: Tensor, matrix: Tensor) -> Tensor:
    """Return Y = [G 1] R (H, B, M, f)."""
    dtype = output_dtype(g.dtype)
    heads, batch, _, rows = g.shape
    with exact_sums(g):
        flat = matrix.to(dtype).flatten(0, 1)
        left = g.to(dtype).flatten(0, 1)
        y = (
            torch.bmm(left, flat)
            if flat.shape[1] == rows
            else torch.baddbmm(flat[:, rows:], left, flat[:, :rows])
        )
        return y.view(heads, batch, *y.shape[1:])


def generate(g: Tensor, u: Tensor, c: Tensor | None) -> Tensor:
    """Return W = G Uᵀ + 1 cᵀ (H, B, N, k): the generated weights of the direct form."""
    heads, batch, length, rows = g.shape
    flat = g.reshape(heads, batch * length, rows)
    w = (
        torch.bmm(flat, u.transpose(1, 2))
        if c is None
        else torch.baddbmm(c.unsqueeze(1), flat, u.transpose(1, 2))
    )
    return w.view(heads, batch, length, u.shape[1])


def mix_heads(
    g1: Tensor,
    u1: Tensor,
    c1: Tensor | None,
    g2: Tensor,
    u2: Tensor,
    c2: Tensor | None,
    value: Tensor,
    activation: Activation,
    *,
    key_direct: bool,
    query_direct: bool,
    tied: bool = False,
    scale: Tensor | None = None,
) -> Tensor:
    """Mix tokens in the head-major layout, each side direct or factored.

    Args:
        g1: (H, B, N, h) hidden layer of the key side's hypernetwork; masked rows need no zeroing
            as long as the value's are zero.
        u1: (H, k, h) and ``c1`` (H, k) output layer of the key side.
        c1: see ``u1``.
        g2: (H, B, M, h), ``u2``, ``c2`` of the query side.
        u2: see ``g2``.
        c2: see ``g2``.
        value: (H, B, N, f).
        activation: σ of the token-mixing MLP.
        key_direct: form W1 instead of S.
        query_direct: form W2 instead of R.
        tied: the two sides are one, so W2 = W1 where both are direct.
        scale: (B,) factor of P, or None.

    Returns:
        (H, B, M, f), float32 for float16 input.
    """
    w1 = None
    if key_direct:
        w1 = generate(g1, u1, c1)
        hidden = sum_over_tokens(w1, value)
    else:
        hidden = hidden_from_state(token_state(g1, value, bias=c1 is not None), u1, c1)
    if scale is not None:
        hidden = hidden * scale.to(hidden.dtype).view(1, -1, 1, 1)
    hidden = activation(hidden)
    if not query_direct:
        return read_tokens(g2, read_matrix(hidden, u2, c2))
    return read_tokens(w1 if tied and w1 is not None else generate(g2, u2, c2), hidden)


def _clear(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(mask[:, None, :, None], 0.0)


def hyper_mix(
    g1: Tensor,
    u1: Tensor,
    g2: Tensor,
    u2: Tensor,
    value: Tensor,
    *,
    c1: Tensor | None = None,
    c2: Tensor | None = None,
    activation: str | Activation = "gelu",
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    algorithm: str = "auto",
) -> Tensor:
    """Mix tokens from the hidden layers of the two hypernetworks: Y = W2 σ(W1ᵀ V).

    Args:
        g1: (B, H, N, h) hidden layer of the key side, G1 = σ(F1 x̃ + a1).
        u1: (H, k, h) output weights of the key side.
        g2: (B, H, M, h) hidden layer of the query side.
        u2: (H, k, h) output weights of the query side.
        value: (B, H, N, f).
        c1: (H, k) output bias of the key side.
        c2: (H, k) output bias of the query side.
        activation: σ of the token-mixing MLP, a name or a callable.
        key_mask: (B, N) bool, True = ignore; masked rows may hold anything, NaN included.
        query_mask: (B, M) bool; masked rows of the result are zero.
        algorithm: "direct", "factored", "auto" (per side, by :func:`crossover_length`) or the
            name of a registered kernel.

    Returns:
        (B, H, M, f).

    Example:
        >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64).view(1, 1, 2, 1)
        >>> one = torch.ones(1, 1, 1, dtype=torch.float64)
        >>> g = torch.nn.functional.gelu(x)
        >>> hyper_mix(g, one, g, one, x).flatten().tolist()  # doctest: +NUMBER
        [3.996673092024, 9.284537093926]
    """
    from hypermixer import kernels

    y = kernels.mix(
        _clear(g1, key_mask).transpose(0, 1),
        u1,
        c1,
        _clear(g2, query_mask).transpose(0, 1),
        u2,
        c2,
        _clear(value, key_mask).transpose(0, 1),
        get_activation(activation),
        algorithm=algorithm,
    )
    return _clear(y.transpose(0, 1), query_mask)


def mix_direct(
    w1: Tensor, w2: Tensor, value: Tensor, *, activation: str | Activation = "gelu"
) -> Tensor:
    """Return Y = W2 σ(W1ᵀ V), equation by equation, from generated weights.

    Args:
        w1: (B, H, N, k).
        w2: (B, H, M, k).
        value: (B, H, N, f).
        activation: σ.

    Returns:
        (B, H, M, f).
    """
    return read_tokens(w2, get_activation(activation)(sum_over_tokens(w1, value)))
