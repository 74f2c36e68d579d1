"""One synchronisation, and its share of a training round, against the peers' ways, in one process.

Measured on the paper's 32x32 ResNet pair (5.1 M parameters) and on 100 M parameters in 100 tensors:
our step back, the authors' expression (written from its description: three operations and a temporary per
tensor), timm's and pytorch_optimizer's Lookahead at their synchronisation, and torch's AveragedModel update.
Interleaved repeats, one thread, medians. The floor is reading and writing both copies: 16 bytes a parameter.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lookahead_minmax import LookaheadMinmax
from lookahead_minmax.gan.models import resnet32

if "+cpu" in torch.__version__:
    # torchvision's public wheel has no operators for a CPU-only torch, and timm imports it.
    missing = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        missing.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm.optim
from pytorch_optimizer import Lookahead as KozistrLookahead


def gan() -> list[nn.Parameter]:
    """Return the parameters of the paper's ResNet pair."""
    return [p for net in resnet32() for p in net.parameters()]


def large() -> list[nn.Parameter]:
    """Return 100 tensors of a million numbers."""
    return [nn.Parameter(torch.randn(1000, 1000)) for _ in range(100)]


def authors(fast: list[Tensor], slow: list[Tensor]) -> None:
    """Step back one tensor at a time with temporaries, the published way."""
    with torch.no_grad():
        for p, q in zip(fast, slow, strict=True):
            q.data = q.data + 0.5 * (p.data - q.data)
            p.data.copy_(q.data)


def interleaved(jobs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each job, run in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(repeats + 2):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if repeat >= 2:  # the first rounds warm up
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def copies(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def synchronisations(parameters: list[nn.Parameter], repeats: int) -> dict[str, float]:
    """Time one synchronisation of each way over the same parameters."""
    sgd = torch.optim.SGD(parameters, lr=0.0)
    ours = {flag: LookaheadMinmax(sgd, k=1, foreach=flag) for flag in (None, True)}
    timm_way = timm.optim.Lookahead(torch.optim.SGD(parameters, lr=0.0), alpha=0.5, k=5)
    kozistr = KozistrLookahead(torch.optim.SGD(parameters, lr=0.0), k=5, alpha=0.5)
    slow = copies(parameters)
    holder = nn.ParameterList(parameters)
    averaged = torch.optim.swa_utils.AveragedModel(
        holder, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    averaged.update_parameters(holder)
    for p in parameters:
        p.grad = torch.zeros_like(p)  # timm and pytorch_optimizer skip parameters without one
    for group in timm_way.param_groups:
        timm_way.update_slow(group)
    jobs = {
        "ours": ours[None].sync,
        "ours, foreach": ours[True].sync,
        "authors' expression": lambda: authors(list(parameters), slow),
        "timm": lambda: [timm_way.update_slow(group) for group in timm_way.param_groups],
        "pytorch_optimizer": lambda: [kozistr.update(group) for group in kozistr.param_groups],
        "torch AveragedModel": lambda: averaged.update_parameters(holder),
        "copy both ways (floor)": lambda: [
            p.data.copy_(q) for p, q in zip(parameters, slow, strict=True)
        ],
    }
    with torch.no_grad():
        result = interleaved(jobs, repeats)
    for p in parameters:
        p.grad = None
    return result


def share_of_a_round(repeats: int) -> dict[str, float]:
    """Time Adam's two steps of a round (r = 1) of the ResNet pair, with k = 5 and without lookahead."""
    nets = resnet32()
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-4) for net in nets]
    for net in nets:
        for p in net.parameters():
            p.grad = torch.randn_like(p) * 1e-3
    la = LookaheadMinmax(optimizers, k=5)

    def rounds(lookahead: bool) -> None:
        for _ in range(5):
            for optimizer in optimizers:
                optimizer.step()
            if lookahead:
                la.step()

    return interleaved(
        {"5 Adam rounds": lambda: rounds(False), "5 Adam rounds, LA k=5": lambda: rounds(True)},
        repeats,
    )


def share_of_a_gan_round(repeats: int, batch: int = 16) -> dict[str, float]:
    """Time a whole round of the ResNet GAN (hinge losses, r = 1, both Adam steps) and one synchronisation."""
    generator, discriminator = resnet32()
    opt_g = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.0, 0.9))
    opt_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.0, 0.9))
    la = LookaheadMinmax({"G": opt_g, "D": opt_d}, k=5)
    real = torch.rand(batch, 3, 32, 32) * 2 - 1

    def play() -> None:
        fake = generator(torch.randn(batch, 128))
        opt_d.zero_grad()
        loss = (1 - discriminator(real)).relu().mean()
        (loss + (1 + discriminator(fake.detach())).relu().mean()).backward()
        opt_d.step()
        opt_g.zero_grad()
        (-discriminator(fake).mean()).backward()
        opt_g.step()

    return interleaved({"GAN round, batch 16": play, "one synchronisation": la.sync}, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    for label, make in (("5.1 M", gan), ("100 M", large)):
        parameters = make()
        count = sum(p.numel() for p in parameters)
        rows = synchronisations(parameters, arguments.repeats)
        result[label] = rows
        print(f"{label} parameters, {len(parameters)} tensors: one synchronisation")
        for name, value in rows.items():
            ratio, rate = value / rows["ours"], 16 * count / value / 1e9
            print(
                f"  {name:24} {1000 * value:8.2f} ms   {ratio:5.2f} x ours   {rate:6.1f} GB/s of 16 B"
            )
    rows = share_of_a_round(arguments.repeats)
    result["round"] = rows
    extra = rows["5 Adam rounds, LA k=5"] / rows["5 Adam rounds"] - 1
    for name, value in rows.items():
        print(f"{name:26} {1000 * value:8.1f} ms")
    print(f"lookahead adds {100 * extra:.1f} % to the optimizers' time alone")
    rows = share_of_a_gan_round(max(3, arguments.repeats // 3))
    result["gan round"] = rows
    for name, value in rows.items():
        print(f"{name:26} {1000 * value:8.1f} ms")
    share = rows["one synchronisation"] / 5 / rows["GAN round, batch 16"]
    print(f"at k = 5 lookahead adds {100 * share:.2f} % to a round (target 3 %)")
    if arguments.json:
        versions = {n: metadata.version(n) for n in ("torch", "timm", "pytorch-optimizer")}
        result["environment"] = {
            "python": platform.python_version(),
            **versions,
            "cores": str(os.cpu_count()),
            "command": " ".join(sys.argv),
        }
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
