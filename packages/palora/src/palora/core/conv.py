"""Adapted convolutions in one, two and three dimensions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from palora.core import functional as PF
from palora.core.layers import AdaptedLayer
from palora.core.preference import Active

__all__ = ["AdaptedConv"]


class AdaptedConv(AdaptedLayer):
    """``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` with T adapters.

    Almost always the weight path: the rows of the equivalent product are batch times positions.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def _base(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)  # type: ignore[misc]
        return out

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The input padded as the layer says, and the zero padding left for the convolution."""
        none = (0,) * len(self.kernel_size)
        if self.padding_mode != "zeros":
            return F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), none
        if isinstance(self.padding, str):
            return F.pad(x, self._reversed_padding_repeated_twice), none
        return x, self.padding

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of ``input`` with W(λ)."""
        x = input
        active = self._palora.current(self.training)
        if active.value is None:
            return self._base(x)
        spec, lam = self._palora_spec, self._mixture(active)
        unbatched = x.dim() == len(self.kernel_size) + 1
        if unbatched:
            if lam.dim() == 2:
                raise ValueError(self._row_message(1, lam.shape[0]))
            x = x.unsqueeze(0)
        dropping = bool(spec.dropout and self.training)
        half = self.weight.dtype in (torch.float16, torch.bfloat16)
        if spec.path == "activation" or (spec.path == "auto" and (half or dropping)):
            out = self._by_activation(x, lam, active)
        else:
            out = self._by_weight(x, lam, active)
        return out.squeeze(0) if unbatched else out

    def _by_activation(self, x: Tensor, lam: Tensor, active: Active) -> Tensor:
        if self._palora_spec.mode == "spatial":
            return self._spatial(x, lam, active)
        base, x = self._base(x), self._dropped(x)
        if lam.dim() == 1:
            return base + self._plain(x, self._delta(lam, base.dtype), self.groups)
        # A folded ΔW is no product of two convolutions: each sample gets its own kernel.
        repeat = self._repeat(active, x.shape[0])
        kernels = self._delta(lam, base.dtype)
        groups = kernels.shape[0]
        wide = x.view(groups, repeat, *x.shape[1:]).transpose(0, 1).flatten(1, 2)
        y = self._plain(wide, kernels.flatten(0, 1), self.groups * groups)
        y = y.view(repeat, groups, -1, *y.shape[2:]).transpose(0, 1)
        return base + y.reshape(base.shape)

    def _delta(self, lam: Tensor, dtype: torch.dtype) -> Tensor:
        shape = self.weight.shape
        delta = PF.conv_delta(self.palora_A, self.palora_B, lam, self._palora_spec.scale, shape)
        return delta.to(dtype)

    def _plain(self, x: Tensor, kernel: Tensor, groups: int) -> Tensor:
        x, padding = self._padded(x)
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        out: Tensor = convolve(
            x.to(kernel.dtype), kernel, None, self.stride, padding, self.dilation, groups
        )
        return out

    def _spatial(self, x: Tensor, lam: Tensor, active: Active) -> Tensor:
        """One convolution to T·r channels, scaled by Λ, and a 1×1 convolution back."""
        base, spec, groups = self._base(x), self._palora_spec, self.groups
        repeat = self._repeat(active, x.shape[0]) if lam.dim() == 2 else x.shape[0]
        tasks, k = self.palora_A.shape[:2]
        down = PF.stack_down(self.palora_A).to(base.dtype)
        down = down.view(tasks * k, *self.weight.shape[1:])
        x = self._dropped(x)
        parts = x.reshape(-1, x.shape[1] // groups, *x.shape[2:])
        z = self._plain(parts, down, 1)
        rows = lam.to(z.dtype).view(-1, 1, tasks, 1) * spec.scale
        z = (z.view(rows.shape[0], repeat * groups, tasks, -1) * rows).view(z.shape)
        z = z.view(x.shape[0], groups * tasks * k, *z.shape[2:])
        up = PF.stack_up(self.palora_B).to(z.dtype)
        up = up.view(*up.shape, *([1] * len(self.kernel_size)))
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        out: Tensor = base + convolve(z, up, groups=groups)
        return out

    def _by_weight(self, x: Tensor, lam: Tensor, active: Active) -> Tensor:
        _spec, dtype = self._palora_spec, self._computes_in(x)
        if dtype != self.weight.dtype:
            x = x.to(dtype)
        if lam.dim() == 1:
            kept = self._cached_weight(active, lam, dtype)
            if kept is not None:
                bias = None if self.bias is None else self.bias.to(dtype)
                x, padding = self._padded(x)
                return PF._convolve(
                    x, kept, bias, (self.stride, padding, self.dilation, self.groups)
                )
            return self._mixed(x, lam, (x.shape[0],), "loop")
        if active.rays:
            each = self._repeat(active, x.shape[0])
            source = self._blocks_repeat(active, x) if self.groups == 1 else None
            if source is not None:
                return self._mixed(source, lam, (each,) * active.rays, "shared")
            mode = "grouped" if x.is_cuda or torch.compiler.is_compiling() else "loop"
            return self._mixed(x, lam, (each,) * active.rays, mode)
        return self._per_sample(x, lam, active)

    def _per_sample(self, x: Tensor, lam: Tensor, active: Active) -> Tensor:
        """Samples of equal λ are brought together, one convolution for each distinct λ."""
        repeat = self._repeat(active, x.shape[0])
        if lam.requires_grad or torch.compiler.is_compiling():
            return self._mixed(x, lam, (repeat,) * lam.shape[0], "grouped")
        distinct, index = torch.unique(lam, dim=0, return_inverse=True)
        index = index.repeat_interleave(repeat)
        order = torch.argsort(index, stable=True)
        sizes = tuple(torch.bincount(index, minlength=distinct.shape[0]).tolist())
        equal = len(set(sizes)) == 1
        mode = "grouped" if equal and (sizes[0] == 1 or x.is_cuda) else "loop"
        y = self._mixed(x.index_select(0, order), distinct, sizes, mode)
        return y.index_select(0, torch.argsort(order))

    def _mixed(self, x: Tensor, lam: Tensor, sizes: tuple[int, ...], mode: str) -> Tensor:
        x, padding = self._padded(x)
        return PF.mixed_conv(
            x,
            self.weight,
            self.bias,
            self.palora_A,
            self.palora_B,
            lam,
            self._palora_spec.scale,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            sizes=sizes,
            mode=mode,
            dtype=self._computes_in(x),
        )
