"""The networks of the paper's experiments, as plain modules that know nothing of preferences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["MODELS", "LeNet", "SegNet", "TaskMLP"]


class TaskMLP(nn.Module):
    """A fully connected encoder with one linear head per task.

    Args:
        inputs: features.
        hidden: widths of the encoder.
        outputs: width of each head.
    """

    def __init__(self, inputs: int, hidden: list[int], outputs: list[int]) -> None:
        """Build the layers."""
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in zip([inputs, *hidden], hidden, strict=False):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self.encoder = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(hidden[-1], out) for out in outputs)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return each head's output."""
        features = self.encoder(x)
        return [head(features) for head in self.heads]


class LeNet(nn.Module):
    """The LeNet of MultiMNIST: two 5×5 convolutions, one linear layer, a two-layer head per task.

    Args:
        tasks: number of heads.
        classes: outputs of each.
    """

    def __init__(self, tasks: int = 2, classes: int = 10) -> None:
        """Build the layers."""
        super().__init__()
        self.encoder = nn.Sequential()
        self.encoder.add_module("conv1", nn.Conv2d(1, 10, 5))
        self.encoder.add_module("pool1", nn.MaxPool2d(2))
        self.encoder.add_module("relu1", nn.ReLU())
        self.encoder.add_module("conv2", nn.Conv2d(10, 20, 5))
        self.encoder.add_module("pool2", nn.MaxPool2d(2))
        self.encoder.add_module("relu2", nn.ReLU())
        self.encoder.add_module("flatten", nn.Flatten())
        self.encoder.add_module("fc", nn.Linear(320, 50))
        self.encoder.add_module("relu3", nn.ReLU())
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, classes))
            for _ in range(tasks)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return each head's logits for 28×28 images."""
        features = self.encoder(x)
        return [head(features) for head in self.heads]


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class SegNet(nn.Module):
    """SegNet with one convolutional head per task, as used for scene understanding.

    Args:
        outputs: channels of each head.
    """

    def __init__(self, outputs: list[int]) -> None:
        """Build the encoder, the decoder and the heads."""
        super().__init__()
        width = [64, 128, 256, 512, 512]
        ins = [3, *width[:-1]]
        self.down = nn.ModuleList(_block(a, b) for a, b in zip(ins, width, strict=True))
        self.down_more = nn.ModuleList(
            nn.Sequential(*(_block(w, w) for _ in range(1 if i < 2 else 2)))
            for i, w in enumerate(width)
        )
        outs = [width[0], *width[:-1]]
        self.up = nn.ModuleList(_block(a, b) for a, b in zip(width, outs, strict=True))
        self.up_more = nn.ModuleList(
            nn.Sequential(*(_block(w, w) for _ in range(1 if i < 2 else 2)))
            for i, w in enumerate(outs)
        )
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, out, 1)) for out in outputs
        )
        self.pool = nn.MaxPool2d(2, 2, return_indices=True)
        self.unpool = nn.MaxUnpool2d(2, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return each head's map at the input's resolution (a multiple of 32)."""
        where = []
        for block, more in zip(self.down, self.down_more, strict=True):
            x, indices = self.pool(more(block(x)))
            where.append(indices)
        for i in reversed(range(len(self.up))):
            x = self.up_more[i](self.up[i](self.unpool(x, where[i])))
        return [head(x) for head in self.heads]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "digits": lambda: TaskMLP(100, [32, 32], [10, 10]),
    "lenet": lambda: LeNet(2),
    "lenet3": lambda: LeNet(3),
    "sarcos": lambda: TaskMLP(21, [256, 256, 256], [1] * 7),
    "segnet-cityscapes": lambda: SegNet([7, 1]),
    "segnet-nyuv2": lambda: SegNet([13, 1, 3]),
}


def meta_model(name: str) -> nn.Module:
    """Build a model of :data:`MODELS` without memory, for counting."""
    with torch.device("meta"):
        return MODELS[name]()
