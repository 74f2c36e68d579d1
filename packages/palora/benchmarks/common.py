"""Shared by the benchmarks: interleaved timing, peers, and the record of the environment."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

warnings.filterwarnings("ignore", message="rank exceeds")


def options(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return args


def timed(cases: dict[str, Callable[[], Any]], repeats: int, inner: int = 1) -> dict[str, float]:
    """Milliseconds a call: the minimum over interleaved repeats, after a warm-up of each."""
    for run in cases.values():
        run()
        run()
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, run in cases.items():
            start = time.perf_counter()
            for _ in range(inner):
                run()
            found[name].append((time.perf_counter() - start) / inner * 1e3)
    return {name: min(values) for name, values in found.items()}


class NaiveLinear(nn.Module):
    """The formulation as it is written: a loop over the tasks, fresh products for each."""

    def __init__(self, layer: nn.Linear, A: Tensor, B: Tensor, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale
        self.A = nn.ParameterList(nn.Parameter(a.clone()) for a in A)
        self.B = nn.ParameterList(nn.Parameter(b.clone()) for b in B)
        self.lam: Any = None

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        for lam, a, b in zip(self.lam, self.A, self.B, strict=True):
            out = out + self.scale * lam * (x @ a.t() @ b.t())
        return out


def naive(model: nn.Module) -> nn.Module:
    """Replace each adapted Linear of a copy of ``model`` by the naive loop."""
    import copy

    import palora

    plain = palora.unload(copy.deepcopy(model))
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            parent = plain.get_submodule(name.rpartition(".")[0])
            old = plain.get_submodule(name)
            made = NaiveLinear(
                old, layer.palora_A.detach(), layer.palora_B.detach(), layer._palora_spec.scale
            )
            setattr(parent, name.rpartition(".")[2], made)
    return plain


def set_naive(model: nn.Module, lam: Tensor) -> None:
    for module in model.modules():
        if isinstance(module, NaiveLinear):
            module.lam = lam


def peft_model(model: nn.Module, tasks: int, rank: int, lam: list[float]) -> nn.Module:
    """PEFT with T active adapters, ``scaling[t] = s·λ_t``; base trained, as in palora."""
    _mend_torchvision()
    import peft

    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    config = peft.LoraConfig(r=rank, lora_alpha=1, target_modules=names)
    wrapped = peft.get_peft_model(model, config, adapter_name="t0")
    for t in range(1, tasks):
        wrapped.add_adapter(f"t{t}", config)
    wrapped.base_model.set_adapter([f"t{t}" for t in range(tasks)])
    wrapped.requires_grad_(True)
    for module in wrapped.modules():
        if hasattr(module, "scaling") and hasattr(module, "lora_A"):
            for t in range(tasks):
                module.scaling[f"t{t}"] = lam[t] / rank
    return wrapped


_KEEP: list[Any] = []


def _mend_torchvision() -> None:
    """The registry's torchvision beside a CPU torch lacks two operators that it wants at import."""
    try:
        lib = torch.library.Library("torchvision", "DEF")
        lib.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        lib.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEEP.append(lib)
    except RuntimeError:
        pass


def versions() -> dict[str, Any]:
    from importlib import metadata

    names = ("palora", "torch", "numpy", "peft")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def finish(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Print a table and write the JSON."""
    keys = list(dict.fromkeys(k for row in rows for k in row))
    print(" | ".join(keys))
    for row in rows:
        cells = (row.get(k, "") for k in keys)
        print(" | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in cells))
    if args.json:
        data = {
            "rows": rows,
            "environment": {
                "python": platform.python_version(),
                **versions(),
                "platform": platform.platform(),
                "processor": processor(),
                "threads": args.threads,
                "command": " ".join(sys.argv),
                "numpy": np.__version__,
            },
        }
        Path(args.json).write_text(json.dumps(data, indent=1) + "\n")
