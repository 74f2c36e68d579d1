"""The linear map that a convolution is, its adjoint, and its norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ConvMap", "conv_operator_norm"]

Ints = int | Sequence[int]
Method = Literal["power", "exact", "fft", "gram"]
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _ints(value: Ints, n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value)


@dataclass(frozen=True)
class ConvMap:
    """A_W: (C_in, *size) -> (C_out, *out_size), a convolution without its bias, on one sample.

    ``pads`` are (before, after) for each axis; ``mode`` is how the border is filled. A transposed
    convolution is the adjoint of a convolution, so ``transposed`` only swaps the two directions, and ``big``
    is the larger side's size.
    """

    big: tuple[int, ...]
    small: tuple[int, ...]
    stride: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    mode: str = "zeros"
    transposed: bool = False

    @staticmethod
    def build(
        weight: Tensor,
        input_size: Sequence[int],
        stride: Ints = 1,
        padding: Ints | str = 0,
        dilation: Ints = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        transposed: bool = False,
        output_padding: Ints = 0,
    ) -> ConvMap:
        """Describe the map of a weight on inputs of ``input_size`` (spatial only)."""
        kernel = tuple(weight.shape[2:])
        n = len(kernel)
        size = tuple(int(s) for s in input_size)
        if len(size) != n or min(size) < 1:
            raise ValueError(
                f"input_size must have {n} positive entries for a weight of shape "
                f"{tuple(weight.shape)}, got {tuple(input_size)}"
            )
        strides, dilations = _ints(stride, n), _ints(dilation, n)
        spans = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        if padding == "same":
            pads = tuple((s // 2, s - s // 2) for s in spans)
        elif padding == "valid":
            pads = ((0, 0),) * n
        else:
            if isinstance(padding, str):
                raise ValueError(f"padding must be numbers, 'same' or 'valid', got {padding!r}")
            pads = tuple((p, p) for p in _ints(padding, n))
        both = [a + b for a, b in pads]
        if transposed:
            extra = _ints(output_padding, n)
            big = tuple(
                (m - 1) * st - p + span + e + 1
                for m, st, p, span, e in zip(size, strides, both, spans, extra, strict=True)
            )
            return ConvMap(big, size, strides, pads, dilations, groups, padding_mode, True)
        small = tuple(
            (m + p - span - 1) // st + 1
            for m, p, span, st in zip(size, both, spans, strides, strict=True)
        )
        if min(small) < 1:
            raise ValueError(f"input_size {size} is smaller than the kernel {kernel}")
        return ConvMap(size, small, strides, pads, dilations, groups, padding_mode, False)

    @staticmethod
    def of(conv: nn.Module, input_size: Sequence[int]) -> ConvMap:
        """Describe the map of an ``nn.Conv*`` or ``nn.ConvTranspose*`` module."""
        module: Any = conv
        transposed = bool(module.transposed)
        return ConvMap.build(
            module.weight,
            input_size,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            module.padding_mode,
            transposed,
            module.output_padding if transposed else 0,
        )

    def _index(self, axis: int, device: torch.device) -> Tensor:
        """Which entry of the input each entry of the padded input repeats."""
        size, (before, after) = self.big[axis], self.pads[axis]
        where = torch.arange(-before, size + after, device=device)
        if self.mode == "circular":
            return where % size
        if self.mode == "replicate":
            return where.clamp(0, size - 1)
        return size - 1 - (size - 1 - where.abs()).abs()  # reflect

    def _pad(self, x: Tensor) -> Tensor:
        if self.mode == "zeros":
            return F.pad(x, [p for pair in reversed(self.pads) for p in pair])
        for axis in range(len(self.big)):
            x = x.index_select(axis + 2, self._index(axis, x.device))
        return x

    def _unpad(self, y: Tensor) -> Tensor:
        """Adjoint of :meth:`_pad`."""
        for axis, ((before, _), size) in enumerate(zip(self.pads, self.big, strict=True)):
            if self.mode == "zeros":
                y = y.narrow(axis + 2, before, size)
            else:
                shape = list(y.shape)
                shape[axis + 2] = size
                y = y.new_zeros(shape).index_add(axis + 2, self._index(axis, y.device), y)
        return y

    @property
    def _symmetric(self) -> bool:
        return self.mode == "zeros" and all(a == b for a, b in self.pads)

    def _down(self, weight: Tensor, x: Tensor) -> Tensor:
        conv: Any = _CONV[len(self.big)]
        padding: Any = tuple(a for a, _ in self.pads) if self._symmetric else 0
        x = x if self._symmetric else self._pad(x)
        out: Tensor = conv(x, weight, None, self.stride, padding, self.dilation, self.groups)
        return out

    def _up(self, weight: Tensor, y: Tensor) -> Tensor:
        n = len(self.big)
        total = [m + a + b for m, (a, b) in zip(self.big, self.pads, strict=True)]
        reached = [
            (m - 1) * st + d * (k - 1) + 1
            for m, st, d, k in zip(
                self.small, self.stride, self.dilation, weight.shape[2:], strict=True
            )
        ]
        missing = tuple(t - r for t, r in zip(total, reached, strict=True))
        conv: Any = _TRANSPOSED[n]
        if self._symmetric and all(m < s for m, s in zip(missing, self.stride, strict=True)):
            padding: Any = tuple(a for a, _ in self.pads)
            out: Tensor = conv(
                y, weight, None, self.stride, padding, missing, self.groups, self.dilation
            )
            return out
        out = conv(y, weight, None, self.stride, 0, 0, self.groups, self.dilation)
        out = F.pad(out, [p for m in reversed(missing) for p in (0, m)])
        return self._unpad(out)

    def forward(self, weight: Tensor, x: Tensor) -> Tensor:
        """Apply A_W to (batch, C_in, *size)."""
        return self._up(weight, x) if self.transposed else self._down(weight, x)

    def adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        """Apply the transpose of A_W to (batch, C_out, *out_size)."""
        return self._down(weight, y) if self.transposed else self._up(weight, y)

    def shapes(self, weight: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes (1, C_in, *size) and (1, C_out, *out_size)."""
        big = (1, weight.shape[1] * self.groups, *self.big)
        small = (1, weight.shape[0], *self.small)
        return (small, big) if self.transposed else (big, small)


def unit(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Normalise a vector of any shape."""
    scaled: Tensor = x / x.norm().clamp_min(eps)
    return scaled


def start_vector(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return the same random unit vector on every process and device."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    return unit(start).to(like)


def _power(weight: Tensor, conv: ConvMap, tol: float) -> Tensor:
    with torch.no_grad():
        u, last = start_vector(conv.shapes(weight)[1], weight), 0.0
        for _ in range(5000):
            v = unit(conv.adjoint(weight, u))
            image = conv.forward(weight, v)
            u, sigma = unit(image), float(image.norm())
            # with a small gap each step gains little: ask for much less than tol
            if abs(sigma - last) <= max(1e-5 * tol, 2 * torch.finfo(weight.dtype).eps) * sigma:
                break
            last = sigma
    return (u * conv.forward(weight, v)).sum()


def dense_matrix(weight: Tensor, conv: ConvMap) -> Tensor:
    shape = conv.shapes(weight)[0]
    size = math.prod(shape)
    basis = torch.eye(size, dtype=weight.dtype, device=weight.device).view(size, *shape[1:])
    return conv.forward(weight, basis).flatten(1).T


def frequency_blocks(weight: Tensor, conv: ConvMap) -> Tensor:
    """(groups, frequencies, C_out/g, C_in/g): the blocks of a circular convolution that contains A_W."""
    circular = conv.mode == "circular" and max(conv.stride) == 1
    if conv.mode not in ("zeros", "circular") or (conv.mode == "circular" and not circular):
        raise ValueError(
            f"method 'fft' or 'gram' needs zero padding, or circular padding with stride 1; got "
            f"padding_mode {conv.mode!r} with stride {conv.stride}"
        )
    kernel = weight.shape[2:]
    span = [d * (k - 1) + 1 for d, k in zip(conv.dilation, kernel, strict=True)]
    if circular:
        grid = list(conv.big)
        if any(s > g for s, g in zip(span, grid, strict=True)):
            raise ValueError(f"the dilated kernel {span} is larger than the input {grid}")
    else:
        grid = [m + max(a, b) for m, (a, b) in zip(conv.big, conv.pads, strict=True)]
        grid = [max(g, s) for g, s in zip(grid, span, strict=True)]  # no window meets itself
    spread = weight.new_zeros(*weight.shape[:2], *grid)
    taps = [slice(0, s, d) for s, d in zip(span, conv.dilation, strict=True)]
    where = (slice(None), slice(None), *taps)
    spread[where] = weight
    axes = tuple(range(2, 2 + len(grid)))
    blocks = torch.fft.fftn(spread, dim=axes).flatten(2)  # (C_out, C_in/g, F)
    blocks = blocks.unflatten(0, (conv.groups, -1))
    # more padding than the kernel needs repeats outputs: each frequency at most so many times
    repeats = [-(-n // m) for n, m in zip(conv.small, conv.big, strict=True)] if circular else [1]
    moved: Tensor = blocks.permute(0, 3, 1, 2) * math.sqrt(math.prod(repeats))
    return moved


def gram_norm(blocks: Tensor, tol: float) -> Tensor:
    """Largest singular value by Gram iteration: an upper bound that falls to it (Delattre et al. 2023)."""
    log_scale = torch.zeros(blocks.shape[:-2], dtype=blocks.real.dtype, device=blocks.device)
    tiny = torch.finfo(log_scale.dtype).tiny
    steps = max(3, math.ceil(math.log2(math.log(max(2, min(blocks.shape[-2:]))) / tol)) + 1)
    power = 1.0
    if blocks.shape[-2] < blocks.shape[-1]:
        blocks = blocks.mH
    for _ in range(min(steps, 24)):
        norm = torch.linalg.matrix_norm(blocks).clamp_min(tiny)
        log_scale = 2 * (log_scale + norm.log())
        blocks = blocks / norm[..., None, None]
        blocks = blocks.mH @ blocks
        power *= 2
    final = torch.linalg.matrix_norm(blocks).clamp_min(tiny)
    bound: Tensor = ((final.log() + log_scale) / power).max().exp()
    return bound


def conv_operator_norm(
    weight: Tensor,
    input_size: Sequence[int],
    *,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: Ints = 0,
    method: Method = "power",
    tol: float = 1e-4,
) -> Tensor:
    """Return the l2 operator norm of a convolution, a differentiable scalar (paper, Section 4.3).

    Args:
        weight: ``(C_out, C_in / groups, *kernel)`` with one to three kernel axes, or ``(C_in, C_out / groups,
            *kernel)`` where ``transposed``.
        input_size: spatial size of the input, as the layer really sees it.
        stride: as in ``nn.Conv2d``.
        padding: as in ``nn.Conv2d``, ``"same"`` and ``"valid"`` included.
        dilation: as in ``nn.Conv2d``.
        groups: as in ``nn.Conv2d``.
        padding_mode: ``"zeros"``, ``"circular"``, ``"reflect"`` or ``"replicate"``.
        transposed: whether the layer is a transposed convolution.
        output_padding: as in ``nn.ConvTranspose2d``.
        method: ``"power"``: power iteration on the operator, from below, until a step changes it by
            less than ``tol / 100000``. ``"exact"``: the singular values of the dense matrix, for small layers.
            ``"fft"``: the largest block of the circular convolution that contains the layer: exact for
            circular padding with stride 1 and an output of the input's size (or whole multiples of it), an
            upper bound for other circular padding with stride 1 and for zero padding (any stride). ``"gram"``: the
            same blocks by Gram iteration, without an SVD; an upper bound within ``tol`` of ``"fft"``.
        tol: relative tolerance.

    Raises:
        ValueError: for a size that does not fit the weight, or a method that cannot treat the padding.

    Example:
        >>> identity = torch.zeros(1, 1, 3, 3)
        >>> identity[0, 0, 1, 1] = 2.0
        >>> round(conv_operator_norm(identity, (8, 6), padding=1).item(), 5)
        2.0
    """
    conv = ConvMap.build(
        weight,
        input_size,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        transposed,
        output_padding,
    )
    if method == "power":
        return _power(weight, conv, tol)
    if method == "exact":
        dense = dense_matrix(weight, conv)
        top: Tensor = torch.linalg.svdvals(dense)[0]
        return top
    if method == "fft":
        top = torch.linalg.svdvals(frequency_blocks(weight, conv)).max()
        return top
    if method == "gram":
        return gram_norm(frequency_blocks(weight, conv), tol)
    raise ValueError(f"method must be 'power', 'exact', 'fft' or 'gram', got {method!r}")
