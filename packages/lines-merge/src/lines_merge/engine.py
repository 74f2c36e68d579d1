"""One pass over base and models, cell by cell: what merging in memory and merging files share.

A *cell* is a fixed run of elements of one flattened tensor. Every statistic is summed in float64 within
a cell and the cells' sums are added exactly (`math.fsum`), and every other operation is element-wise and
built of single correctly rounded steps. So results do not depend on chunk size, sharding or threads.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .align import align
from .cells import CELL, Cell, CellFunction, Entry, Worker
from .errors import (
    NonFiniteError,
    UnrelatedBaseWarning,
)
from .sources import FLOAT8, FLOATS, TensorSource

_SAMPLE = 16  # one cell in 16 enters the check that models and base belong together


class Sink(Protocol):
    """Where results go, chunk by chunk."""

    def buffer(self, entry: Entry, start: int, stop: int, worker: Worker) -> Tensor:
        """Return the tensor to write elements start..stop into."""
        ...

    def flush(self, entry: Entry, start: int, stop: int, values: Tensor) -> None:
        """Take the elements."""
        ...


@dataclass(frozen=True)
class _Job:
    entry: Entry
    start: int
    stop: int
    check: bool


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let torch use one thread in each of ours: the chunks are the parallelism.

    Setting the number makes torch renew its thread pool, so a merge does it once, around all its passes.
    """
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Engine:
    """Base and models, aligned and checked, with passes over their cells.

    Args:
        base: the reader of the base.
        models: readers of the models, by key.
        strict: whether missing and extra tensors are errors.
        vocab: "base" lets embeddings differ in their number of rows.
        dtype: dtype of the result, None for that of each base tensor.
        allow_nonfinite: skip the search for NaN and infinity.
        chunk: elements that one thread reads at once; a multiple of `CELL`.
        threads: workers, the calling thread among them; 0 takes torch's number of threads.
        cache: bytes of inputs that may be kept in memory between passes.
        depth: relative depth of tensors, for methods with weights that vary over depth.
        on_progress: called with the number of bytes after each chunk.
    """

    def __init__(
        self,
        base: TensorSource,
        models: Mapping[str, TensorSource],
        *,
        strict: bool = True,
        vocab: str | None = None,
        dtype: torch.dtype | None = None,
        allow_nonfinite: bool = False,
        chunk: int = 16 * CELL,
        threads: int = 0,
        cache: int = 0,
        depth: Mapping[str, float] | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self.base, self.models, self.keys = base, list(models.values()), list(models)
        self.threads = threads or torch.get_num_threads()
        self.dtype, self.chunk, self.cache = dtype, chunk, cache
        self.allow_nonfinite = allow_nonfinite
        self.depth: Mapping[str, float] = depth or {}
        self.on_progress = on_progress
        aligned = align(
            base, self.models, strict=strict, vocab=vocab, dtype_given=dtype is not None
        )
        self.entries, self.skipped, self.extra = aligned.entries, aligned.skipped, aligned.extra
        self.aliases = aligned.aliases
        self.bytes_read = 0
        self.passes = 0
        self._checked: set[str] = set()
        self._held: dict[tuple[int, str], Tensor] = {}
        self._loaded: set[tuple[str, int]] = set()
        self._lock = threading.Lock()
        self._squares = np.zeros(len(self.models) + 1)

    @property
    def num_models(self) -> int:
        """Number of models."""
        return len(self.models)

    def merged(self) -> list[Entry]:
        """Entries with arithmetic, sorted by name: the flat order of the parameters."""
        return [entry for entry in self.entries.values() if entry.merged]

    def sizes(self) -> dict[str, int]:
        """Return {name: elements} of all weights, also of those that a model lacks: depth counts them."""
        return {
            name: entry.info.numel
            for name, entry in self.entries.items()
            if entry.info.dtype in FLOATS + FLOAT8
        }

    def compute_dtype(self, entry: Entry) -> torch.dtype:
        """Return float64 where an input is, else float32."""
        dtypes = {entry.info.dtype, *(m.tensors[entry.name].dtype for m in self.models)}
        return torch.float64 if torch.float64 in dtypes else torch.float32

    def output_dtype(self, entry: Entry) -> torch.dtype:
        """Return the dtype of the result."""
        return self.dtype if entry.merged and self.dtype is not None else entry.info.dtype

    def nbytes(self, entries: Iterable[Entry]) -> int:
        """Return the bytes that a pass over these entries reads."""
        total = 0
        for entry in entries:
            total += entry.info.nbytes
            if entry.merged:
                total += sum(model.tensors[entry.name].nbytes for model in self.models)
        return total

    # Passes

    def scan(
        self, function: CellFunction, names: Iterable[str] | None = None, *, sample: int = 1
    ) -> None:
        """Call `function` on every cell of the named tensors (default: all), from several threads.

        With `sample` above 1 it sees the first n-th of every cell only.
        """
        entries = self.merged() if names is None else [self.entries[name] for name in names]
        self.passes += names is None and sample == 1
        jobs = self._jobs(entries) if sample == 1 else self._samples(entries, sample)
        self._run(jobs, lambda job, worker: self._scan_job(job, worker, function))

    def check_all(self) -> None:
        """Look for NaN and infinity in everything, before results overwrite anything.

        Raises:
            NonFiniteError: there is one, and `allow_nonfinite` is off.
        """
        unchecked = [e.name for e in self.merged() if e.name not in self._checked]
        if unchecked and not self.allow_nonfinite:
            self.scan(lambda cell: None, unchecked)

    def scan_cell(self, function: CellFunction, name: str, start: int) -> None:
        """Call `function` on the one cell of a tensor that starts there."""
        entry = self.entries[name]
        job = _Job(entry, start, min(start + CELL, entry.info.numel), check=False)
        self._scan_job(job, self._worker(0), function)

    def write(
        self,
        function: Callable[[Cell, Sequence[Tensor]], None],
        sinks: Sequence[Sink],
        names: Iterable[str] | None = None,
    ) -> None:
        """Let `function` fill each sink's elements for every cell; copy what has no arithmetic."""
        entries = list(self.entries.values()) if names is None else []
        entries = entries or [self.entries[name] for name in names or ()]
        self.passes += names is None
        jobs = self._jobs(entries)
        self._run(jobs, lambda job, worker: self._write_job(job, worker, function, sinks))

    @contextmanager
    def hold(self, names: Iterable[str] | None = None) -> Iterator[bool]:
        """Keep the inputs of these tensors in memory between passes, if the cache has room."""
        entries = self.merged() if names is None else [self.entries[name] for name in names]
        sources = [self.base, *self.models]
        fits = self.nbytes(entries) <= self.cache and all(source.on_disk for source in sources)
        added = []
        if fits:
            for entry in entries:
                infos = [source.tensors[entry.name] for source in sources]
                alike = len({(info.dtype, info.numel) for info in infos}) == 1
                if alike and (0, entry.name) not in self._held:
                    matrix = torch.empty(len(sources), entry.info.numel, dtype=entry.info.dtype)
                    for index, row in enumerate(matrix):
                        self._held[index, entry.name] = row
                        added.append((index, entry.name))
        try:
            yield fits
        finally:
            names_added = {key[1] for key in added}
            for key in added:
                del self._held[key]
            self._loaded = {key for key in self._loaded if key[0] not in names_added}

    def _jobs(self, entries: Iterable[Entry]) -> list[_Job]:
        jobs = []
        for entry in entries:
            check = entry.merged and entry.name not in self._checked
            total = entry.info.numel
            for start in range(0, max(total, 1), self.chunk):
                jobs.append(_Job(entry, start, min(total, start + self.chunk), check))
        return jobs

    @staticmethod
    def _samples(entries: Iterable[Entry], sample: int) -> list[_Job]:
        jobs = []
        for entry in entries:
            for start in range(0, entry.info.numel, CELL):
                size = min(CELL, entry.info.numel - start)
                jobs.append(_Job(entry, start, start + -(-size // sample), check=False))
        return jobs

    def _run(self, jobs: Sequence[_Job], do: Callable[[_Job, Worker], None]) -> None:
        """Work through the chunks, in this thread and in others."""
        queue: SimpleQueue[_Job] = SimpleQueue()
        for job in jobs:
            queue.put(job)
        errors: list[BaseException] = []

        def work(worker: Worker) -> None:
            try:
                while not errors:
                    do(queue.get_nowait(), worker)
            except Empty:
                pass
            except BaseException as error:  # noqa: BLE001, raised again below
                errors.append(error)

        count = min(self.threads, len(jobs))
        pool = [threading.Thread(target=work, args=(self._worker(i),)) for i in range(1, count)]
        with one_thread_each():
            try:
                for thread in pool:
                    thread.start()
                work(self._worker(0))
            finally:
                for thread in pool:
                    thread.join()
        if errors:
            raise errors[0]
        checked = {job.entry.name for job in jobs if job.check}
        if checked:
            self._checked |= checked
            self._warn_unrelated()

    def _worker(self, index: int) -> Worker:
        workers: list[Worker] = self.__dict__.setdefault("_workers", [])
        while len(workers) <= index:
            workers.append(Worker())
        return workers[index]

    # One chunk

    def _read(self, job: _Job, worker: Worker) -> list[Tensor]:
        """Return the chunk of base and models, as stored."""
        entry, size = job.entry, job.stop - job.start
        sources = [self.base, *self.models] if entry.merged else [self.base]
        buffers = self._buffers(entry, sources, worker, size)
        rows: list[Tensor] = []
        chunk = (entry.name, job.start // self.chunk * self.chunk)
        end = min(chunk[1] + self.chunk, entry.info.numel)
        whole = (job.start, job.stop) == (chunk[1], end)
        for index, source in enumerate(sources):
            # of tied tensors one is read: a second one in the file is a copy, or stale
            stored = source.aliases.get(entry.name, entry.name)
            held = self._held.get((index, entry.name))
            if chunk not in self._loaded and not whole:
                held = None  # a sample, before the tensor has been read
            stop = job.stop if index == 0 or not entry.limits else entry.limits[index - 1]
            stop = min(stop, job.stop)
            if held is not None:
                row = held[job.start : job.stop]
                if chunk not in self._loaded:
                    source.read(stored, job.start, job.stop, row)
            else:
                row = source.read(stored, min(job.start, stop), stop, buffers[index])
            if row.numel() < size:  # fewer embedding rows than the base: no update there
                wide = torch.promote_types(row.dtype, rows[0].dtype)
                row = torch.cat([row.to(wide), rows[0][row.numel() :].to(wide)])
            rows.append(row)
            self._count(row.numel() * row.element_size())
        if whole and (0, entry.name) in self._held:
            with self._lock:
                self._loaded.add(chunk)
        return rows

    def _buffers(
        self, entry: Entry, sources: Sequence[TensorSource], worker: Worker, size: int
    ) -> list[Tensor | None]:
        """Return where each source reads to: the rows of one matrix if their dtypes agree."""
        dtypes = [source.tensors[entry.name].dtype for source in sources]
        if len(set(dtypes)) == 1 and all(source.on_disk for source in sources):
            matrix = worker.chunk(0, dtypes[0], len(sources) * size)
            return list(matrix.view(len(sources), size))
        return [
            worker.chunk(index, dtype, size) if source.on_disk else None
            for index, (source, dtype) in enumerate(zip(sources, dtypes, strict=True))
        ]

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.bytes_read += nbytes
            if self.on_progress is not None:
                self.on_progress(nbytes)

    def _cells(self, job: _Job, worker: Worker, rows: Sequence[Tensor]) -> Iterator[Cell]:
        entry = job.entry
        dtype = self.compute_dtype(entry)
        block = worker.block(len(rows), dtype)
        depth = self.depth.get(entry.name, 0.0)
        matrix = _as_matrix(rows)
        for offset in range(0, job.stop - job.start, CELL):
            size = min(CELL, job.stop - job.start - offset)
            raw = [row[offset : offset + size] for row in rows]
            if matrix is not None:  # one call converts all rows
                block[:, :size].copy_(matrix[:, offset : offset + size])
            else:
                for index, row in enumerate(raw):
                    block[index, :size].copy_(row)
            base, deltas = block[0, :size], block[1:, :size]
            frozen = deltas == base if self.allow_nonfinite else None
            torch.sub(deltas, base, out=deltas)
            if frozen is not None:  # inf - inf
                deltas.masked_fill_(frozen, 0)
            start = job.start + offset
            yield Cell(entry, start, size, self.keys, base, deltas, raw[0], raw[1:], worker, depth)

    def _scan_job(self, job: _Job, worker: Worker, function: CellFunction) -> None:
        rows = self._read(job, worker)
        for cell in self._cells(job, worker, rows):
            if job.check:
                self._check(cell)
            function(cell)

    def _write_job(
        self,
        job: _Job,
        worker: Worker,
        function: Callable[[Cell, Sequence[Tensor]], None],
        sinks: Sequence[Sink],
    ) -> None:
        rows = self._read(job, worker)
        entry = job.entry
        buffers = [sink.buffer(entry, job.start, job.stop, worker) for sink in sinks]
        if entry.merged:
            for cell in self._cells(job, worker, rows):
                if job.check:
                    self._check(cell)
                offset = cell.start - job.start
                function(cell, [buffer[offset : offset + cell.size] for buffer in buffers])
        else:
            for buffer in buffers:
                buffer.copy_(rows[0])
        for sink, buffer in zip(sinks, buffers, strict=True):
            sink.flush(entry, job.start, job.stop, buffer)

    # Checks of the first pass

    def _check(self, cell: Cell) -> None:
        """Look for NaN and infinity, and sample the size of the updates."""
        if not self.allow_nonfinite and not math.isfinite(cell.deltas.sum().item()):
            self._raise_nonfinite(cell)
        if (cell.start // CELL) % _SAMPLE == 0:
            rows = [row.numpy() for row in (cell.base, *cell.deltas)]
            with np.errstate(all="ignore"):
                squares = [float(np.dot(row, row)) for row in rows]
            with self._lock:
                self._squares += squares

    def _raise_nonfinite(self, cell: Cell) -> None:
        """Find the culprit; a sum can also overflow without one."""
        labels = [self.base.label, *(model.label for model in self.models)]
        for label, raw in zip(labels, [cell.raw_base, *cell.raw_models], strict=True):
            bad = (~torch.isfinite(raw.to(cell.base.dtype))).nonzero()
            if bad.numel():
                index = cell.start + int(bad[0])
                raise NonFiniteError(
                    f"{cell.name!r} of {label} holds {float(raw[int(bad[0])])} at flat index {index}; "
                    "allow_nonfinite=True lets it pass"
                )

    def _warn_unrelated(self) -> None:
        base, *updates = self._squares.tolist()
        self._squares[:] = 0
        for model, square in zip(self.models, updates, strict=True):
            if 0 < base < math.inf and 0.25 < square / base < math.inf:
                warnings.warn(
                    f"the update of {model.label} is {math.sqrt(square / base):.2f} times as large "
                    "as the base weights; was it fine-tuned from this base?",
                    UnrelatedBaseWarning,
                    stacklevel=5,
                )


def _as_matrix(rows: Sequence[Tensor]) -> Tensor | None:
    """Return the rows as one tensor if they lie at equal distances in the same memory."""
    first = rows[0]
    storage = first.untyped_storage().data_ptr()
    step = rows[1].storage_offset() - first.storage_offset()
    if step < 0:
        return None
    for index, row in enumerate(rows):
        same = row.dtype == first.dtype and row.untyped_storage().data_ptr() == storage
        if not same or row.storage_offset() != first.storage_offset() + index * step:
            return None
    return first.as_strided((len(rows), first.numel()), (step, 1))
