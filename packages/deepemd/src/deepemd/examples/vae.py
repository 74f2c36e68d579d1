"""A small point-cloud VAE whose reconstruction term is any loss, the EMD among them (3.5, in small)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deepemd.examples.autoencoder import PointAutoencoder


class PointVAE(nn.Module):
    """A Gaussian code between a PointNet encoder and an MLP decoder.

    Args:
        dim, n_points: shape of the clouds.
        latent: size of the code.

    >>> vae = PointVAE(3, 32)
    >>> vae.sample(4, torch.Generator().manual_seed(0)).shape
    torch.Size([4, 32, 3])
    """

    def __init__(self, dim: int, n_points: int, latent: int = 16) -> None:
        super().__init__()
        body = PointAutoencoder(dim, n_points, latent)
        self.encoder, self.decoder = body.encoder, body.decoder
        self.encoder.out = nn.Linear(self.encoder.out.in_features, 2 * latent)
        self.latent = latent

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return a reconstruction (B, N, D) from a drawn code, and the KL divergence (B,)."""
        mean, log_var = self.encoder(x).chunk(2, -1)
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(-1)
        return self.decoder(z), kl

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw clouds (count, N, D) from the prior."""
        with torch.no_grad():
            out: Tensor = self.decoder(torch.randn(count, self.latent, generator=generator))
        return out


def train_vae(
    clouds: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int = 500,
    batch: int = 32,
    lr: float = 1e-3,
    beta: float = 1e-3,
    warmup: int = 100,
    seed: int = 0,
    latent: int = 16,
) -> PointVAE:
    """Train on clouds (K, N, D) with ``loss(reconstruction, cloud) + beta KL``, KL warmed up linearly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PointVAE(clouds.shape[2], clouds.shape[1], latent)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            x = clouds[torch.randint(len(clouds), (batch,))]
            reconstruction, kl = model(x)
            total = loss(reconstruction, x) + beta * min(1.0, (step + 1) / warmup) * kl.mean()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
    return model.eval()
