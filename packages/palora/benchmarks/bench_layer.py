"""One preference: forward and backward of a layer or network against the loop, PEFT and plain."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from common import finish, naive, options, peft_model, set_naive, timed
from torch import Tensor, nn

import palora
from palora.examples.models import LeNet


def step(model: nn.Module, x: Tensor, lam: Any = None) -> None:
    for parameter in model.parameters():
        parameter.grad = None

    def total(out: Any) -> Tensor:
        outs = out if isinstance(out, list) else [out]
        return sum((F.mse_loss(o, torch.zeros_like(o)) for o in outs), torch.zeros(()))

    if lam is None:
        total(model(x)).backward()
        return
    with palora.preference(model, lam):
        total(model(x)).backward()


def linear_case(
    n: int, inputs: int, outputs: int, tasks: int, rank: int, args: Any
) -> dict[str, Any]:
    plain = nn.Sequential(nn.Linear(inputs, outputs))
    model = palora.inject(copy.deepcopy(plain), tasks, rank=rank)
    with torch.no_grad():
        model[0].palora_B.normal_()
    loop = naive(model)
    lam = torch.full((tasks,), 1 / tasks)
    set_naive(loop, lam)
    lora = peft_model(copy.deepcopy(plain), tasks, rank, lam.tolist())
    merged = palora.merge(model, lam)
    x = torch.randn(n, inputs, requires_grad=True)
    rows = torch.distributions.Dirichlet(torch.ones(tasks)).sample((n,))
    distinct = rows[:64]
    part = x.detach()[:64]

    def one_pass_each() -> None:
        with torch.no_grad():
            for i in range(64):
                with palora.preference(model, distinct[i]):
                    model(part[i : i + 1])

    def one_batch() -> None:
        with torch.no_grad(), palora.preference(model, distinct):
            model(part)

    found = timed(
        {
            "plain": lambda: step(plain, x),
            "merged": lambda: step(merged, x),
            "palora": lambda: step(model, x, lam),
            "per_sample": lambda: step(model, x, rows),
            "loop": lambda: step(loop, x),
            "peft": lambda: step(lora, x),
        },
        args.repeats,
        inner=max(1, int(4e8 / (n * inputs * outputs))),
    )
    distinct_times = timed({"each": one_pass_each, "batch": one_batch}, args.repeats, inner=5)
    return {
        "case": f"Linear {inputs}->{outputs}",
        "n": n,
        "T": tasks,
        "r": rank,
        **{f"{k}_ms": v for k, v in found.items()},
        "palora/plain": found["palora"] / found["plain"],
        "loop/palora": found["loop"] / found["palora"],
        "peft/palora": found["peft"] / found["palora"],
        "per_sample/palora": found["per_sample"] / found["palora"],
        "merged/plain": found["merged"] / found["plain"],
        "64 passes/per-sample batch": distinct_times["each"] / distinct_times["batch"],
    }


def lenet_case(args: Any) -> dict[str, Any]:
    plain = LeNet()
    model = palora.inject(copy.deepcopy(plain), 2, rank=4)
    merged = palora.merge(model, [0.5, 0.5])
    x = torch.randn(256, 1, 28, 28)
    lam = torch.tensor([0.3, 0.7])
    found = timed(
        {
            "plain": lambda: step(plain, x),
            "merged": lambda: step(merged, x),
            "palora": lambda: step(model, x, lam),
        },
        args.repeats,
        inner=3,
    )
    return {
        "case": "LeNet",
        "n": 256,
        "T": 2,
        "r": 4,
        **{f"{k}_ms": v for k, v in found.items()},
        "palora/plain": found["palora"] / found["plain"],
        "merged/plain": found["merged"] / found["plain"],
    }


def celeba_case(args: Any) -> dict[str, Any]:
    plain = nn.Sequential(nn.Linear(768, 768))
    model = palora.inject(copy.deepcopy(plain), 40, rank=1)
    x = torch.randn(512, 768, requires_grad=True)
    lam = torch.full((40,), 1 / 40)
    found = timed(
        {"plain": lambda: step(plain, x), "palora": lambda: step(model, x, lam)},
        args.repeats,
        inner=2,
    )
    row = {f"{k}_ms": v for k, v in found.items()}
    ratio = found["palora"] / found["plain"]
    return {"case": "Linear 768->768", "n": 512, "T": 40, "r": 1, **row, "palora/plain": ratio}


def main() -> None:
    args = options(__doc__ or "")
    rows = [
        linear_case(512, 768, 768, 2, 4, args),
        linear_case(512, 768, 768, 3, 4, args),
        linear_case(2048, 768, 768, 4, 4, args),
        linear_case(512, 256, 1024, 3, 4, args),
        linear_case(256, 320, 50, 2, 1, args),
        lenet_case(args),
        celeba_case(args),
    ]
    finish(args, rows)


if __name__ == "__main__":
    main()
