"""A LightningModule around a converted network: the loss with its terms logged, and curvature in validation."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lcnn
from lcnn.recipes import data


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 48, 3, stride=2, padding=1),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(48, 10),
    )


class LowCurvature(pl.LightningModule):
    """Any classifier of tensors; ``gradnorm`` is the weight of the gradient-norm term."""

    def __init__(self, model: nn.Module, example: Tensor, gradnorm: float = 6.1e-3) -> None:
        super().__init__()
        self.model = lcnn.convert(model, example)
        self.criterion = lcnn.LCNNLoss(self.model, gradnorm=gradnorm)
        self.curvatures: list[float] = []
        self.accuracies: list[float] = []

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss: Tensor = self.criterion(*batch)
        self.log_dict({f"train/{name}": value for name, value in self.criterion.terms.items()})
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        x, y = batch
        found = lcnn.curvature(
            self.model, x, y, method="lanczos", iters=10
        )  # enables gradients itself
        self.curvatures.append(found.curvature.mean().item())
        self.accuracies.append((self.model(x).argmax(1) == y).double().mean().item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(lcnn.param_groups(self.model), lr=0.1, momentum=0.9)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--samples", type=int, default=1797, help="of the digits, at most")
    parser.add_argument("--gradnorm", type=float, default=6.1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for result.json and the checkpoint")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    pl.seed_everything(args.seed, verbose=False)
    split = data.digits(seed=0)
    x, y = split.x[: args.samples], split.y[: args.samples]
    module = LowCurvature(network(), x[:2], args.gradnorm)
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        inference_mode=False,  # curvature needs second derivatives in validation
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    training = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    probes = DataLoader(TensorDataset(split.test_x[:200], split.test_y[:200]), batch_size=200)
    trainer.fit(module, training, probes)
    result = {"accuracy": module.accuracies, "curvature": module.curvatures}
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(args.out / "last.ckpt")
        (args.out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    if args.json:
        print(json.dumps(result))
    else:
        for epoch, (accuracy, curve) in enumerate(zip(*result.values(), strict=True), start=1):
            print(f"epoch {epoch}: accuracy {accuracy:.3f}, curvature {curve:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
