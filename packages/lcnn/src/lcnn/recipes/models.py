"""The paper's networks, with or without the method, and the small ones of the experiments."""

from __future__ import annotations

import itertools
import math
from typing import Any

from torch import Tensor, nn

from lcnn.core.activation import CenteredSoftplus
from lcnn.core.norm import LipschitzBatchNorm2d
from lcnn.core.parametrize import conv_spectral_norm, linear_spectral_norm

__all__ = [
    "AveragedBlock",
    "digits_net",
    "mlp",
    "resnet18",
    "resnet34",
    "small_cnn",
    "small_resnet",
    "vgg11",
]


class _Maker:
    """Makes layers for one image size, low-curvature or standard (Softplus with beta = 1000)."""

    def __init__(self, lcnn: bool, size: int) -> None:
        self.lcnn, self.size = lcnn, size

    def conv(self, c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> nn.Module:
        conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)
        return conv_spectral_norm(conv, (self.size, self.size)) if self.lcnn else conv

    def norm(self, channels: int) -> nn.Module:
        if self.lcnn:
            return LipschitzBatchNorm2d(channels)
        return nn.BatchNorm2d(channels, affine=False)

    def act(self) -> nn.Module:
        return CenteredSoftplus() if self.lcnn else nn.Softplus(1000.0)


class AveragedBlock(nn.Module):
    """y = act((f(x / sqrt 2) + g(x / sqrt 2)) / 2): slope at most (l_f + l_g) / (2 sqrt 2) (Section 4.2).

    f is conv-norm-act-conv-norm; the shortcut g is the identity or conv1x1-norm.
    """

    def __init__(self, make: Any, c_in: int, c_out: int, stride: int = 1) -> None:
        """Check and keep the arguments; the class says what they are."""
        super().__init__()
        start = make.size
        first = [make.conv(c_in, c_out, 3, stride), make.norm(c_out), make.act()]
        make.size = -(-start // stride)
        self.main = nn.Sequential(*first, make.conv(c_out, c_out), make.norm(c_out))
        make.size = start
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(make.conv(c_in, c_out, 1, stride), make.norm(c_out))
        make.size = -(-start // stride)
        self.act = make.act()

    def branches(self) -> tuple[nn.Module, nn.Module]:
        """The two parallel paths, for :func:`lcnn.curvature_surrogate`."""
        return self.main, self.shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        x = x / math.sqrt(2)
        out: Tensor = self.act((self.main(x) + self.shortcut(x)) / 2)
        return out


def _resnet(
    blocks: tuple[int, ...],
    widths: tuple[int, ...],
    num_classes: int,
    lcnn: bool,
    in_channels: int,
    size: int,
) -> nn.Sequential:
    make = _Maker(lcnn, size)
    layers: list[nn.Module] = [
        make.conv(in_channels, widths[0]),
        make.norm(widths[0]),
        make.act(),
    ]
    channels = widths[0]
    for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
        for index in range(count):
            layers.append(AveragedBlock(make, channels, width, 2 if stage and not index else 1))
            channels = width
    head = linear_spectral_norm(nn.Linear(channels, num_classes))  # in the baseline, too
    return nn.Sequential(*layers, nn.AvgPool2d(make.size), nn.Flatten(), head)


def resnet18(
    num_classes: int = 100, *, lcnn: bool = True, in_channels: int = 3, size: int = 32
) -> nn.Sequential:
    """Return the paper's ResNet-18: 3x3 stem, widths 64 to 512, averaged residual blocks.

    Args:
        num_classes: outputs.
        lcnn: False for the standard network (Softplus with beta 1000, plain batch norm); its head is
            spectrally normalised all the same.
        in_channels: of the images.
        size: height and width of the images.

    Example:
        >>> import torch
        >>> resnet18(10, size=8)(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    return _resnet((2, 2, 2, 2), (64, 128, 256, 512), num_classes, lcnn, in_channels, size)


def resnet34(
    num_classes: int = 100, *, lcnn: bool = True, in_channels: int = 3, size: int = 32
) -> nn.Sequential:
    """Return the paper's ResNet-34, see :func:`resnet18`."""
    return _resnet((3, 4, 6, 3), (64, 128, 256, 512), num_classes, lcnn, in_channels, size)


def small_resnet(
    num_classes: int = 10, *, lcnn: bool = True, in_channels: int = 1, size: int = 28
) -> nn.Sequential:
    """Return a narrow relative of :func:`resnet18` (one block a stage, widths 16, 32, 64) for two cores."""
    return _resnet((1, 1, 1), (16, 32, 64), num_classes, lcnn, in_channels, size)


def vgg11(
    num_classes: int = 100, *, lcnn: bool = True, in_channels: int = 3, size: int = 32
) -> nn.Sequential:
    """Return the paper's VGG-11; its head is not normalised. Each activation has its own beta here.

    Args:
        num_classes: outputs.
        lcnn: False for the standard network.
        in_channels: of the images.
        size: height and width of the images, a multiple of 8.
    """
    make = _Maker(lcnn, size)
    layers: list[nn.Module] = []
    channels = in_channels
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512):
        if width == 0:
            layers.append(nn.MaxPool2d(2))
            make.size //= 2
            continue
        layers += [make.conv(channels, width), make.norm(width), make.act()]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512 * make.size**2, num_classes))


def digits_net(num_classes: int = 10) -> nn.Sequential:
    """Return the plain network of the demo, for 8x8 images, to be converted.

    Example:
        >>> import torch
        >>> digits_net()(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 10])
    """
    layers: list[nn.Module] = []
    channels = 1
    for width, stride in ((24, 1), (24, 1), (48, 2), (48, 1)):
        conv = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(width, affine=False), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(192, num_classes))


def mlp(*widths: int) -> nn.Sequential:
    """Return a ReLU network with the given widths.

    Example:
        >>> import torch
        >>> mlp(2, 8, 2)(torch.zeros(1, 2)).shape
        torch.Size([1, 2])
    """
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def small_cnn(num_classes: int = 10) -> nn.Sequential:
    """Return a plain network for 28x28 images, to be converted: four convolutions, widths 16 to 32.

    Example:
        >>> import torch
        >>> small_cnn()(torch.zeros(1, 1, 28, 28)).shape
        torch.Size([1, 10])
    """
    layers: list[nn.Module] = []
    channels = 1
    for width, stride in ((16, 2), (16, 1), (32, 2), (32, 1)):
        conv = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(width, affine=False), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AvgPool2d(7), nn.Flatten(), nn.Linear(32, num_classes))
