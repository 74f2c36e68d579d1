"""Encoder layers whose token mixer is HyperMixing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypermixer import _checks
from hypermixer.attention import HyperMixingAttention
from hypermixer.functional import Activation, get_activation
from hypermixer.mixing import HyperMixing

LAYOUTS = ("pre", "post", "rezero")


class HyperMixerEncoderLayer(nn.Module):
    """:class:`torch.nn.TransformerEncoderLayer` with HyperMixing in the place of attention.

    Layouts, with HM the mixer and FFN the feature mixing: "pre" x + HM(LN(x)), x + FFN(LN(x));
    "post" LN(x + HM(x)), LN(x + FFN(x)); "rezero" x + α·HM(x), x + α·FFN(x) with α from 0.

    Args:
        d_model: d.
        nhead: H.
        dim_feedforward: hidden units of the feature mixing; 2·d by default (the paper's ratio).
        dim_token_mixing: d', hidden units of the token mixing; 2·d by default.
        dropout: probability.
        activation: of the feature mixing, a name or a callable; the mixer has its own argument,
            ``mixing_activation``.
        layer_norm_eps: ε of the LayerNorms.
        batch_first: (B, N, d) rather than (N, B, d).
        norm_first: pre-norm (True) or post-norm.
        layout: overrides ``norm_first``.
        mixing_activation: σ of the mixer.
        device: of the parameters.
        dtype: of the parameters.
        mixing: further arguments of :class:`hypermixer.HyperMixing`.

    Example:
        >>> layer = HyperMixerEncoderLayer(32, 4)
        >>> encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        >>> encoder(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        d_model: int,
        nhead: int = 1,
        dim_feedforward: int | None = None,
        dim_token_mixing: int | None = None,
        dropout: float = 0.1,
        activation: str | Activation = "gelu",
        layer_norm_eps: float = 1e-5,
        batch_first: bool = True,
        norm_first: bool = True,
        layout: Literal["pre", "post", "rezero"] | None = None,
        *,
        mixing_activation: str | Activation = "gelu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **mixing: Any,
    ) -> None:
        super().__init__()
        layout = ("pre" if norm_first else "post") if layout is None else layout
        _checks.one_of("layout", layout, LAYOUTS)
        dim_feedforward = 2 * d_model if dim_feedforward is None else dim_feedforward
        _checks.positive("dim_feedforward", dim_feedforward)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layout, self.norm_first = layout, layout == "pre"
        self.self_attn = HyperMixingAttention(
            d_model,
            nhead,
            dim_token_mixing,
            batch_first=batch_first,
            activation=mixing_activation,
            **mixing,
            **factory,
        )
        self.linear1 = nn.Linear(d_model, dim_feedforward, **factory)
        self.linear2 = nn.Linear(dim_feedforward, d_model, **factory)
        self.dropout, self.dropout1, self.dropout2 = (nn.Dropout(dropout) for _ in range(3))
        self.activation = get_activation(activation)
        if layout == "rezero":
            self.scale1 = nn.Parameter(torch.zeros((), **factory))
            self.scale2 = nn.Parameter(torch.zeros((), **factory))
        else:
            self.norm1 = nn.LayerNorm(d_model, eps=layer_norm_eps, **factory)
            self.norm2 = nn.LayerNorm(d_model, eps=layer_norm_eps, **factory)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        self.self_attn.mixing.reset_parameters()
        for module in self.children():
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                module.reset_parameters()
        if self.layout == "rezero":
            nn.init.zeros_(self.scale1)
            nn.init.zeros_(self.scale2)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Return the layer's output, of src's shape; see nn.TransformerEncoderLayer.

        NaN and infinity in padded tokens count as zeros, so that they reach no parameter's gradient.
        """
        if isinstance(src_key_padding_mask, Tensor) and not src.is_nested:
            src = self._clear_padding(src, src_key_padding_mask)

        def mix(x: Tensor) -> Tensor:
            out, _ = self.self_attn(
                x,
                x,
                x,
                key_padding_mask=src_key_padding_mask,
                attn_mask=src_mask,
                is_causal=is_causal,
                need_weights=False,
            )
            return self.dropout1(out)  # type: ignore[no-any-return]

        def features(x: Tensor) -> Tensor:
            hidden = self.dropout(self.activation(self.linear1(x)))
            return self.dropout2(self.linear2(hidden))  # type: ignore[no-any-return]

        if self.layout == "pre":
            src = src + mix(self.norm1(src))
            return src + features(self.norm2(src))
        if self.layout == "post":
            src = self.norm1(src + mix(src))
            return self.norm2(src + features(src))  # type: ignore[no-any-return]
        src = src + self.scale1 * mix(src)
        return src + self.scale2 * features(src)

    def _clear_padding(self, src: Tensor, mask: Tensor) -> Tensor:
        turn = mask.dim() == 2 and not self.self_attn.batch_first
        rows = mask.T if turn else mask
        if rows.shape != src.shape[:-1]:
            return src  # the mixer says what is wrong with the mask
        ignore = rows == float("-inf") if rows.is_floating_point() else rows.bool()
        return src.masked_fill(ignore.unsqueeze(-1) & ~src.isfinite(), 0.0)


class ConvolutionModule(nn.Module):
    """Conformer's convolution module: LN, pointwise GLU, depthwise, LN, activation, pointwise.

    Args:
        d_model: d.
        kernel_size: of the depthwise convolution; odd unless causal.
        dropout: probability.
        activation: after the depthwise convolution.
        causal: see the past only.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        kernel_size: int = 31,
        dropout: float = 0.0,
        activation: str | Activation = "silu",
        *,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.positive("kernel_size", kernel_size)
        if not causal and kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd unless causal, got {kernel_size}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        before = kernel_size - 1 if causal else kernel_size // 2
        self.pad = (before, kernel_size - 1 - before)
        self.norm = nn.LayerNorm(d_model, **factory)
        self.expand = nn.Linear(d_model, 2 * d_model, **factory)
        self.depthwise = nn.Conv1d(d_model, d_model, kernel_size, groups=d_model, **factory)
        self.inner_norm = nn.LayerNorm(d_model, **factory)
        self.activation = get_activation(activation)
        self.project = nn.Linear(d_model, d_model, **factory)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Return (B, N, d); padded tokens are zero for their neighbours."""
        x = F.glu(self.expand(self.norm(x)), dim=-1)
        if padding is not None:
            x = x.masked_fill(padding.unsqueeze(-1), 0.0)
        x = self.depthwise(F.pad(x.transpose(1, 2), self.pad)).transpose(1, 2)
        return self.dropout(self.project(self.activation(self.inner_norm(x))))  # type: ignore[no-any-return]


class HyperConformerLayer(nn.Module):
    """HyperConformer's layer (Mai et al., Interspeech 2023).

    x += ½FFN₁(x);  x += HM(LN(x));  x += Conv(x);  x = LN(x + ½FFN₂(x)).

    Args:
        d_model: d.
        nhead: H.
        dim_feedforward: hidden units of both feature mixings, 4·d by default.
        dim_token_mixing: d'; ``dim_feedforward`` by default, as in SpeechBrain.
        kernel_size: of the depthwise convolution.
        dropout: probability.
        activation: of the feature mixings and the convolution module.
        bias: biases of the hypernetworks.
        device: of the parameters.
        dtype: of the parameters.
        mixing: further arguments of :class:`hypermixer.HyperMixing`; with ``causal`` or
            ``block_size`` the convolution sees the past only.

    Example:
        >>> HyperConformerLayer(16, 2, kernel_size=7)(torch.randn(2, 20, 16)).shape
        torch.Size([2, 20, 16])
    """

    def __init__(
        self,
        d_model: int,
        nhead: int = 8,
        dim_feedforward: int | None = None,
        dim_token_mixing: int | None = None,
        kernel_size: int = 31,
        dropout: float = 0.1,
        activation: str | Activation = "silu",
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **mixing: Any,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = 4 * d_model if dim_feedforward is None else dim_feedforward
        _checks.positive("dim_feedforward", hidden)
        mix_hidden = hidden if dim_token_mixing is None else dim_token_mixing
        chosen = get_activation(activation)

        def features() -> nn.Sequential:
            return nn.Sequential(
                nn.LayerNorm(d_model, **factory),
                nn.Linear(d_model, hidden, **factory),
                _Apply(chosen),
                nn.Dropout(dropout),
                nn.Linear(hidden, d_model, **factory),
                nn.Dropout(dropout),
            )

        self.features1, self.features2 = features(), features()
        self.mixing = HyperMixing(d_model, mix_hidden, nhead, bias=bias, **mixing, **factory)
        self.mixing_norm = nn.LayerNorm(d_model, **factory)
        self.dropout = nn.Dropout(dropout)
        self.convolution = ConvolutionModule(
            d_model, kernel_size, dropout, chosen, causal=self.mixing.causal, **factory
        )
        self.norm = nn.LayerNorm(d_model, **factory)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Return (B, N, d) from (B, N, d)."""
        mask = _checks.padding_mask("key_padding_mask", key_padding_mask, *x.shape[:2])
        if mask is not None:
            x = x.masked_fill(mask.unsqueeze(-1), 0.0)
        x = x + 0.5 * self.features1(x)
        x = x + self.dropout(self.mixing(self.mixing_norm(x), key_padding_mask=mask))
        x = x + self.convolution(x, mask)
        return self.norm(x + 0.5 * self.features2(x))  # type: ignore[no-any-return]


class _Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
