"""Small PyTorch networks with the parts that algorithms ask for: ``encoder`` and ``classifier``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["CNN", "MLP"]


class MLP(nn.Module):
    """A ReLU network; inputs are flattened.

    Args:
        inputs: number of input features.
        hidden: widths of the hidden layers.
        outputs: number of classes.
        dropout: after every hidden layer.

    >>> import torch
    >>> MLP(4, (8,), 3)(torch.zeros(2, 4)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int] = (256, 256),
        outputs: int = 10,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Flatten()]
        for width in hidden:
            parts += [nn.Linear(inputs, width), nn.ReLU()]
            if dropout:
                parts.append(nn.Dropout(dropout))
            inputs = width
        self.encoder = nn.Sequential(*parts)
        self.classifier = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        out: Tensor = self.classifier(self.encoder(x))
        return out


class CNN(nn.Module):
    """Strided 3x3 convolutions with ReLU, then one Linear layer; inputs (N, C, H, W).

    >>> import torch
    >>> CNN((1, 8, 8), channels=(4, 8))(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        outputs: int = 10,
        *,
        channels: Sequence[int] = (16, 32),
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        last, h, w = shape
        for width in channels:
            parts += [nn.Conv2d(last, width, 3, stride=2, padding=1), nn.ReLU()]
            last, h, w = width, (h + 1) // 2, (w + 1) // 2
        self.encoder = nn.Sequential(*parts, nn.Flatten())
        self.classifier = nn.Linear(last * h * w, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        out: Tensor = self.classifier(self.encoder(x))
        return out
