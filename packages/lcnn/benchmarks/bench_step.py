"""One training step of the paper's ResNet-18 on 32x32 images: standard, parts of the method, baselines."""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import options, report, save, timed
from torch import nn

import lcnn
from lcnn.recipes.models import resnet18


def step(
    model: nn.Module, criterion: nn.Module, x: torch.Tensor, y: torch.Tensor
) -> Callable[[], None]:
    optimizer = torch.optim.SGD(lcnn.param_groups(model), 0.01, 0.9)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        criterion(x, y).backward()
        optimizer.step()

    return run


def main() -> None:
    args = options(__doc__ or "")
    batch = args.batch
    x, y = torch.rand(batch, 3, 32, 32), torch.arange(batch) % 10
    off = {"beta": 0.0, "lipschitz": 0.0}
    plain = resnet18(10, lcnn=False)
    ours = resnet18(10)
    relu = lcnn.convert(plain, x[:1], activation="keep", norm="keep", conv="none", linear="none")
    for module in list(relu.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Softplus):
                setattr(module, name, nn.ReLU())
    normed = lcnn.convert(relu, x[:1], activation="keep", norm="keep", linear="none")
    cases = {
        "ReLU": step(relu, lcnn.LCNNLoss(relu, **off), x, y),
        "ReLU + operator norms": step(normed, lcnn.LCNNLoss(normed, **off), x, y),
        "standard (softplus 1000)": step(plain, lcnn.LCNNLoss(plain, **off), x, y),
        "LCNN": step(ours, lcnn.LCNNLoss(ours), x, y),
        "LCNN+GradReg": step(ours, lcnn.LCNNLoss(ours, gradnorm=6.1e-3), x, y),
    }
    adversarial = step(plain, lcnn.LCNNLoss(plain, **off), x, y)

    def attacked() -> None:
        plain.eval()
        lcnn.pgd_l2(plain, x, y, radius=0.1, steps=3)
        plain.train()
        adversarial()

    cases["adversarial training, 3 steps"] = attacked
    times = timed(cases, args.repeats, warm=1)
    report(f"ResNet-18, batch {batch}, 3x32x32", times, "ReLU", args)
    save(args, {"times_ms": times})


if __name__ == "__main__":
    main()
