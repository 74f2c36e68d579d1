"""A Hugging Face ResNet, converted inside a wrapper that takes and gives tensors, and saved by its own library."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

import lcnn
from lcnn.recipes import data


class Logits(nn.Module):
    """Give a Hugging Face classifier the interface of an ordinary network."""

    def __init__(self, model: ResNetForImageClassification) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=x).logits
        return logits


def build() -> Logits:
    """Return a small untrained ResNet for one channel; ``from_pretrained`` serves as well."""
    config = ResNetConfig(
        num_channels=1,
        embedding_size=24,
        hidden_sizes=[24, 48],
        depths=[1, 1],
        layer_type="basic",
        num_labels=10,
    )
    model: Any = ResNetForImageClassification(config)
    model.resnet.embedder.pooler = nn.AvgPool2d(2)  # max-pooling has no Hessian
    return Logits(model)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--samples", type=int, default=1797, help="of the digits, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for result.json and the restored network")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    split = data.digits(seed=0)
    x, test_x = (nn.functional.interpolate(part, size=16) for part in (split.x, split.test_x))
    x, y, test_x, test_y = (
        x[: args.samples],
        split.y[: args.samples],
        test_x[:200],
        split.test_y[:200],
    )
    model = lcnn.convert(build(), x[:2])
    if not args.quiet:
        print(model.lcnn_report, file=sys.stderr)
    optimizer = torch.optim.SGD(lcnn.param_groups(model), lr=0.1, momentum=0.9)
    criterion = lcnn.LCNNLoss(model)
    for epoch in range(args.epochs):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad(set_to_none=True)
            criterion(x[index], y[index]).backward()
            optimizer.step()
        if not args.quiet:
            print(f"epoch {epoch + 1}/{args.epochs}", file=sys.stderr, flush=True)
    model.eval()
    found = lcnn.curvature(model, test_x, test_y, method="lanczos", iters=10)
    plain: Any = lcnn.restore(model)  # the wrapped ResNet with ordinary layers
    with torch.no_grad():
        result = {
            "accuracy": (model(test_x).argmax(1) == test_y).double().mean().item(),
            "curvature": found.curvature.mean().item(),
            "restored": (plain(test_x) - model(test_x)).abs().max().item(),
        }
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        torch.save(plain.model.state_dict(), args.out / "resnet.pt")
        (args.out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"accuracy {result['accuracy']:.3f}, curvature {result['curvature']:.1f}, the restored network's "
            f"outputs differ by {result['restored']:.1e}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
