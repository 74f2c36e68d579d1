"""Merging checkpoints on disk in bounded memory: the engine between readers and a shard writer."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..depth import DepthMap
from ..engine import Engine, Entry, Worker
from ..errors import CheckpointError
from ..lines import Scaling, prepare
from ..merges import Merge, make_merge
from ..schedule import Outside, check_finite
from ..sources import Source, TensorSource, label_models, open_source, parse_dtype
from .checkpoint import FileSource
from .files import WriteFile, as_bytes, sync_folder
from .header import Layout, file_name
from .plan import (
    MergePlan,
    parse_size,
    passes,
    physical_memory,
    plan_memory,
    shards,
    written,
)

RECIPE = "lines_merge.json"
_COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}


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


class _FileSink:
    """Writes results at their final offsets in the shards of one output."""

    def __init__(self, number: int, folder: Path, layouts: Sequence[Layout], verify: bool) -> None:
        self._number, self._folder, self._layouts = number, folder, layouts
        self._shard = {name: i for i, item in enumerate(layouts) for name in item.tensors}
        self._sums: dict[tuple[int, int], tuple[int, int]] | None = {} if verify else None
        self.names = [file_name(i + 1, len(layouts)) for i in range(len(layouts))]
        self._files: list[WriteFile] = []
        for name, item in zip(self.names, layouts, strict=True):
            self._files.append(WriteFile(folder / name, item.size))
            self._files[-1].write(memoryview(item.header), 0)

    def buffer(self, entry: Entry, start: int, stop: int, worker: Worker) -> Tensor:
        """Return this thread's buffer."""
        info = self._layouts[self._shard[entry.name]].tensors[entry.name].info
        return worker.chunk(-1 - self._number, info.dtype, stop - start)

    def flush(self, entry: Entry, start: int, stop: int, values: Tensor) -> None:
        """Write the chunk."""
        shard = self._shard[entry.name]
        stored = self._layouts[shard].tensors[entry.name]
        offset = stored.offset + start * stored.info.dtype.itemsize
        data = as_bytes(values)
        self._files[shard].write(data, offset)
        if self._sums is not None:
            self._sums[shard, offset] = (len(data), zlib.crc32(data))

    def finish(self) -> None:
        """Make the files durable, write the index, check what was asked to be checked."""
        for file in self._files:
            file.close()
        if len(self._layouts) > 1:
            total = sum(s.info.nbytes for item in self._layouts for s in item.tensors.values())
            weight_map = {name: self.names[shard] for name, shard in sorted(self._shard.items())}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            text = json.dumps(index, indent=2)
            (self._folder / "model.safetensors.index.json").write_text(text + "\n", "utf-8")
        for (shard, offset), (size, expected) in (self._sums or {}).items():
            path = self._folder / self.names[shard]
            with path.open("rb") as file:
                file.seek(offset)
                if zlib.crc32(file.read(size)) != expected:
                    raise CheckpointError(f"{path}: bytes at {offset} differ from what was written")

    def abandon(self) -> None:
        """Close the files of a failed merge."""
        for file in self._files:
            file.abandon()


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
    (report,) = _run(base, models, [Path(out_dir)], [beta], arguments, method_arguments)
    return report


_MERGE_ARGUMENTS = (
    "method alpha lines norm depth schedule outside towers dtype buffers strict vocab allow_nonfinite "
    "allow_gaps max_memory threads shard_size overwrite verify progress"
).split()


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
        _check_target(folder, [base, *sources], arguments.get("overwrite", False))
    with ExitStack() as stack:
        job = _open(stack, base, models, len(folders), betas, arguments, method_arguments)
        engine = job.engine
        layouts = shards(engine, job.shard_size)
        _check_space(folders, written(layouts))
        steps = passes(job.method, job.scaling, engine.num_models)
        total = engine.nbytes(engine.merged()) * (len(steps) - 1)
        total += engine.nbytes(engine.entries.values())
        with _progress(arguments.get("progress", True), total) as engine.on_progress:
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
    names = [entry.name for entry in engine.merged()]
    with engine.hold():
        plan = prepare(engine, job.method, job.scaling)
        tables = []
        for beta in betas:
            scaling = Scaling(**{**vars(job.scaling), "beta": beta})
            tables.append(scaling.factors(names, plan.alpha))
        partial = [_temporary(folder) for folder in folders]
        sinks: list[_FileSink] = []
        try:
            verify = arguments.get("verify", False)
            for number, folder in enumerate(partial):
                sinks.append(_FileSink(number, folder, layouts, verify))
            plan.write(sinks, tables)
            reports = []
            for sink, folder, target, beta in zip(sinks, partial, folders, betas, strict=True):
                sink.finish()
                recipe = _recipe(base, models, beta, arguments, method_arguments)
                _companions(base, folder, parse_dtype(arguments.get("dtype")))
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
                _publish(folder, target)
        except BaseException:
            for sink in sinks:
                sink.abandon()
            for folder in partial:
                shutil.rmtree(folder, ignore_errors=True)
            raise
    for report in reports:
        report.seconds, report.peak_rss = time.perf_counter() - started, _peak_rss()
    return reports


def _method_name(method: Merge, arguments: Mapping[str, Any]) -> str:
    name = arguments.get("method", "task_arithmetic")
    return name if isinstance(name, str) else type(method).__name__


def _check_target(folder: Path, sources: Sequence[Source], overwrite: bool) -> None:
    """Refuse to write over an input, or over anything unless told to."""
    resolved = folder.resolve()
    for source in sources:
        if isinstance(source, (str, os.PathLike)):
            path = Path(source).resolve()
            if resolved in {path, path.parent if path.is_file() else path}:
                raise ValueError(f"out_dir {folder} is the folder of an input")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise FileExistsError(f"{folder} exists and is not empty; overwrite=True replaces it")


def _check_space(folders: Sequence[Path], size: int) -> None:
    parent = next(path for path in folders[0].resolve().parents if path.exists())
    free = shutil.disk_usage(parent).free
    need = size * len(folders)
    if free < need:
        raise OSError(
            errno.ENOSPC, f"{need / 1e9:.2f} GB to write and {free / 1e9:.2f} GB free", str(parent)
        )


def _temporary(folder: Path) -> Path:
    """Create the folder that will be renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return partial


def _publish(partial: Path, target: Path) -> None:
    """Give the finished folder its name; what was there goes once the new one is in place."""
    old = None
    if target.exists():
        if target.is_dir() and not any(target.iterdir()):
            target.rmdir()
        else:
            old = target.parent / f".{target.name}.replaced-{os.getpid()}"
            os.replace(target, old)
    os.replace(partial, target)
    sync_folder(target.parent)
    if old is not None and old.is_dir():
        shutil.rmtree(old)
    elif old is not None:
        old.unlink()


def _companions(base: Source, folder: Path, dtype: torch.dtype | None) -> None:
    """Copy config, tokenizer and the like; note a new dtype in the config."""
    if not isinstance(base, (str, os.PathLike)) or not Path(base).is_dir():
        return
    for path in sorted(Path(base).iterdir()):
        weights = path.name.endswith(".index.json") or path.name == RECIPE
        if path.is_file() and path.suffix in _COPIED and not weights:
            shutil.copyfile(path, folder / path.name)
    config = folder / "config.json"
    if dtype is not None and config.exists():
        content = json.loads(config.read_text(encoding="utf-8"))
        for key in ("torch_dtype", "dtype"):
            if key in content:
                content[key] = str(dtype).removeprefix("torch.")
        config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _recipe(
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


def _peak_rss() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def _progress(
    progress: bool | Callable[[int, int], None], total: int
) -> Iterator[Callable[[int], None] | None]:
    """Return what the engine calls after each chunk: a bar, the caller's function, or nothing."""
    if progress is False:
        yield None
        return
    done = 0
    if progress is True:
        try:
            from tqdm import tqdm
        except ImportError:
            bar: Callable[[int, int], None] = _Bar()
        else:
            with tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr) as meter:
                yield lambda count: (meter.update(count), None)[1]
            return
    else:
        bar = progress

    def advance(count: int) -> None:
        nonlocal done
        done += count
        bar(done, total)

    yield advance
    if progress is True:
        print(file=sys.stderr)


class _Bar:
    """A percentage on one line of stderr."""

    def __init__(self) -> None:
        self._shown = -1

    def __call__(self, done: int, total: int) -> None:
        percent = min(100, 100 * done // max(total, 1))
        if percent != self._shown:
            self._shown = percent
            print(f"\r{percent:3d} %", end="", file=sys.stderr, flush=True)
