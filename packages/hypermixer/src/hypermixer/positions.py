"""Token information: what the hypernetworks see beside the token's content, x → x̃ = s·x + p.

The position tables follow the two public implementations, whose exponents differ (d features, j the
0-based feature, pos the position):

    "sinusoidal"   s = 1,  pos from 0:  sin or cos of pos / 10000^(2⌊j/2⌋/d)   (Vaswani et al. 2017)
    "idiap"        s = √d, pos from 1:  sin or cos of pos / 10000^(2j/d)       (the authors' code)

with sin at even j and cos at odd j.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hypermixer._checks import is_compiling, positive

STYLES = ("sinusoidal", "idiap")
_FINE = 64
_KEPT_ROWS = (
    16_384  # a longer table is rebuilt at each call rather than kept: 1 M rows are gigabytes
)


def _angular_frequency(dim: int, style: str, device: torch.device | None = None) -> Tensor:
    j = torch.arange(dim, dtype=torch.float64, device=device)
    exponent = 2.0 * (j if style == "idiap" else torch.floor(j / 2.0)) / dim
    return torch.exp(exponent * -math.log(10000.0))


def _phase(dim: int, device: torch.device | None) -> Tensor:
    """Return 0 at even features and π/2, which turns sin into cos, at odd ones."""
    odd = torch.arange(dim, dtype=torch.float64, device=device) % 2
    return odd * (math.pi / 2)


def _check_style(dim: int, style: str) -> None:
    if style not in STYLES:
        raise ValueError(f"style must be 'sinusoidal' or 'idiap', got {style!r}")
    if style == "sinusoidal" and dim % 2:
        raise ValueError(
            f"token_info='sinusoidal' needs an even width, got embed_dim={dim}; "
            "use 'idiap' or an even embed_dim"
        )


def sinusoidal_positions(position_ids: Tensor, dim: int, style: str = "sinusoidal") -> Tensor:
    """Return the position rows of the given 0-based positions.

    Args:
        position_ids: (…) integers; style "idiap" adds 1 to them.
        dim: d, number of features.
        style: "sinusoidal" or "idiap".

    Returns:
        (…, d) in float64.

    Raises:
        ValueError: for an unknown style, or an odd ``dim`` with "sinusoidal".

    Example:
        >>> sinusoidal_positions(torch.tensor([0]), 4, "idiap").round(decimals=4).tolist()
        [[0.8415, 1.0, 0.0001, 1.0]]
    """
    _check_style(dim, style)
    frequency = _angular_frequency(dim, style, position_ids.device)
    positions = position_ids.to(torch.float64) + (1.0 if style == "idiap" else 0.0)
    phase = _phase(dim, position_ids.device)
    return torch.sin(positions.unsqueeze(-1) * frequency + phase)


def sinusoidal_table(
    length: int,
    dim: int,
    style: str = "sinusoidal",
    *,
    start: int = 0,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return ``length`` position rows (length, d) from ``start`` on, quickly.

    A position is start + 64·a + b, and sin(α + β) = sin α cos β + cos α sin β, so that only
    length/64 + 64 rows of sines are evaluated, in float64; the table is their outer product.

    Args:
        length: number of rows.
        dim: d, number of features.
        style: "sinusoidal" or "idiap".
        start: 0-based position of the first row.
        device: where the table is wanted.
        dtype: of the table; products are formed in float32 or better.
    """
    _check_style(dim, style)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    frequency = _angular_frequency(dim, style, device)
    phase = _phase(dim, device)
    offset = start + (1 if style == "idiap" else 0)
    coarse = torch.arange(0, length, _FINE, device=device, dtype=torch.float64) + offset
    fine = torch.arange(_FINE, device=device, dtype=torch.float64)
    a = coarse.unsqueeze(-1) * frequency + phase
    b = fine.unsqueeze(-1) * frequency
    table = a.sin().to(working).unsqueeze(1) * b.cos().to(working)
    table.addcmul_(a.cos().to(working).unsqueeze(1), b.sin().to(working))
    return table.view(-1, dim)[:length].to(dtype)


class Sinusoidal(nn.Module):
    """Adds sinusoidal positions, from a table that grows on demand and is never saved.

    Args:
        embed_dim: d.
        style: "sinusoidal" or "idiap"; see the module's docstring.
        max_length: rows to prepare on the first call (not a limit).
    """

    table: Tensor

    def __init__(
        self, embed_dim: int, style: str = "sinusoidal", max_length: int | None = None
    ) -> None:
        super().__init__()
        _check_style(embed_dim, style)
        self.embed_dim = embed_dim
        self.style = style
        self.initial_length = max_length or 0
        self.input_scale = math.sqrt(embed_dim) if style == "idiap" else 1.0
        self.register_buffer("table", torch.empty(0, embed_dim), persistent=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Sinusoidal:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.table = self.table[:0]  # rebuilt in the new dtype, rather than rounded into it
        return self

    def rows(self, x: Tensor, start: int) -> Tensor:
        """Return the rows for x's positions from ``start`` on, in x's dtype and on its device."""
        end = start + x.shape[1]
        if is_compiling() or x.is_meta:
            ids = torch.arange(start, end, device=x.device)
            return sinusoidal_positions(ids, self.embed_dim, self.style).to(x.dtype)
        limit = max(_KEPT_ROWS, self.initial_length)
        how: dict[str, Any] = {"device": x.device, "dtype": x.dtype}
        if end > limit:
            return sinusoidal_table(x.shape[1], self.embed_dim, self.style, start=start, **how)
        kept = self.table.dtype == x.dtype and self.table.device == x.device
        if not kept or self.table.shape[0] < end:
            length = max(end, self.initial_length, 2 * self.table.shape[0] if kept else 0)
            with torch.no_grad():
                self.table = sinusoidal_table(min(length, limit), self.embed_dim, self.style, **how)
        return self.table[start:end]

    def forward(self, x: Tensor, position_ids: Tensor | None = None, start: int = 0) -> Tensor:
        """Return s·x + p for x (B, N, d) at explicit ids (N,) or (B, N), or from ``start`` on."""
        if position_ids is None:
            rows = self.rows(x, start)
        else:
            rows = sinusoidal_positions(position_ids, self.embed_dim, self.style).to(x.dtype)
        return (
            x + rows if self.style == "sinusoidal" else torch.add(rows, x, alpha=self.input_scale)
        )

    def extra_repr(self) -> str:
        """Return what print(module) shows."""
        return f"{self.embed_dim}, style={self.style!r}"


class Learned(nn.Module):
    """Adds a learned embedding of the position; it has a limit, ``max_length``."""

    def __init__(
        self,
        embed_dim: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(max_length, embed_dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the embedding anew, N(0, 1) as torch.nn.Embedding does."""
        self.embedding.reset_parameters()

    def forward(self, x: Tensor, position_ids: Tensor | None = None, start: int = 0) -> Tensor:
        """Return x + p.

        Raises:
            IndexError: for a position beyond the table.
        """
        limit = self.embedding.num_embeddings
        if position_ids is None:
            last = start + x.shape[1] - 1
            position_ids = torch.arange(start, start + x.shape[1], device=x.device)
        elif is_compiling() or position_ids.numel() == 0:
            last = -1
        else:
            low, last = (int(bound) for bound in position_ids.aminmax())
            if low < 0:
                raise IndexError(f"position {low} is before the learned table, which starts at 0")
        if last >= limit:
            raise IndexError(
                f"position {last} is beyond the learned table of max_length={limit} positions"
            )
        rows: Tensor = self.embedding(position_ids)
        return x + rows.to(x.dtype)


class Custom(nn.Module):
    """Calls the user's function or module, ``x → x̃`` or ``(x, position_ids) → x̃``."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        target = function.forward if isinstance(function, nn.Module) else function
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(target).parameters.values()
        self.takes_positions = sum(p.kind in kinds for p in parameters) > 1

    def forward(self, x: Tensor, position_ids: Tensor | None = None, start: int = 0) -> Tensor:
        """Return the function's x̃."""
        if not self.takes_positions:
            return self.function(x)
        if position_ids is None:
            position_ids = torch.arange(start, start + x.shape[1], device=x.device)
        informed: Tensor = self.function(x, position_ids)
        return informed


def make_token_info(
    token_info: str | nn.Module | Callable[..., Tensor] | None,
    embed_dim: int,
    max_length: int | None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module | None:
    """Return the token-information module for HyperMixing's ``token_info`` argument.

    Raises:
        ValueError: for an unknown name, an odd width with "sinusoidal", or "learned" without
            ``max_length``.
    """
    if max_length is not None:
        positive("max_length", max_length)
    if token_info is None or isinstance(token_info, (Sinusoidal, Learned, Custom)):
        return token_info
    if isinstance(token_info, str):
        if token_info in STYLES:
            return Sinusoidal(embed_dim, token_info, max_length)
        if token_info == "learned":
            if max_length is None:
                raise ValueError("token_info='learned' needs max_length, the size of its table")
            return Learned(embed_dim, max_length, device, dtype)
        raise ValueError(
            "token_info must be 'sinusoidal', 'idiap', 'learned', None or a callable; "
            f"got {token_info!r}"
        )
    if callable(token_info):
        return Custom(token_info)
    raise ValueError(f"token_info must be a name, None or a callable; got {token_info!r}")
