"""What a merge of files did, and the recipe that does it again."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..depth import DepthMap
from ..sources import Source, label_models

RECIPE = "lines_merge.json"
"""File beside a result that holds its recipe."""


@dataclass
class MergeReport:
    """What a merge of files did.

    Attributes:
        out_dir: where the result is.
        method: merge function.
        alpha: factor of the first block, as used.
        beta: increase to the last block.
        passes: data passes, the writing one included.
        bytes_read: bytes of tensors that were read, all passes together.
        bytes_written: bytes of the result.
        seconds: wall-clock time.
        peak_rss: largest resident size of this process so far in bytes, None where it cannot be asked.
        files: names of the files written.
        copied: tensors without arithmetic, copied from the base.
        skipped: with strict=False, tensors that a model lacks, by model.
        dropped: with strict=False, tensors that only a model has, by model.
        recipe: JSON-serialisable arguments for `run_recipe`, None if an argument is not serialisable.
    """

    out_dir: str
    method: str
    alpha: float
    beta: float
    passes: int
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_rss: int | None
    files: list[str]
    copied: list[str]
    skipped: dict[str, list[str]] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None

    @property
    def gb_per_s(self) -> float:
        """Bytes read and written per second, in 1e9."""
        return (self.bytes_read + self.bytes_written) / max(self.seconds, 1e-9) / 1e9

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable values."""
        return {**vars(self), "gb_per_s": self.gb_per_s}

    def __str__(self) -> str:
        """Return the report as a table."""
        rows = {
            "result": f"{self.out_dir} ({len(self.files)} files)",
            "method": self.method,
            "alpha, beta": f"{self.alpha:.6g}, {self.beta:.6g}",
            "passes": self.passes,
            "read": f"{self.bytes_read / 1e9:.3f} GB",
            "written": f"{self.bytes_written / 1e9:.3f} GB",
            "time": f"{self.seconds:.2f} s ({self.gb_per_s:.2f} GB/s)",
        }
        if self.peak_rss is not None:
            rows["peak memory"] = f"{self.peak_rss / 2**20:.0f} MiB"
        for title, table in (("kept from base", self.skipped), ("dropped", self.dropped)):
            for label, names in table.items():
                rows[f"{title}, {label}"] = f"{len(names)} tensors"
        return "\n".join(f"{title:14} {value}" for title, value in rows.items())


def make_recipe(
    base: Source,
    models: Sequence[Source] | Mapping[str, Source],
    beta: float,
    arguments: Mapping[str, Any],
    method_arguments: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Return the arguments that make the same bytes again, None if they cannot be written down."""
    keys, sources = label_models(models)
    if not all(isinstance(source, (str, os.PathLike)) for source in [base, *sources]):
        return None
    table = {key: str(Path(source).resolve()) for key, source in zip(keys, sources, strict=True)}  # type: ignore[arg-type]
    recipe: dict[str, Any] = {
        "base": str(Path(base).resolve()),  # type: ignore[arg-type]
        "models": table if isinstance(models, Mapping) else list(table.values()),
        "beta": beta,
        **{k: v for k, v in arguments.items() if k not in {"overwrite", "progress", "verify"}},
        **method_arguments,
    }
    if isinstance(recipe.get("depth"), DepthMap):
        recipe["depth"] = {"map": recipe["depth"].to_json()}
    if isinstance(recipe.get("dtype"), torch.dtype):
        recipe["dtype"] = str(recipe["dtype"]).removeprefix("torch.")
    try:
        copied: dict[str, Any] = json.loads(json.dumps(recipe))
    except TypeError:
        return None
    return copied


def peak_rss() -> int | None:
    """Return the largest resident size of this process so far, None where it cannot be asked."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
