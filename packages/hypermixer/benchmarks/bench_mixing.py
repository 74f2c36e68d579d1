"""HyperMixing side by side with its direct form, attention and an MLPMixer block, in one process.

    python benchmarks/bench_mixing.py --json benchmarks/results.json

The direct form is the published equations as they stand, in the way a plain implementation has them:
one einsum for each layer of each hypernetwork, then three batched products. It shares its parameters
with our layer. Repeats are interleaved, in both orders; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypermixer import HyperMixing, convert
from hypermixer.analysis import measure_memory
from hypermixer.experiments.common import environment, write_json
from hypermixer.positions import sinusoidal_table

Cells = dict[str, float]


class DirectForm(nn.Module):
    """W = MLP(x + p) for both sides, Y = W2 gelu(W1ᵀ V), LayerNorm; positions from a table."""

    def __init__(self, layer: HyperMixing, max_length: int) -> None:
        super().__init__()
        self.w1, self.w2, self.norm = layer.w1, layer.w2, layer.norm
        self.heads = layer.num_heads
        self.register_buffer("table", sinusoidal_table(max_length, layer.embed_dim))

    def generate(self, x: Tensor, net: nn.Module) -> Tensor:
        x = x.unflatten(-1, (self.heads, -1))
        hidden = F.gelu(torch.einsum("bnhf,hgf->bhng", x, net.fc1_weight))
        return torch.einsum("bhng,hkg->bhnk", hidden, net.fc2_weight)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        informed = x + self.table[:length]
        w1 = self.generate(informed, self.w1).flatten(0, 1)
        w2 = self.generate(informed, self.w2).flatten(0, 1)
        values = x.transpose(1, 2).reshape(batch * self.heads, width // self.heads, length)
        mixed = torch.bmm(F.gelu(torch.bmm(values, w1)), w2.transpose(1, 2))
        return self.norm(mixed.reshape(batch, width, length).transpose(1, 2))


class Attention(nn.Module):
    """nn.MultiheadAttention at its best: batch first, no weights asked for."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class FusedAttention(nn.Module):
    """The same parameters' count with F.scaled_dot_product_attention called directly."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def forward(model: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def backward(model: nn.Module, x: Tensor) -> Callable[[], object]:
    x = x.clone().requires_grad_()

    def run() -> None:
        model(x).sum().backward()

    return run


def interleaved(functions: dict[str, Callable[[], object]], repeats: int) -> Cells:
    """Return median milliseconds; within a repeat the order is turned round every time."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats):
        order = list(functions.items())
        for name, function in order if repeat % 2 == 0 else reversed(order):
            inner = 1 if not times[name] or times[name][-1] > 2e-2 else 5
            started = time.perf_counter()
            for _ in range(inner):
                function()
            times[name].append((time.perf_counter() - started) / inner)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def against_direct(repeats: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    rows = []
    lengths = (8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16_384, 65_536)
    for width, hidden, heads in ((512, 2048, 8), (256, 512, 1)):
        layer = HyperMixing(width, hidden, heads)
        direct = DirectForm(layer, lengths[-1])
        for length in lengths:
            x = torch.randn(1, length, width)
            with torch.no_grad():
                layer.norm.eval()
                # float32 with another order of summation, LayerNormed
                assert torch.allclose(layer(x), direct(x), atol=5e-3)
            count = max(7, min(repeats, 200_000 // length)) if length < 16_384 else 3
            models = {"ours": layer, "direct": direct}
            fwd = interleaved({n: forward(m, x) for n, m in models.items()}, count)
            both = {}
            if length <= 16_384:
                both = interleaved({n: backward(m, x) for n, m in models.items()}, min(count, 15))
            row = {"d": width, "hidden": hidden, "heads": heads, "N": length}
            row |= {"forward": fwd, "forward_ratio": fwd["direct"] / fwd["ours"]}
            if both:
                row |= {"both": both, "both_ratio": both["direct"] / both["ours"]}
            rows.append(row)
            text = f"forward {row['forward_ratio']:.2f}x"
            text += f", forward+backward {row['both_ratio']:.2f}x" if both else ""
            say(f"direct form d={width} N={length}: {text}")
    return rows


def against_attention(say: Callable[[str], None]) -> list[dict[str, Any]]:
    rows = []
    for width, hidden, heads in ((512, 2048, 8), (256, 512, 8)):
        models = {
            "ours": HyperMixing(width, hidden, heads),
            "nn.MultiheadAttention": Attention(width, heads),
            "SDPA": FusedAttention(width, heads),
        }
        for length in (64, 256, 1024, 4096):
            x = torch.randn(1, length, width)
            count = 7 if length > 1000 else 15
            row: dict[str, Any] = {"d": width, "heads": heads, "N": length}
            row["forward"] = interleaved({n: forward(m, x) for n, m in models.items()}, count)
            row["both"] = interleaved({n: backward(m, x) for n, m in models.items()}, min(count, 7))
            for kind in ("forward", "both"):
                best = min(row[kind]["nn.MultiheadAttention"], row[kind]["SDPA"])
                row[f"{kind}_ratio"] = best / row[kind]["ours"]
            rows.append(row)
            say(
                f"attention d={width} N={length}: forward {row['forward_ratio']:.1f}x the better one"
            )
    return rows


def declare_torchvision() -> torch.library.Library | None:
    """Declare two operators that the public index's torchvision wants at import beside a CPU build of torch."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


_LIB = declare_torchvision()


def against_mixer_block(say: Callable[[str], None]) -> list[dict[str, Any]]:
    from timm.models.mlp_mixer import MixerBlock

    rows = []
    for length in (196, 1024, 4096):
        block = MixerBlock(512, length)
        ours = nn.ModuleList([MixerBlock(512, length)])
        convert(ours, num_heads=8, hidden_dim=256)
        x = torch.randn(1, length, 512)
        models = {"ours": ours[0], "timm MixerBlock": block}
        row: dict[str, Any] = {"d": 512, "N": length}
        row["parameters"] = {n: sum(p.numel() for p in m.parameters()) for n, m in models.items()}
        row["forward"] = interleaved({n: forward(m, x) for n, m in models.items()}, 9)
        row["forward_ratio"] = row["forward"]["timm MixerBlock"] / row["forward"]["ours"]
        rows.append(row)
        say(f"timm MixerBlock N={length}: forward {row['forward_ratio']:.2f}x")
    return rows


def flat_in_hidden_width(repeats: int) -> dict[str, Any]:
    x = torch.randn(1, 4096, 512)
    models = {str(hidden): HyperMixing(512, hidden, 8) for hidden in (2048, 4096)}
    times = interleaved({n: forward(m, x) for n, m in models.items()}, repeats)
    return {"milliseconds": times, "growth": times["4096"] / times["2048"] - 1}


def positions(repeats: int) -> dict[str, float]:
    from hypermixer import HyperMixing as Layer

    return interleaved(
        {
            "table of 3,000 x 512": lambda: sinusoidal_table(3000, 512),
            "construction d=512, d'=2048, H=8": lambda: Layer(512, 2048, 8, max_length=3000),
        },
        repeats,
    )


def memory_of_training() -> dict[str, float]:
    """Bytes that one more token costs in a training step, in units of d·4 bytes."""
    growth = {}
    for name, options in {
        "torch path": {},
        "torch path, no positions": {"token_info": None},
        "chunked": {"chunk_size": 256},
    }.items():
        layer = HyperMixing(256, 512, 8, **options)
        peaks = []
        for length in (2048, 4096):
            x = torch.randn(1, length, 256, requires_grad=True)
            layer(x)
            peaks.append(measure_memory(lambda x=x, m=layer: m(x).sum().backward()).peak_bytes)
        growth[name] = (peaks[1] - peaks[0]) / (2048 * 256 * 4)
    return growth


MILLION = """
import time, torch
from hypermixer import HyperMixing
torch.set_num_threads(1)
layer = HyperMixing(256, 512, 8, chunk_size=1024)
def rss():  # ru_maxrss would be the parent's: it survives exec
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) / 1e9
before = rss()
x = torch.randn(1, 1_000_000, 256)
start = time.perf_counter()
with torch.no_grad():
    y = layer(x)
print(before, rss(), time.perf_counter() - start)
"""


def million_tokens() -> dict[str, float]:
    """Peak resident memory (GB) of a process that mixes a million tokens, input and output included."""
    done = subprocess.run(
        [sys.executable, "-c", MILLION], capture_output=True, text=True, check=True
    )
    before, peak, seconds = map(float, done.stdout.split())
    return {"process_GB": peak, "before_GB": before, "added_GB": peak - before, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--only", nargs="+", help="names of parts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    parts: dict[str, Callable[[], Any]] = {
        "direct": lambda: against_direct(args.repeats, say),
        "attention": lambda: against_attention(say),
        "mixer": lambda: against_mixer_block(say),
        "flat": lambda: flat_in_hidden_width(9),
        "positions": lambda: positions(15),
        "memory": memory_of_training,
        "million": million_tokens,
    }
    result: dict[str, Any] = {name: parts[name]() for name in args.only or parts}
    result["environment"] = {**environment(), "timm": version("timm"), "load": os.getloadavg()}
    if args.json:
        write_json(args.json, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
