"""The paper's first table in kind: paired runs of plain, 1 × 1, 4 × 5 and Skips With Gains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from denseformer import analysis
from denseformer.core.dwa import DWA
from denseformer.models.stack import DenseStack
from denseformer.recipes.corpora import tokens as ids
from denseformer.recipes.data import Corpus
from denseformer.recipes.train import TrainConfig, TrainResult, evaluate, train, variants


def paired(ours: Sequence[float], plain: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference and its standard error (NaN for a single pair)."""
    gaps = [a - b for a, b in zip(ours, plain, strict=True)]
    return mean(gaps), stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan


def pearson(a: Tensor, b: Tensor) -> float:
    """Return the correlation of two vectors."""
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def blocks_of(result: TrainResult) -> list[nn.Module] | None:
    """Return the residual blocks of a trained decoder; ``None`` for Skips With Gains, which has branches."""
    stack = result.model.stack
    if isinstance(stack, DenseStack):
        return list(stack.blocks)
    return None if result.config.model.baseline == "gains" else list(stack.children())


def dwa_of(result: TrainResult) -> DWA | None:
    """Return the averages of a trained decoder, if it has any."""
    return result.model.stack.dwa if isinstance(result.model.stack, DenseStack) else None


def study(result: TrainResult, corpus: Corpus) -> dict[str, Any]:
    """Return a run's numbers, weights, pruning curve and cosine curve."""
    made = result.summary()
    size = result.config.model.context
    blocks, dwa = blocks_of(result), dwa_of(result)
    if blocks is not None:
        count = min(64, len(corpus.validation) // size)
        windows = ids(corpus.validation[: count * size].view(count, size))
        windows = windows.to(result.model.embedding.weight.device)
        curve = analysis.cosine_to_embedding(result.model, windows, blocks=blocks)
        made["cosine"] = curve.tolist()
    if dwa is not None:
        made["weights"] = dwa.weight.detach().tolist()
        made["off_diagonal"] = analysis.off_diagonal(dwa).tolist()
        made["first_column"] = dwa.matrix()[
            [i - 1 for i in dwa.rows if 0 in dwa.sources(i)], 0
        ].tolist()
        made["pruning"] = analysis.pruning_curve(
            dwa, lambda: evaluate(result.model, corpus.validation)
        )
    return made


def compare(
    base: TrainConfig,
    corpus: Corpus,
    seeds: Sequence[int],
    names: Sequence[str] = ("plain", "1x1", "4x5", "gains"),
    progress: Callable[[str], None] = lambda text: None,
    on_run: Callable[[str, TrainResult, dict[str, Any]], None] = lambda name, result, numbers: None,
) -> dict[str, Any]:
    """Train every variant on every seed; return runs and paired differences to ``"plain"``."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in seeds:
        for name in names:
            config = variants(replace(base, seed=seed))[name]
            progress(f"seed {seed}, {name}")
            result = train(config, corpus.tokens, progress)
            numbers = study(result, corpus)
            runs[name].append(numbers)
            on_run(name, result, numbers)
    return {"corpus": {"name": corpus.name, "bytes": corpus.size, "sha256": corpus.sha256},
            "seeds": list(seeds), "runs": runs, "summary": summarise(runs)}  # fmt: skip


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the mean last loss of each variant, its paired difference, and the weights' correlation."""
    last = {
        name: [list(r["validation"].values())[-1] for r in several]
        for name, several in runs.items()
    }
    found: dict[str, Any] = {}
    for name, values in last.items():
        entry: dict[str, Any] = {"validation": mean(values)}
        if "plain" in last and name != "plain":
            entry["difference"], entry["standard_error"] = paired(values, last["plain"])
            firsts = zip(runs[name], runs["plain"], strict=True)
            entry["equal_first_loss"] = all(a["first_loss"] == b["first_loss"] for a, b in firsts)
        off = [torch.tensor(r["off_diagonal"]) for r in runs[name] if r.get("off_diagonal")]
        if len(off) > 1 and len(off[0]) > 1:
            pairs = [(a, b) for n, a in enumerate(off) for b in off[n + 1 :]]
            entry["correlation"] = min(pearson(a, b) for a, b in pairs)
        found[name] = entry
    return found
