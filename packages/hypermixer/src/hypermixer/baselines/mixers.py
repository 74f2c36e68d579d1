"""Token mixers, each ``(x (B, N, d), padding (B, N) or None) → (B, N, d)``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypermixer.hypernet import init_bound
from hypermixer.mixing import HyperMixing


def _clear(x: Tensor, padding: Tensor | None) -> Tensor:
    return x if padding is None else x.masked_fill(padding.unsqueeze(-1), 0.0)


class Attention(nn.Module):
    """Softmax attention (Vaswani et al. 2017) by torch's scaled_dot_product_attention."""

    def __init__(self, embed_dim: int, num_heads: int = 1) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)

    def heads(self, x: Tensor) -> list[Tensor]:
        """Return query, key and value (B, H, N, f)."""
        return [
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        ]

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Mix tokens; padded keys get no weight."""
        q, k, v = self.heads(_clear(x, padding))
        mask = None if padding is None else ~padding[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class LinearAttention(Attention):
    """Linear attention with φ = elu + 1 (Katharopoulos et al. 2020)."""

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Mix tokens; padded keys get no weight."""
        q, k, v = self.heads(_clear(x, padding))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        if padding is not None:
            k = k.masked_fill(padding[:, None, :, None], 0.0)
        total = q @ k.sum(2).unsqueeze(-1)
        y = q @ (k.transpose(-1, -2) @ v) / total.clamp(min=1e-6)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MLPMixing(nn.Module):
    """MLPMixer's token mixing (Tolstikhin et al. 2021): W2 σ(W1ᵀ x) per channel, weights learned.

    A fixed number of tokens: shorter inputs are filled up with zeros, longer ones are an error.
    """

    def __init__(self, max_length: int, hidden_dim: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.fc1 = nn.Linear(max_length, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, max_length)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Mix tokens.

        Raises:
            ValueError: for more tokens than the weights were made for.
        """
        return _clear(over_positions(x, padding, self.max_length, self._mlp), padding)

    def _mlp(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


def over_positions(
    x: Tensor, padding: Tensor | None, max_length: int, function: Callable[[Tensor], Tensor]
) -> Tensor:
    """Apply a map over positions, of fixed size, to (B, N, d) with N ≤ ``max_length``."""
    length = x.shape[1]
    if length > max_length:
        raise ValueError(f"{length} tokens, but the weights were made for max_length={max_length}")
    full = F.pad(_clear(x, padding), (0, 0, 0, max_length - length)).transpose(1, 2)
    return function(full).transpose(1, 2)[:, :length]


class GatedMLPMixing(nn.Module):
    """gMLP's block (Liu et al. 2021): a spatial projection gates half of the channels."""

    def __init__(self, embed_dim: int, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.up = nn.Linear(embed_dim, 2 * embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.spatial = nn.Linear(max_length, max_length)
        self.down = nn.Linear(embed_dim, embed_dim)
        nn.init.uniform_(self.spatial.weight, -1e-3, 1e-3)  # the paper's start: the gate is about 1
        nn.init.ones_(self.spatial.bias)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Mix tokens."""
        content, gate = F.gelu(self.up(_clear(x, padding))).chunk(2, dim=-1)
        gate = over_positions(self.norm(gate), padding, self.max_length, self.spatial)
        return self.down(content * gate)  # type: ignore[no-any-return]


class FourierMixing(nn.Module):
    """FNet's mixing (Lee-Thorp et al. 2022): the real part of a Fourier transform, no parameters."""

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Mix tokens and channels."""
        mixed: Tensor = torch.fft.fft2(_clear(x, padding), norm="ortho").real
        return mixed


class StaticMixing(nn.Module):
    """Ablation: every token uses the same learned row of mixing weights, w2ᵀ σ(w1 Σ_j x_jᵀ)."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(hidden_dim))
        self.w2 = nn.Parameter(torch.empty(hidden_dim))
        bound = init_bound((1, hidden_dim, 1), "xavier")
        nn.init.uniform_(self.w1, -bound, bound)
        nn.init.uniform_(self.w2, -bound, bound)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Give every token the same mixture of all tokens."""
        total = _clear(x, padding).sum(1, keepdim=True)
        mixed = self.w2 @ F.gelu(self.w1.unsqueeze(-1) * total)
        return self.norm(mixed).unsqueeze(1).expand_as(x)  # type: ignore[no-any-return]


class _Hyper(nn.Module):
    """HyperMixing under the baselines' signature."""

    def __init__(self, mixing: HyperMixing) -> None:
        super().__init__()
        self.mixing = mixing

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Mix tokens."""
        return self.mixing(x, key_padding_mask=padding)  # type: ignore[no-any-return]


class _None(nn.Module):
    """Ablation: feature mixing only."""

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Return zero, so that the residual connection alone remains."""
        return torch.zeros_like(x)


_HYPER = {
    "hypermixer": {},
    "hypermixer-tied": {"tied": True},
    "hypermixer-xavier": {"init": "xavier"},
}


def mixer_names() -> tuple[str, ...]:
    """Return the names that :func:`make_mixer` knows."""
    others = "attention", "linear-attention", "mlp-mixer", "gmlp", "fnet", "static", "none"
    return (*_HYPER, *others)


def make_mixer(
    name: str,
    embed_dim: int,
    *,
    max_length: int,
    hidden_dim: int | None = None,
    num_heads: int = 1,
    token_info: str | None = "sinusoidal",
) -> nn.Module:
    """Return a token mixer by name.

    Args:
        name: one of :func:`mixer_names`.
        embed_dim: d.
        max_length: tokens that a static mixer is made for.
        hidden_dim: d', hidden units of token-mixing MLPs; 2·d by default.
        num_heads: of attention and of HyperMixing.
        token_info: of HyperMixing.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> make_mixer("fnet", 8, max_length=4)(torch.randn(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """
    hidden_dim = hidden_dim or 2 * embed_dim
    if name in _HYPER:
        options = _HYPER[name]
        return _Hyper(
            HyperMixing(embed_dim, hidden_dim, num_heads, token_info=token_info, **options)  # type: ignore[arg-type]
        )
    makers: dict[str, Callable[[], nn.Module]] = {
        "attention": lambda: Attention(embed_dim, num_heads),
        "linear-attention": lambda: LinearAttention(embed_dim, num_heads),
        "mlp-mixer": lambda: MLPMixing(max_length, hidden_dim),
        "gmlp": lambda: GatedMLPMixing(embed_dim, max_length),
        "fnet": FourierMixing,
        "static": lambda: StaticMixing(embed_dim, hidden_dim),
        "none": _None,
    }
    if name not in makers:
        raise ValueError(f"name must be one of {', '.join(mixer_names())}; got {name!r}")
    return makers[name]()
