"""The networks of the experiments, all with Softplus(10) where one expects ReLU: without curvature there is no trace."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

BETA = 10.0
"""Sharpness of every Softplus, the paper's."""

_VGG: dict[int, tuple[tuple[int, ...], ...]] = {
    5: ((64,), (128,), (256,), (512,), ()),
    7: ((64,), (128,), (256, 256), (512,), (512,)),
    11: ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    14: ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
}


def small_cnn(num_classes: int = 10, *, channels: int = 1, size: int = 8) -> nn.Sequential:
    """Return the network for digits: three convolutions (32, 32, 64), no batch normalisation, 28,000 parameters.

    Args:
        num_classes: C.
        channels: of the images.
        size: their height and width; above 16 the second convolution has stride 2, too.

    Example:
        >>> import torch
        >>> small_cnn()(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    stride = 2 if size > 16 else 1
    side = math.ceil(math.ceil(size / stride) / 2)
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.Softplus(BETA),
        nn.Conv2d(32, 32, 3, padding=1, stride=stride),
        nn.Softplus(BETA),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.Softplus(BETA),
        nn.Flatten(),
        nn.Linear(64 * side * side, num_classes),
    )


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.Softplus(BETA),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.activation = nn.Softplus(BETA)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.activation(self.body(x) + self.shortcut(x))
        return result


def resnet(depth: int = 18, num_classes: int = 100, *, channels: int = 3) -> nn.Sequential:
    """Return a residual network for 32x32 images: a 3x3 stem, no pooling after it, widths 64 to 512.

    Args:
        depth: 9 (one block a stage), 18 (two) or 34 (3, 4, 6, 3).
        num_classes: C.
        channels: of the images.

    Raises:
        ValueError: another depth.
    """
    blocks = {9: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
    if depth not in blocks:
        raise ValueError(f"depth must be 9, 18 or 34, got {depth!r}")
    layers: list[nn.Module] = [
        nn.Conv2d(channels, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.Softplus(BETA),
    ]
    inputs = 64
    for stage, count in enumerate(blocks[depth]):
        outputs = 64 * 2**stage
        for index in range(count):
            layers.append(_Block(inputs, outputs, 2 if stage and not index else 1))
            inputs = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes)]
    return nn.Sequential(*layers)


def vgg(depth: int = 11, num_classes: int = 100, *, channels: int = 3) -> nn.Sequential:
    """Return a VGG network for 32x32 images, with batch normalisation; the paper's judge is VGG-11.

    Args:
        depth: 5, 7, 11 or 14, as the authors number them.
        num_classes: C.
        channels: of the images.

    Raises:
        ValueError: another depth.
    """
    if depth not in _VGG:
        raise ValueError(f"depth must be 5, 7, 11 or 14, got {depth!r}")
    stages = _VGG[depth]
    layers: list[nn.Module] = []
    inputs = channels
    for stage, widths in enumerate(stages):
        for outputs in widths:
            layers += [
                nn.Conv2d(inputs, outputs, 3, padding=1),
                nn.BatchNorm2d(outputs),
                nn.Softplus(BETA),
            ]
            inputs = outputs
        if stage < 4:  # a picture of 2x2 remains
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * 4, num_classes))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "small-cnn": small_cnn,
    **{
        f"resnet{d}": lambda num_classes, d=d, **kw: resnet(d, num_classes, **kw)
        for d in (9, 18, 34)
    },
    **{f"vgg{d}": lambda num_classes, d=d, **kw: vgg(d, num_classes, **kw) for d in _VGG},
}


def make(name: str, num_classes: int, shape: tuple[int, ...]) -> nn.Module:
    """Return a network by name for images of a shape (channels, height, width).

    Raises:
        ValueError: an unknown name, or images that it does not take.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}; got {name!r}")
    if name == "small-cnn":
        return small_cnn(num_classes, channels=shape[0], size=shape[1])
    if name.startswith("vgg") and shape[1:] != (32, 32):
        raise ValueError(f"{name} takes 32x32 images, got {tuple(shape[1:])}")
    return MODELS[name](num_classes, channels=shape[0])


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def accuracy(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, batch_size: int = 512
) -> float:
    """Return the share of samples that a classifier gets right, in [0, 1], in the mode that it is in."""
    right = 0
    for a, b in zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True):
        right += int((model(a).argmax(1) == b).sum())
    return right / len(x)
