"""The network: a transformer over both clouds, then one attention head that is the matching (2.2)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepemd.core.distance import cost_matrix, row_blocks
from deepemd.core.layers import Block, Mix, fourier_features
from deepemd.core.normalize import normalize_pair

ARCHES = ("paper", "geo")
PATTERNS = ("joint", "alternate")
HEADS = ("attention", "distance", "dual")
MASKED = -1e9


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


class MatchingHead(nn.Module):
    """Scores ``S_ij = q_i·k_j/√d``, optionally with the distances or a dual potential in them (2.5)."""

    def __init__(self, width: int, kind: str, *, tie_qk: bool, value: bool) -> None:
        super().__init__()
        self.kind = kind
        self.q = nn.Linear(width, width, bias=False)
        self.k = self.q if tie_qk else nn.Linear(width, width, bias=False)
        if kind == "attention":
            self.register_parameter("log_scale", None)
        else:
            self.log_scale = nn.Parameter(torch.tensor(2.0))
        self.potential = nn.Linear(width, 1) if kind == "dual" else None
        self.value = (
            nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, 1))
            if value
            else None
        )


class DeepEMD(nn.Module):
    """Predicts the matching of two point clouds as the logits of one attention matrix (paper, Sec. 3).

    Tokens are the points of both clouds with a learned vector for their origin and no position code, so
    permuting a cloud permutes the rows (or columns) of the result and changes nothing else.

    Args:
        dim: coordinates per point, D.
        width, depth, num_heads: size of the transformer.
        arch: ``"paper"`` or ``"geo"``, which adds a learned distance bias to every attention head.
        pattern: ``"joint"`` attends over both clouds at once; ``"alternate"`` switches between
            attention within each cloud and from each cloud to the other.
        head: ``"attention"`` (the paper), ``"distance"`` (subtracts ``exp(t) C_ij``) or ``"dual"``
            (``exp(t)(f_i + g_j - C_ij)``, which also predicts potentials).
        fourier: octaves of Fourier features, 0 for none.
        mlp_ratio: width of the MLP over ``width``.
        tie_qk: one projection for queries and keys.
        norm: ``"pre"`` or ``"post"``.
        normalize: how :meth:`forward` normalises a pair unless told otherwise: ``"pair"``, ``"rms"``
            or ``"none"``.
        value: add a mean-pooled head that regresses the distance (the ablation of 2.4).

    Raises:
        ValueError: an unknown variant, or a width that ``num_heads`` does not divide.

    >>> model = DeepEMD(3, width=16, depth=1, num_heads=2)
    >>> model(torch.randn(2, 5, 3), torch.randn(2, 7, 3)).shape
    torch.Size([2, 5, 7])
    """

    def __init__(
        self,
        dim: int = 3,
        width: int = 128,
        depth: int = 6,
        num_heads: int = 8,
        *,
        arch: str = "paper",
        pattern: str = "joint",
        head: str = "attention",
        fourier: int = 6,
        mlp_ratio: int = 4,
        tie_qk: bool = False,
        norm: str = "pre",
        normalize: str = "pair",
        value: bool = False,
    ) -> None:
        super().__init__()
        _choice("arch", arch, ARCHES)
        _choice("pattern", pattern, PATTERNS)
        _choice("head", head, HEADS)
        _choice("norm", norm, ("pre", "post"))
        self.config: dict[str, Any] = {
            "dim": dim, "width": width, "depth": depth, "num_heads": num_heads, "arch": arch,
            "pattern": pattern, "head": head, "fourier": fourier, "mlp_ratio": mlp_ratio,
            "tie_qk": tie_qk, "norm": norm, "normalize": normalize, "value": value,
        }  # fmt: skip
        self.dim, self.pattern, self.fourier, self.normalize = dim, pattern, fourier, normalize
        self.trained_dims: tuple[int, ...] = (dim,)
        self.embed = nn.Linear(dim * (1 + 2 * fourier), width)
        self.origin = nn.Parameter(torch.randn(2, width) * 0.5)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio=mlp_ratio, norm=norm, biased=arch == "geo")
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = MatchingHead(width, head, tie_qk=tie_qk, value=value)

    def extra_repr(self) -> str:
        """Name the configuration."""
        return ", ".join(f"{key}={value!r}" for key, value in self.config.items())

    def mixes(self) -> list[Mix]:
        """Return what each block attends over."""
        if self.pattern == "joint":
            return ["joint"] * len(self.blocks)
        return [("self", "cross")[i % 2] for i in range(len(self.blocks))]

    def prepare(
        self,
        x: Tensor,
        y: Tensor,
        mask_x: Tensor | None = None,
        mask_y: Tensor | None = None,
        normalize: str | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise a pair in the network's dtype; returns both clouds and the scale (B, 1, 1)."""
        if x.shape[-1] != self.dim or y.shape[-1] != self.dim:
            raise ValueError(
                f"this network reads points of D={self.dim} coordinates, got {x.shape[-1]} and "
                f"{y.shape[-1]}; train one with DeepEMD(dim={x.shape[-1]}) or use another method"
            )
        dtype = self.embed.weight.dtype
        at_least = torch.promote_types(dtype, torch.float32)
        x, y, scale = normalize_pair(
            x.to(at_least), y.to(at_least), mask_x, mask_y, normalize or self.normalize
        )
        return x.to(dtype), y.to(dtype), scale

    def trunk(
        self, x: Tensor, y: Tensor, mask_x: Tensor | None = None, mask_y: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens of both clouds, already normalised, after the last layer norm."""
        points = torch.cat([x, y], 1)
        keep = None
        if mask_x is not None or mask_y is not None:
            true_x = mask_x if mask_x is not None else torch.ones_like(x[..., 0], dtype=torch.bool)
            true_y = mask_y if mask_y is not None else torch.ones_like(y[..., 0], dtype=torch.bool)
            keep = torch.cat([true_x, true_y], 1)
        n = x.shape[1]
        origin = torch.cat(
            [self.origin[:1].expand(n, -1), self.origin[1:].expand(y.shape[1], -1)], 0
        )
        h = self.embed(fourier_features(points, self.fourier)) + origin
        for block, mix in zip(self.blocks, self.mixes(), strict=True):
            h = block(h, points, n, mix, keep)
        h = self.norm(h)
        return h[:, :n], h[:, n:]

    def encode(
        self,
        x: Tensor,
        y: Tensor,
        mask_x: Tensor | None = None,
        mask_y: Tensor | None = None,
        *,
        normalize: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens ``(hx, hy)``: (B, N, width) and (B, M, width)."""
        x, y, _ = self.prepare(x, y, mask_x, mask_y, normalize)
        return self.trunk(x, y, mask_x, mask_y)

    def _scores(self, q: Tensor, k: Tensor, hx: Tensor, hy: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Scores of the rows in ``q``, at least in float32 whatever autocast says."""
        with torch.autocast(q.device.type, enabled=False):
            at_least = torch.promote_types(q.dtype, torch.float32)
            s: Tensor = (q.to(at_least) * q.shape[-1] ** -0.5) @ k.to(at_least).transpose(1, 2)
            if self.head.log_scale is not None:
                inner = -cost_matrix(x, y).to(at_least)
                if self.head.potential is not None:
                    f, g = self._duals(hx, hy)
                    inner = inner + f.to(at_least).unsqueeze(2) + g.to(at_least).unsqueeze(1)
                s = s + self.head.log_scale.to(at_least).exp() * inner
        return s

    def _duals(self, hx: Tensor, hy: Tensor) -> tuple[Tensor, Tensor]:
        assert self.head.potential is not None
        dtype = self.head.potential.weight.dtype
        f, g = self.head.potential(hx.to(dtype)), self.head.potential(hy.to(dtype))
        return f.squeeze(-1), g.squeeze(-1)

    def scores_chunked(
        self,
        x: Tensor,
        y: Tensor,
        mask_x: Tensor | None = None,
        mask_y: Tensor | None = None,
        *,
        chunk_size: int | None = None,
        normalize: str | None = None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield ``(rows, logits[:, rows])`` block by block: the N x M matrix is never stored whole.

        Columns of padding hold -1e9. Arguments as for :meth:`forward`.
        """
        x, y, _ = self.prepare(x, y, mask_x, mask_y, normalize)
        hx, hy = self.trunk(x, y, mask_x, mask_y)
        q, k = self.head.q(hx), self.head.k(hy)
        for rows in row_blocks(x.shape[1], chunk_size):
            s = self._scores(q[:, rows], k, hx[:, rows], hy, x[:, rows], y)
            if mask_y is not None:
                s = s.masked_fill(~mask_y.unsqueeze(1), MASKED)
            yield rows, s

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        mask_x: Tensor | None = None,
        mask_y: Tensor | None = None,
        *,
        normalize: str | None = None,
    ) -> Tensor:
        """Return the logits ``S`` (B, N, M); their row softmax is the estimated matching matrix.

        Args:
            x, y: (B, N, D) and (B, M, D).
            mask_x, mask_y: (B, N) and (B, M), True for real points. Rows and columns of padding hold
                -1e9; padding values do not matter, NaN included.
            normalize: overrides the model's own normalisation.
        """
        (_, scores), *_ = self.scores_chunked(x, y, mask_x, mask_y, normalize=normalize)
        if mask_x is not None:
            scores = scores.masked_fill(~mask_x.unsqueeze(2), MASKED)
        return scores

    def potentials(
        self,
        x: Tensor,
        y: Tensor,
        mask_x: Tensor | None = None,
        mask_y: Tensor | None = None,
        *,
        normalize: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return dual potentials (B, N) and (B, M) in the units of the coordinates (``head="dual"``)."""
        if self.head.potential is None:
            raise ValueError(
                f"head={self.head.kind!r} predicts no potentials; deepemd.core.bounds"
                ".potentials_from_matching makes them from its matching"
            )
        x, y, scale = self.prepare(x, y, mask_x, mask_y, normalize)
        f, g = self._duals(*self.trunk(x, y, mask_x, mask_y))
        return f * scale.squeeze(2), g * scale.squeeze(2)

    def distance(
        self,
        x: Tensor,
        y: Tensor,
        mask_x: Tensor | None = None,
        mask_y: Tensor | None = None,
        *,
        normalize: str | None = None,
    ) -> Tensor:
        """Return the regressed distance (B,) of the mean-pooled ablation head (``value=True``)."""
        if self.head.value is None:
            raise ValueError("this network has no distance head; build it with value=True")
        x, y, scale = self.prepare(x, y, mask_x, mask_y, normalize)
        hx, hy = self.trunk(x, y, mask_x, mask_y)
        pooled = torch.cat([_mean(hx, mask_x), _mean(hy, mask_y)], -1)
        value: Tensor = nn.functional.softplus(self.head.value(pooled)).squeeze(-1)
        return value * scale.flatten()

    def save_pretrained(self, directory: str | Path, *, dtype: torch.dtype | None = None) -> Path:
        """Write ``config.json`` and ``model.safetensors`` into a folder; see :mod:`deepemd.core.hub`."""
        from deepemd.core.hub import save_pretrained

        return save_pretrained(self, directory, dtype=dtype)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = "tiny",
        *,
        map_location: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> DeepEMD:
        """Load a bundled checkpoint by name or a folder; nothing is downloaded.

        Args and errors as for :func:`deepemd.core.hub.from_pretrained`.
        """
        from deepemd.core.hub import from_pretrained

        return from_pretrained(name_or_path, map_location=map_location, dtype=dtype)


def _mean(h: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return h.mean(1)
    weight = mask.unsqueeze(-1).to(h.dtype)
    return (h * weight).sum(1) / weight.sum(1)
