"""The networks of the paper's GANs and the small ones of the digits experiment."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


def mlp(*sizes: int, slope: float = 0.2, output: nn.Module | None = None) -> nn.Sequential:
    """Return linear layers with leaky ReLU between them and an optional module at the end."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(slope)]
    layers.pop()
    return nn.Sequential(*layers, *([output] if output is not None else []))


def digits_pair(latent: int = 32) -> tuple[nn.Module, nn.Module]:
    """Return generator latent-128-128-64 (Tanh) and discriminator 64-128-128-1 for 8x8 digits."""
    return mlp(latent, 128, 128, 64, output=nn.Tanh()), mlp(64, 128, 128, 1)


def ring_pair(latent: int = 16) -> tuple[nn.Module, nn.Module]:
    """Return generator latent-128-128-2 and discriminator 2-128-128-1 for the ring of Gaussians."""
    return mlp(latent, 128, 128, 2), nn.Sequential(*mlp(2, 128, 128, 1), nn.Flatten(0))


def dcgan28() -> tuple[nn.Module, nn.Module]:
    """Return the paper's MNIST pair: noise (n, 128, 1, 1) to images (n, 1, 28, 28), images to logits (n,).

    No convolution has a bias.
    """

    def up(inputs: int, outputs: int, kernel: int, stride: int, padding: int) -> list[nn.Module]:
        layer = nn.ConvTranspose2d(inputs, outputs, kernel, stride, padding, bias=False)
        return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]

    last = nn.ConvTranspose2d(128, 1, 4, 2, 1, bias=False)
    generator = nn.Sequential(
        *up(128, 512, 3, 1, 0), *up(512, 256, 4, 2, 1), *up(256, 128, 4, 2, 0), last, nn.Tanh()
    )

    def down(inputs: int, outputs: int) -> list[nn.Module]:
        layer = nn.Conv2d(inputs, outputs, 4, 2, 1, bias=False)
        return [layer, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)]

    first = [nn.Conv2d(1, 64, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
    discriminator = nn.Sequential(
        *first,
        *down(64, 128),
        *down(128, 256),
        nn.Conv2d(256, 1, 3, 1, 0, bias=False),
        nn.Flatten(0),
    )
    return generator, discriminator


class _Up(nn.Module):
    """Residual block of the generator: twice the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Upsample(scale_factor=2),
            _conv(channels, channels),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            _conv(channels, channels),
        )
        self.bypass = nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.bypass(x)  # type: ignore[no-any-return]


class _Down(nn.Module):
    """Residual block of the discriminator, spectrally normalised; with or without half the resolution."""

    def __init__(
        self, inputs: int, outputs: int, *, first: bool = False, halve: bool = False
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [] if first else [nn.ReLU()]
        layers += [spectral_norm(_conv(inputs, outputs)), nn.ReLU()]
        layers += [spectral_norm(_conv(outputs, outputs))]
        bypass: list[nn.Module] = []
        if halve:
            layers += [nn.AvgPool2d(2)]
            shortcut = spectral_norm(_conv(inputs, outputs, kernel=1))
            bypass = [nn.AvgPool2d(2), shortcut] if first else [shortcut, nn.AvgPool2d(2)]
        self.main, self.bypass = nn.Sequential(*layers), nn.Sequential(*bypass)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.bypass(x)  # type: ignore[no-any-return]


def _conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    nn.init.xavier_uniform_(layer.weight, math.sqrt(2) if kernel == 1 else 1.0)
    return layer


def resnet32() -> tuple[nn.Module, nn.Module]:
    """Return the paper's 32x32 pair (CIFAR-10, SVHN, ImageNet): 4,079,363 and 1,053,825 parameters.

    Noise (n, 128) to images (n, 3, 32, 32) in [-1, 1], images to scores (n,).
    """
    start, end = nn.Linear(128, 4 * 4 * 256), _conv(256, 3)
    nn.init.xavier_uniform_(start.weight)
    generator = nn.Sequential(
        start,
        nn.Unflatten(1, (256, 4, 4)),
        *(_Up(256) for _ in range(3)),
        nn.BatchNorm2d(256),
        nn.ReLU(),
        end,
        nn.Tanh(),
    )
    score = nn.Linear(128, 1)
    nn.init.xavier_uniform_(score.weight)
    discriminator = nn.Sequential(
        _Down(3, 128, first=True, halve=True),
        _Down(128, 128, halve=True),
        _Down(128, 128),
        _Down(128, 128),
        nn.ReLU(),
        nn.AvgPool2d(8),
        nn.Flatten(),
        spectral_norm(score),
        nn.Flatten(0),
    )
    return generator, discriminator
