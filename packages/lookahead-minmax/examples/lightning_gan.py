"""A GAN in PyTorch Lightning: manual optimisation, and lookahead as one callback.

`training_step` plays one round of the game; the callback ends it, puts the slow weights in place during validation
and saves its state in Lightning's checkpoints. Learns scikit-learn's digits in seconds, or MNIST with `--data-dir`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lookahead_minmax.gan import data
from lookahead_minmax.gan.models import mlp
from lookahead_minmax.gan.train import feature_extractor
from lookahead_minmax.integrations.lightning import LookaheadMinmaxCallback
from lookahead_minmax.metrics import feature_distance

LATENT = 32


class GAN(pl.LightningModule):
    """Two perceptrons; validation measures the Fréchet distance to the real images."""

    def __init__(self, pixels: int, features: nn.Module) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = mlp(LATENT, 128, 128, pixels, output=nn.Tanh())
        self.discriminator = mlp(pixels, 128, 128, 1)
        self.features = features
        self.distances: list[float] = []

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(player.parameters(), lr=1e-3, betas=(0.0, 0.9))
            for player in (self.generator, self.discriminator)
        ]

    def training_step(self, batch: list[Tensor]) -> None:
        (real,) = batch
        opt_g, opt_d = self.optimizers()
        fake = self.generator(torch.randn(len(real), LATENT, device=self.device))
        opt_d.zero_grad()
        scores = F.softplus(-self.discriminator(real)) + F.softplus(
            self.discriminator(fake.detach())
        )
        self.manual_backward(scores.mean())
        opt_d.step()
        opt_g.zero_grad()
        self.manual_backward(F.softplus(-self.discriminator(fake)).mean())
        opt_g.step()

    def validation_step(self, batch: list[Tensor]) -> None:
        (real,) = batch
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(len(real), LATENT, generator=generator).to(self.device)
        fake = self.generator(noise)  # of the slow weights: the callback has put them in place
        self.distances.append(feature_distance(self.features(real), self.features(fake)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST's .gz files")
    parser.add_argument("--epochs", type=int, default=60, help="of 36 rounds, batch 50, on digits")
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for result.json and the checkpoint")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if args.data_dir is None:
        images, labels = data.digits()
    else:
        images, labels = data.mnist(args.data_dir, train=True)
        images = images.flatten(1)
    features = feature_extractor(images, labels)
    pl.seed_everything(args.seed, verbose=False)
    dataset = TensorDataset(images)
    model = GAN(images.shape[1], features)
    callback = LookaheadMinmaxCallback(["G", "D"], k=args.k, evaluate_slow=True)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=max(1, args.epochs // 6),
        **options,
    )
    batches = DataLoader(dataset, batch_size=50, sampler=RandomSampler(dataset))
    trainer.fit(model, batches, DataLoader(dataset, batch_size=len(dataset)))
    assert callback.lookahead is not None
    result = {"rounds": callback.lookahead.rounds, "slow": model.distances}
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(args.out / "last.ckpt")  # has the lookahead's slow weights too
        (args.out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    if args.json:
        print(json.dumps(result))
    else:
        shown = ", ".join(f"{distance:.2f}" for distance in model.distances)
        print(f"Fréchet distances of the slow weights over {result['rounds']} rounds: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
