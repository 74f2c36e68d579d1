"""Adapted layers: subclasses that a user's own module is switched to in place.

Switching the class of the object keeps its identity, its parameters under their names, its hooks
and every ``isinstance`` check.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palora.core import functional as PF
from palora.core.preference import Active, PreferenceState

__all__ = ["AdaptedLayer", "LayerSpec", "Switched", "adapted_class", "original_class"]


@dataclass
class LayerSpec:
    """How one layer is adapted.

    Attributes:
        name: dotted name in the model.
        kind: ``linear``, ``conv1d-hf``, ``conv``, ``embedding`` or ``attention``.
        rows: rows of the weight seen as a matrix.
        cols: its columns.
        rank: r.
        inner: k, the shared dimension of A and B (r, or r times the kernel side when folded).
        scale: s.
        path: ``auto``, ``activation`` or ``weight``.
        dropout: probability of dropping an entry of the adapter's input.
        mode: of a convolution ``folded``, ``flat`` or ``spatial``; of attention ``fused``/``split``.
        exponent: c of the layer's own λ^c/Σλ^c; 1 uses λ as it is.
    """

    name: str
    kind: str
    rows: int
    cols: int
    rank: int
    inner: int
    scale: float
    path: str = "auto"
    dropout: float = 0.0
    mode: str = ""
    exponent: float = 1.0

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as ``(cols, rows)``."""
        return self.kind in ("conv1d-hf", "embedding")


class Switched:
    """Mixin of every class that a user's module is switched to; knows the way back."""

    _palora_original: ClassVar[type]
    _palora_mixin: ClassVar[type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the original class: the switched one is made on demand."""
        reduced = super().__reduce_ex__(protocol)
        return (_rebuild, (type(self)._palora_mixin, type(self)._palora_original), *reduced[2:])


_CLASSES: dict[tuple[type, type], type] = {}


def adapted_class(mixin: type, original: type) -> type:
    """Return the class (made once) of ``original`` with the behaviour of ``mixin``."""
    key = (mixin, original)
    if key not in _CLASSES:
        _CLASSES[key] = type(
            f"Palora{original.__name__}",
            (mixin, original),
            {
                "__module__": mixin.__module__,
                "__doc__": original.__doc__,
                "_palora_original": original,
                "_palora_mixin": mixin,
            },
        )
    return _CLASSES[key]


def original_class(module: nn.Module) -> Any:
    """The class that ``module`` had before it was switched."""
    return type(module)._palora_original if isinstance(module, Switched) else type(module)


def _rebuild(mixin: type, original: type) -> Any:
    cls: Any = adapted_class(mixin, original)
    return cls.__new__(cls)


def sharpened(lam: Tensor, exponent: float) -> Tensor:
    """λ^c/Σλ^c; weights off the simplex keep their sign."""
    sharp = lam.sign() * lam.abs().pow(exponent)
    return sharp / sharp.sum(-1, keepdim=True)


class AdaptedLayer(Switched):
    """What the adapted layers share: A and B, the preference in force, the choice of the path."""

    palora_A: nn.Parameter
    palora_B: nn.Parameter
    weight: nn.Parameter
    bias: nn.Parameter | None
    training: bool
    _palora: PreferenceState
    _palora_spec: LayerSpec

    def extra_repr(self) -> str:
        """Add the adapters to the original representation."""
        spec = self._palora_spec
        base: str = super().extra_repr()  # type: ignore[misc]
        return f"{base}, tasks={self.palora_A.shape[0]}, rank={spec.rank}, scale={spec.scale:.4g}"

    def _mixture(self, active: Active) -> Tensor:
        """λ in the dtype and device of the adapters, after this layer's own sharpening."""
        lam = active.on(self.palora_A)
        exponent = self._palora_spec.exponent
        if exponent == 1.0:
            return lam
        return sharpened(lam, exponent)

    def _computes_in(self, x: Tensor) -> torch.dtype:
        """The dtype autocast would run this layer in, else the weight's."""
        device = x.device.type
        if device != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.weight.dtype

    def _takes_weight_path(self, n: int) -> bool:
        spec = self._palora_spec
        if spec.path != "auto":
            return spec.path == "weight"
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            return False  # a small ΔW added to a half-precision W is lost in its rounding
        if spec.dropout and self.training:
            return False
        return PF.prefers_weight_path(n, spec.rows, spec.cols)

    def _repeat(self, active: Active, n: int) -> int:
        """How many consecutive rows of the input share one row of the preference."""
        assert active.value is not None
        rows = active.value.shape[0]
        batch = rows * active.batch
        if n == batch or (n % batch == 0 and (active.rays or active.allow_expand)):
            return n // rows
        raise ValueError(self._row_message(n, batch))

    def _row_message(self, n: int, batch: int) -> str:
        many = self._palora.current(self.training).rays
        rest = (
            "several preferences in one pass need the batch as the first dimension: use chunk=1"
            if many
            else "per-sample preferences need the batch as the first dimension (allow_expand=True "
            "accepts multiples: windows or beams)"
        )
        return (
            f"layer {self._palora_spec.name!r}: the input's first dimension is {n}, the preference "
            f"has {batch} rows; {rest}"
        )

    def _dropped(self, x: Tensor) -> Tensor:
        p = self._palora_spec.dropout
        return F.dropout(x, p, self.training) if p else x

    def _cached_weight(self, active: Active, lam: Tensor, dtype: torch.dtype) -> Tensor | None:
        """W(λ) kept while nothing that it depends on changes; None where it may not be kept."""
        if torch.compiler.is_compiling() or self.training or torch.is_grad_enabled():
            return None
        if active.value is None or active.value.requires_grad:  # it may change in place
            return None
        parts = (self.weight, self.palora_A, self.palora_B)
        if any(p.is_inference() or type(p) is not nn.Parameter for p in parts):
            return None
        key = (*((id(p), p._version, p.data_ptr()) for p in parts), dtype)
        held = active.mixed.get(id(self))
        if held is None or held[0] != key:
            spec = self._palora_spec
            with PF._no_autocast(self.weight.device.type):
                w = PF.mixed_weight(*parts, lam, spec.scale, spec.transposed).to(dtype)
            held = (key, w, parts)
            active.mixed[id(self)] = held
        kept: Tensor = held[1]
        return kept

    def _blocks_repeat(self, active: Active, x: Tensor) -> Tensor | None:
        """The samples that every ray sees alike, if ``x`` is a tiled input of the model."""
        if torch.compiler.is_compiling() or not active.tiled or not x.is_contiguous():
            return None
        rays = active.rays
        for address, elements, source in active.tiled:
            if (
                x.numel() == elements
                and x.shape[0] % rays == 0
                and x.untyped_storage().data_ptr() == address
                and source._version == 0
            ):
                return x[: x.shape[0] // rays]
        return None


def reset_adapters(layer: AdaptedLayer, init: str, generator: torch.Generator | None) -> None:
    """Initialise A and B so that W(λ) = W for every λ."""
    A, B = layer.palora_A, layer.palora_B
    with torch.no_grad():
        if layer._palora_spec.kind == "embedding":
            A.zero_()
            B.normal_(generator=generator)
            return
        B.zero_()
        if init == "gaussian":
            A.normal_(std=1 / layer._palora_spec.rank, generator=generator)
        else:
            bound = 1 / math.sqrt(A.shape[-1])
            A.uniform_(-bound, bound, generator=generator)


class AdaptedLinear(AdaptedLayer):
    """``nn.Linear`` with T adapters."""

    def _base(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)  # type: ignore[misc]
        return out

    def forward(self, input: Tensor) -> Tensor:
        """Return ``x W(λ)ᵀ + b``."""
        return self._apply_at(input)

    def _apply_at(self, x: Tensor) -> Tensor:
        active = self._palora.current(self.training)
        if active.value is None:
            return self._base(x)
        spec, lam = self._palora_spec, self._mixture(active)
        if spec.path == "activation" or (spec.dropout and self.training):
            return self._by_activation(x, lam, active)
        n = x.numel() // x.shape[-1] if x.shape[-1] else 0
        if lam.dim() == 1:
            if not self._takes_weight_path(n):
                return self._by_activation(x, lam, active)
            return self._by_weight(x, lam, active)
        if active.rays and self._takes_weight_path(n // active.rays):
            self._repeat(active, x.shape[0])
            return self._by_weight(x, lam, active)
        return self._by_activation(x, lam, active)

    def _by_weight(self, x: Tensor, lam: Tensor, active: Active) -> Tensor:
        spec, dtype = self._palora_spec, self._computes_in(x)
        if dtype != self.weight.dtype:
            x = x.to(dtype)
        kept = self._cached_weight(active, lam, dtype) if lam.dim() == 1 else None
        if kept is not None:
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.linear(x, kept.t() if spec.transposed else kept, bias)
        return PF.mixed_linear(
            x,
            self.weight,
            self.bias,
            self.palora_A,
            self.palora_B,
            lam,
            spec.scale,
            transposed=spec.transposed,
            dtype=dtype,
        )

    def _by_activation(self, x: Tensor, lam: Tensor, active: Active) -> Tensor:
        spec = self._palora_spec
        repeat = 1
        if lam.dim() == 2:
            if x.dim() < 2:
                raise ValueError(self._row_message(1, lam.shape[0]))
            repeat = self._repeat(active, x.shape[0])
        source = None if spec.dropout else self._blocks_repeat(active, x)
        if source is not None:
            return self._shared(source, lam, active.rays)
        base = self._base(x)
        z = F.linear(self._dropped(x), PF.stack_down(self.palora_A).to(base.dtype))
        if lam.dim() == 1:
            up = PF.stack_up(self.palora_B, lam)
        else:
            up = PF.stack_up(self.palora_B)
            tasks, k = self.palora_A.shape[:2]
            rows = lam.to(z.dtype).view(-1, *([1] * (z.dim() - 1)), tasks, 1)
            z = (z.view(-1, repeat, *z.shape[1:-1], tasks, k) * rows).view(z.shape)
        out = torch.addmm(
            base.view(-1, spec.rows),
            z.view(-1, z.shape[-1]),
            up.to(z.dtype).t(),
            alpha=spec.scale,
        )
        return out.view(base.shape)

    def _shared(self, source: Tensor, lam: Tensor, rays: int) -> Tensor:
        """All rays see the same samples: the base product is computed once and expanded."""
        spec = self._palora_spec
        base = self._base(source)
        z = F.linear(source, PF.stack_down(self.palora_A).to(base.dtype))
        tasks, k = self.palora_A.shape[:2]
        rows = lam.to(z.dtype).view(rays, *([1] * z.dim()), tasks, 1).squeeze(-3)
        many = (z.view(*z.shape[:-1], tasks, k) * rows).reshape(rays, -1, tasks * k)
        up = PF.stack_up(self.palora_B).to(z.dtype).t()
        out = torch.baddbmm(
            base.reshape(1, -1, spec.rows).expand(rays, -1, -1),
            many,
            up.expand(rays, -1, -1),
            alpha=spec.scale,
        )
        return out.view(rays * base.shape[0], *base.shape[1:])


class AdaptedConv1D(AdaptedLinear):
    """Hugging Face's ``Conv1D``: a Linear whose weight is stored transposed and input called x."""

    def _base(self, x: Tensor) -> Tensor:
        out: Tensor = super(AdaptedLinear, self).forward(x)  # type: ignore[misc]
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W(λ) + b``."""
        return self._apply_at(x)


class AdaptedEmbedding(AdaptedLayer):
    """``nn.Embedding`` with T adapters, looked up row by row: the table is never mixed."""

    padding_idx: int | None

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of W(λ) that ``input`` names."""
        x = input
        active = self._palora.current(self.training)
        base: Tensor = super().forward(x)  # type: ignore[misc]
        if active.value is None:
            return base
        spec, lam = self._palora_spec, self._mixture(active)
        z = F.embedding(x, PF.stack_down(self.palora_A).t(), self.padding_idx).to(base.dtype)
        if lam.dim() == 1:
            up = PF.stack_up(self.palora_B, lam)
        else:
            repeat = self._repeat(active, x.shape[0])
            up = PF.stack_up(self.palora_B)
            tasks, k = self.palora_A.shape[:2]
            rows = lam.to(z.dtype).view(-1, *([1] * (z.dim() - 1)), tasks, 1)
            z = (z.view(-1, repeat, *z.shape[1:-1], tasks, k) * rows).view(z.shape)
        return base + spec.scale * F.linear(z, up.to(z.dtype))
