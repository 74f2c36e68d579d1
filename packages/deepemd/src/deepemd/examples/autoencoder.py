"""A small point-cloud auto-encoder, trained with any loss and scored by exact EMD (spec 3.3.5)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deepemd.api import emd


class PointEncoder(nn.Module):
    """PointNet: an MLP per point, the maximum over points, a linear map."""

    def __init__(self, dim: int, latent: int, width: int = 96) -> None:
        super().__init__()
        self.points = nn.Sequential(
            nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )  # fmt: skip
        self.out = nn.Linear(width, latent)

    def forward(self, x: Tensor) -> Tensor:
        """Encode (B, N, D) as (B, latent)."""
        out: Tensor = self.out(self.points(x).amax(1))
        return out


class PointAutoencoder(nn.Module):
    """Encoder and an MLP decoder that emits all N points at once.

    >>> PointAutoencoder(2, 16)(torch.rand(3, 16, 2)).shape
    torch.Size([3, 16, 2])
    """

    def __init__(self, dim: int, n_points: int, latent: int = 24, width: int = 96) -> None:
        super().__init__()
        self.encoder = PointEncoder(dim, latent, width)
        self.decoder = nn.Sequential(
            nn.Linear(latent, 2 * width), nn.ReLU(), nn.Linear(2 * width, 2 * width), nn.ReLU(),
            nn.Linear(2 * width, n_points * dim), nn.Unflatten(1, (n_points, dim)),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct (B, N, D)."""
        out: Tensor = self.decoder(self.encoder(x))
        return out


def train_autoencoder(
    clouds: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int = 300,
    batch: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    latent: int = 24,
) -> PointAutoencoder:
    """Train an auto-encoder on clouds (K, N, D); the same seed gives the same start and batches.

    Args:
        clouds: the training set.
        loss: ``loss(reconstruction, cloud)``, a scalar.
        steps, batch, lr: Adam, with the rate falling linearly to zero.
        seed: of the weights and batches.
        latent: size of the code.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PointAutoencoder(clouds.shape[2], clouds.shape[1], latent)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        x = clouds[torch.randint(len(clouds), (batch,), generator=generator)]
        optimizer.zero_grad()
        loss(model(x), x).backward()
        optimizer.step()
    return model.eval()


def reconstruction_emd(model: nn.Module, clouds: Tensor) -> Tensor:
    """Return the exact EMD (K,) of each cloud to its reconstruction."""
    with torch.no_grad():
        return emd(model(clouds), clouds, method="exact")
