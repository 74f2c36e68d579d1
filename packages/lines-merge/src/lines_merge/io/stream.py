"""Merging checkpoints on disk in bounded memory: the engine between readers and a shard writer."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..depth import DepthMap
from ..engine import Engine, one_thread_each
from ..merges import Merge, make_merge
from ..scaling import Scaling, prepare
from ..schedule import Outside, check_finite
from ..sources import Source, TensorSource, label_models, open_source, parse_dtype
from .checkpoint import FileSource
from .files import sync_folder
from .header import Layout
from .output import FileSink, check_space, check_target, copy_companions, publish, temporary
from .plan import (
    MergePlan,
    parse_size,
    passes,
    physical_memory,
    plan_memory,
    shards,
    written,
)
from .progress import progress_bar
from .report import RECIPE, MergeReport, make_recipe, peak_rss


def merge_files(
    base: Source,
    models: Sequence[Source] | Mapping[str, Source],
    out_dir: str | os.PathLike[str],
    method: str | Merge = "task_arithmetic",
    *,
    alpha: float | Literal["auto"] = "auto",
    beta: float = 0.5,
    lines: bool = True,
    norm: int = 1,
    depth: DepthMap | str = "auto",
    schedule: str = "linear",
    outside: Outside = "alpha",
    towers: str = "separate",
    dtype: torch.dtype | str | None = None,
    buffers: str = "scale",
    strict: bool = True,
    vocab: str | None = None,
    allow_nonfinite: bool = False,
    allow_gaps: bool = False,
    max_memory: int | str = "1GiB",
    threads: int | None = None,
    shard_size: int | str = "5GB",
    overwrite: bool = False,
    verify: bool = False,
    progress: bool | Callable[[int, int], None] = True,
    **method_arguments: Any,
) -> MergeReport:
    """Merge checkpoints out of core: `merge`, bit for bit, without ever holding a model.

    The result is written to a temporary folder beside `out_dir` and renamed at the end; an interrupted run
    leaves nothing under the final name. Config, tokenizer and the like are copied from the base.

    Args:
        base: folder, `.safetensors` file, index, or pickled state dict (a state dict works, too).
        models: the same of the fine-tuned models.
        out_dir: folder of the result, new or empty.
        method: see `merge`.
        alpha: see `merge`.
        beta: see `merge`.
        lines: see `merge`.
        norm: see `merge`.
        depth: see `edit`.
        schedule: see `edit`.
        outside: see `edit`.
        towers: see `edit`.
        dtype: see `edit`.
        buffers: see `edit`.
        strict: see `edit`.
        vocab: see `edit`.
        allow_nonfinite: see `edit`.
        allow_gaps: see `edit`.
        max_memory: cap on the memory above the interpreter, for any model size.
        threads: worker threads, each with its own chunk (default: the cores, at most 4).
        shard_size: largest file of the result.
        overwrite: replace a folder that is not empty.
        verify: read the result back and compare checksums.
        progress: whether to draw a bar on stderr, or a function of (bytes read, bytes in all).
        **method_arguments: of the method.

    Returns:
        A report with alpha, passes, bytes, speed and the recipe.

    Raises:
        FileExistsError: `out_dir` is not empty.
        ValueError: `out_dir` is the folder of an input; `max_memory` is too small; what `merge` raises.
        OSError: the disk is too small (`ENOSPC`, before anything is written).
        CheckpointError: a damaged or unsafe input.
    """
    arguments = {key: value for key, value in locals().items() if key in _MERGE_ARGUMENTS}
    models = models if isinstance(models, Mapping) else _listed(models)
    (report,) = _run(base, models, [Path(out_dir)], [beta], arguments, method_arguments)
    return report


_MERGE_ARGUMENTS = [
    "method",
    "alpha",
    "lines",
    "norm",
    "depth",
    "schedule",
    "outside",
    "towers",
    "dtype",
    "buffers",
    "strict",
    "vocab",
    "allow_nonfinite",
    "allow_gaps",
    "max_memory",
    "threads",
    "shard_size",
    "overwrite",
    "verify",
    "progress",
]


def sweep_files(
    base: Source,
    models: Sequence[Source] | Mapping[str, Source],
    out_dir: str | os.PathLike[str],
    betas: Sequence[float],
    method: str | Merge = "task_arithmetic",
    **arguments: Any,
) -> list[MergeReport]:
    """Write one result for each beta from a single reading of the inputs.

    Args:
        base: see `merge_files`.
        models: see `merge_files`.
        out_dir: folder that will hold `beta-0.1`, `beta-0.2`, ...
        betas: the grid.
        method: see `merge_files`.
        **arguments: see `merge_files`.

    Raises:
        ValueError: no beta, or the same one twice.
    """
    for beta in betas:
        check_finite(beta=beta)
    folders = [Path(out_dir) / f"beta-{beta:g}" for beta in betas]
    if not folders or len(set(folders)) != len(folders):
        raise ValueError(f"betas must be different numbers, at least one, got {list(betas)}")
    own = {key: arguments.pop(key) for key in _MERGE_ARGUMENTS if key in arguments}
    return _run(base, models, folders, list(betas), {**own, "method": method}, arguments)


def plan_files(
    base: Source,
    models: Sequence[Source] | Mapping[str, Source],
    method: str | Merge = "task_arithmetic",
    **arguments: Any,
) -> MergePlan:
    """Return what `merge_files` would do with these arguments, reading headers only.

    Args:
        base: see `merge_files`.
        models: see `merge_files`.
        method: see `merge_files`.
        **arguments: see `merge_files`.
    """
    own = {key: arguments.pop(key) for key in _MERGE_ARGUMENTS if key in arguments}
    own["method"] = method
    beta = arguments.pop("beta", 0.5)
    with ExitStack() as stack:
        job = _open(stack, base, models, 1, [beta], own, arguments)
        layouts = shards(job.engine, job.shard_size)
        return MergePlan(
            passes(job.method, job.scaling, job.engine.num_models),
            job.engine.nbytes(job.engine.entries.values()),
            written(layouts),
            job.peak,
            job.engine.threads,
            len(layouts),
        )


def _listed(models: Sequence[Source]) -> Sequence[Source]:
    """Return the models of an iterator as a list; what is one model goes on to be refused."""
    single = isinstance(models, (str, os.PathLike, torch.nn.Module))
    return models if single else list(models)


@dataclass
class _Job:
    engine: Engine
    method: Merge
    scaling: Scaling
    shard_size: int
    peak: int


_SCALING = (
    "alpha",
    "lines",
    "norm",
    "depth",
    "schedule",
    "outside",
    "towers",
    "buffers",
    "allow_gaps",
)


def _open(
    stack: ExitStack,
    base: Source,
    models: Sequence[Source] | Mapping[str, Source],
    outputs: int,
    betas: Sequence[float],
    arguments: Mapping[str, Any],
    method_arguments: Mapping[str, Any],
) -> _Job:
    """Check the arguments and open the inputs."""
    keys, sources = label_models(models)
    scaling = Scaling(
        beta=betas[0], **{key: arguments[key] for key in _SCALING if key in arguments}
    )
    method = make_merge(arguments.get("method", "task_arithmetic"), **method_arguments)
    max_memory = parse_size(arguments.get("max_memory", "1GiB"), "max_memory")
    shard_size = parse_size(arguments.get("shard_size", "5GB"), "shard_size")
    dtype = parse_dtype(arguments.get("dtype"))

    readers: list[TensorSource] = []
    for label, source in zip(
        ["base", *(f"model {key}" for key in keys)], [base, *sources], strict=True
    ):
        readers.append(open_source(source, label))
        stack.callback(readers[-1].close)
    width = max(
        [info.dtype.itemsize for reader in readers for info in reader.tensors.values()]
        + [dtype.itemsize if dtype is not None else 4]
    )
    budget = plan_memory(max_memory, arguments.get("threads"), len(keys), outputs, width)
    engine = Engine(
        readers[0],
        dict(zip(keys, readers[1:], strict=True)),
        strict=arguments.get("strict", True),
        vocab=arguments.get("vocab"),
        dtype=dtype,
        allow_nonfinite=arguments.get("allow_nonfinite", False),
        chunk=budget.chunk,
        threads=budget.threads,
        cache=budget.cache,
    )
    memory = physical_memory()
    if memory is not None and engine.nbytes(engine.entries.values()) > memory // 2:
        for reader in readers:
            if isinstance(reader, FileSource):
                reader.drop_behind()
    return _Job(engine, method, scaling, shard_size, budget.peak)


def _run(
    base: Source,
    models: Sequence[Source] | Mapping[str, Source],
    folders: Sequence[Path],
    betas: Sequence[float],
    arguments: Mapping[str, Any],
    method_arguments: Mapping[str, Any],
) -> list[MergeReport]:
    started = time.perf_counter()
    _, sources = label_models(models)
    for folder in folders:
        check_target(folder, [base, *sources], arguments.get("overwrite", False))
    with ExitStack() as stack:
        job = _open(stack, base, models, len(folders), betas, arguments, method_arguments)
        engine = job.engine
        layouts = shards(engine, job.shard_size)
        check_space(folders, written(layouts))
        steps = passes(job.method, job.scaling, engine.num_models)
        total = engine.nbytes(engine.merged()) * (len(steps) - 1)
        total += engine.nbytes(engine.entries.values())
        with progress_bar(arguments.get("progress", True), total) as engine.on_progress:
            return _write(
                job, base, models, folders, betas, layouts, arguments, method_arguments, started
            )


def _write(
    job: _Job,
    base: Source,
    models: Sequence[Source] | Mapping[str, Source],
    folders: Sequence[Path],
    betas: Sequence[float],
    layouts: Sequence[Layout],
    arguments: Mapping[str, Any],
    method_arguments: Mapping[str, Any],
    started: float,
) -> list[MergeReport]:
    """Run the passes, write every result under a temporary name, rename."""
    engine = job.engine
    with one_thread_each(), engine.hold():
        plan = prepare(engine, job.method, job.scaling)
        tables = []
        for beta in betas:
            scaling = Scaling(**{**vars(job.scaling), "beta": beta})
            tables.append(scaling.factors(engine.sizes(), plan.alpha))
        partial = [temporary(folder) for folder in folders]
        sinks: list[FileSink] = []
        try:
            verify = arguments.get("verify", False)
            for number, folder in enumerate(partial):
                sinks.append(FileSink(number, folder, layouts, verify))
            plan.write(sinks, tables)
            reports = []
            for sink, folder, target, beta in zip(sinks, partial, folders, betas, strict=True):
                sink.finish()
                recipe = make_recipe(base, models, beta, arguments, method_arguments)
                untied = set(engine.base.aliases) > set(engine.aliases)
                dtype = parse_dtype(arguments.get("dtype"))
                copy_companions(base, folder, dtype, untied=untied)
                if recipe is not None:
                    note = {"recipe": recipe, "alpha": plan.alpha}
                    (folder / RECIPE).write_text(json.dumps(note, indent=2) + "\n", "utf-8")
                sync_folder(folder)
                reports.append(
                    MergeReport(
                        out_dir=str(target),
                        method=_method_name(job.method, arguments),
                        alpha=plan.alpha,
                        beta=beta,
                        passes=engine.passes,
                        bytes_read=engine.bytes_read,
                        bytes_written=written(layouts),
                        seconds=0.0,
                        peak_rss=None,
                        files=sink.names,
                        copied=[e.name for e in engine.entries.values() if not e.merged],
                        skipped=engine.skipped,
                        dropped=engine.extra,
                        recipe=recipe,
                    )
                )
            for folder, target in zip(partial, folders, strict=True):
                publish(folder, target)
        except BaseException:
            for sink in sinks:
                sink.abandon()
            for folder in partial:
                shutil.rmtree(folder, ignore_errors=True)
            raise
    for report in reports:
        report.seconds, report.peak_rss = time.perf_counter() - started, peak_rss()
    return reports


def _method_name(method: Merge, arguments: Mapping[str, Any]) -> str:
    name = arguments.get("method", "task_arithmetic")
    return name if isinstance(name, str) else type(method).__name__


def run_recipe(
    recipe: Mapping[str, Any], out_dir: str | os.PathLike[str], **overrides: Any
) -> MergeReport:
    """Merge again from a report's recipe; the same inputs give the same bytes.

    Args:
        recipe: `MergeReport.recipe`, or the "recipe" entry of the `lines_merge.json` beside a result.
        out_dir: folder of the result.
        **overrides: arguments of `merge_files` that replace the recipe's.

    Raises:
        ValueError: base or models are missing.
    """
    arguments = {**recipe, **overrides}
    missing = [key for key in ("base", "models") if key not in arguments]
    if missing:
        raise ValueError(f"the recipe lacks {', '.join(missing)}")
    depth = arguments.get("depth")
    if isinstance(depth, Mapping):
        arguments["depth"] = DepthMap.from_json(depth["map"])
    base, models = arguments.pop("base"), arguments.pop("models")
    return merge_files(base, models, out_dir, **arguments)
