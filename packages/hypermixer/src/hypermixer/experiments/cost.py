"""Cost: time and peak memory against the number of tokens, for HyperMixing and attention."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hypermixer.analysis import measure_memory
from hypermixer.experiments.common import Progress, claim, environment, result, silent
from hypermixer.mixing import HyperMixing

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
_ATTENTION_LIMIT = 8192


class SelfAttention(nn.Module):
    """nn.MultiheadAttention as self-attention, on its fused path."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N, d)."""
        return self.attention(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Return the median time of a call, after a warm-up."""
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def slope(lengths: Sequence[float], values: Sequence[float]) -> float:
    """Return the exponent b of value ≈ a·length^b, by least squares in logarithms.

    Example:
        >>> slope([1, 2, 4], [3, 12, 48])
        2.0
    """
    x, y = [math.log(v) for v in lengths], [math.log(v) for v in values]
    return round(statistics.linear_regression(x, y).slope, 6)


def models(embed_dim: int, hidden_dim: int, num_heads: int) -> dict[str, nn.Module]:
    """Return the compared modules; "direct" has the parameters of "hypermixer"."""
    mixing = HyperMixing(embed_dim, hidden_dim, num_heads)
    direct = HyperMixing(embed_dim, hidden_dim, num_heads, algorithm="direct")
    direct.load_state_dict(mixing.state_dict())
    attention = SelfAttention(embed_dim, num_heads)
    return {"hypermixer": mixing, "direct": direct, "attention": attention}


def measure_lengths(
    lengths: Sequence[int] = LENGTHS,
    *,
    embed_dim: int = 256,
    hidden_dim: int = 512,
    num_heads: int = 8,
    repeats: int = 7,
    backward: bool = False,
    memory: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Time every form at every length (milliseconds, median, batch 1).

    Attention is left out beyond 8,192 tokens, where one pass takes longer than all else together.
    """
    torch.manual_seed(0)
    forms = models(embed_dim, hidden_dim, num_heads)
    rows = []
    for length in lengths:
        x = torch.randn(1, length, embed_dim, requires_grad=backward)
        row: dict[str, Any] = {"length": length}
        for name, model in forms.items():
            if name == "attention" and length > _ATTENTION_LIMIT:
                continue

            def once(model: nn.Module = model, x: Tensor = x) -> None:
                if backward:
                    model(x).sum().backward()
                else:
                    with torch.no_grad():
                        model(x)

            row[name] = 1e3 * seconds(once, repeats)
            if memory:
                row[f"{name}_bytes"] = measure_memory(
                    lambda model=model, x=x: model(x).sum().backward()  # type: ignore[misc]
                ).peak_bytes
        rows.append(row)
        progress(f"N = {length}: " + ", ".join(f"{n} {row[n]:.2f} ms" for n in forms if n in row))
    return {"forms": list(forms), "rows": rows, "environment": environment()}


def run(
    name: str = "cost",
    *,
    seeds: int = 1,
    lengths: Sequence[int] = LENGTHS,
    repeats: int = 7,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Fit exponents of the time for N ≥ 512; ``seeds`` is ignored, nothing is trained."""
    started = time.perf_counter()
    measured = measure_lengths(
        lengths, repeats=repeats, backward=True, memory=True, progress=progress
    )
    long = [row for row in measured["rows"] if row["length"] >= 512]
    summary = []
    for form in measured["forms"]:
        own = [row for row in long if form in row]
        n = [row["length"] for row in own]
        summary.append(
            {
                "model": form,
                "time_exponent": slope(n, [row[form] for row in own]),
                "memory_exponent": slope(n, [row[f"{form}_bytes"] for row in own]),
                "milliseconds_at_longest": own[-1][form],
                "longest": n[-1],
            }
        )
    by_form = {row["model"]: row["time_exponent"] for row in summary}
    claims = [
        claim(
            "time grows at most as N^1.1 for N >= 512",
            f"attention N^{by_form['attention']:.2f}",
            f"N^{by_form['hypermixer']:.2f}",
            by_form["hypermixer"] <= 1.1,
        ),
        claim(
            "attention's time grows at least as N^1.7",
            "1.7",
            f"N^{by_form['attention']:.2f}",
            by_form["attention"] >= 1.7,
        ),
    ]
    settings = {"embed_dim": 256, "hidden_dim": 512, "num_heads": 8, "backward": True}
    return result(name, started, settings, measured["rows"], summary, claims)
