"""A run on disk: every event as soon as it arrives, whole files only, one process at a time."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from mi_surrogates.errors import CheckpointLocked, CheckpointMismatch

if TYPE_CHECKING:
    from typing_extensions import Self

Floats = NDArray[np.floating[Any]]
_OPEN: set[Path] = set()  # POSIX record locks do not exclude the same process


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never a part.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(Path(folder) / "a", b"1")
        ...     (Path(folder) / "a").read_bytes()
        b'1'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk it would take what is left
        raise


def _lock(file: Any) -> None:
    """Lock the first byte of a file, or raise OSError; the system frees it when the process dies."""
    if sys.platform == "win32":  # pragma: no cover
        import msvcrt

        file.seek(1000)  # beyond the text, which others may read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Store:
    """The folder of a run: config.json, events/<iteration>/<design>.npz, history.jsonl, state.pt, lock.

    A thread of its own writes the files, in order and as the events arrive, since flushing a file to the
    disk takes longer than most else of an iteration. A state is only written when all events before it are
    on the disk, so that it never speaks of what a crash has lost.

    Args:
        path: the folder; made if it is not there.
        config: of the run; a folder of another configuration is refused.

    Raises:
        CheckpointLocked: another process, or another store of this one, has the folder open.
        CheckpointMismatch: another configuration, with the keys that differ.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, Store(folder, {"seed": 0}) as store:
        ...     store.save_events(0, 3, np.ones((2, 1)), np.zeros((2, 1)))
        ...     store.flush()
        ...     store.load_events(0, 3)[0].shape
        (2, 1)
    """

    def __init__(self, path: str | os.PathLike[str], config: dict[str, Any]) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._key = self.path.resolve()
        self._writer = ThreadPoolExecutor(1, "mi-surrogates-store")  # its thread starts when needed
        self._pending: list[Future[None]] = []
        lock = self.path / "lock"
        if self._key in _OPEN:
            raise CheckpointLocked(f"{self.path} is open in this process already")
        self._file = lock.open("a+")
        try:
            _lock(self._file)
        except OSError:
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise CheckpointLocked(f"{self.path} is in use by {owner}") from None
        _OPEN.add(self._key)
        try:
            self._file.truncate(0)
            self._file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
            self._file.flush()
            self._check(json.loads(json.dumps(config)))
        except BaseException:
            self.close()
            raise

    def _check(self, config: dict[str, Any]) -> None:
        file = self.path / "config.json"
        if not file.exists():
            write_atomically(file, json.dumps(config, indent=1).encode())
            return
        known = json.loads(file.read_text(encoding="utf-8"))
        keys = sorted(set(known) | set(config))
        changed = [k for k in keys if known.get(k) != config.get(k)]
        if changed:
            detail = "; ".join(f"{k}: {known.get(k)} there, {config.get(k)} here" for k in changed)
            raise CheckpointMismatch(f"{self.path} holds a run of another configuration ({detail})")

    def __enter__(self) -> Self:
        """Return the store."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free the folder."""
        self.close()

    def close(self) -> None:
        """Finish writing and free the folder."""
        if self._file.closed:
            return
        try:
            self.flush()
        finally:
            self._writer.shutdown()
            self._file.close()
            _OPEN.discard(self._key)

    def flush(self) -> None:
        """Wait until all events are on the disk.

        Raises:
            OSError: a file could not be written.
        """
        pending, self._pending = self._pending, []
        for each in pending:
            each.result()

    def _events(self, iteration: int, design: int) -> Path:
        return self.path / "events" / f"{iteration:04d}" / f"{design:04d}.npz"

    def save_events(self, iteration: int, design: int, x: Floats, y: Floats) -> None:
        """Write the events of one design, soon; see `flush`.

        Raises:
            OSError: an earlier file could not be written.
        """
        buffer = io.BytesIO()
        np.savez(buffer, x=x, y=y)
        self._soon(self._events(iteration, design), buffer.getvalue())

    def _soon(self, path: Path, data: bytes) -> None:
        while self._pending and self._pending[0].done():  # do not go on simulating for a full disk
            self._pending.pop(0).result()
        self._pending.append(self._writer.submit(write_atomically, path, data))

    def load_events(self, iteration: int, design: int) -> tuple[Floats, Floats] | None:
        """Return the events of one design, or None if they are not there."""
        path = self._events(iteration, design)
        if not path.exists():
            return None
        with np.load(path) as data:
            return data["x"], data["y"]

    def save_failure(self, iteration: int, design: int, reason: str) -> None:
        """Write down that a design failed for good."""
        path = self._events(iteration, design).with_suffix(".failed")
        self._soon(path, reason.encode())

    def load_failure(self, iteration: int, design: int) -> str | None:
        """Return why a design failed, or None."""
        path = self._events(iteration, design).with_suffix(".failed")
        return path.read_text(encoding="utf-8") if path.exists() else None

    def save_state(self, state: dict[str, Any], history: list[dict[str, Any]]) -> None:
        """Write the history, then the state, soon: a kill between them leaves the history one line ahead.

        A kill before both repeats the last step from its events, to the same result.

        Raises:
            OSError: events before them could not be written.
        """
        self.flush()
        lines = "".join(json.dumps(row) + "\n" for row in history)
        self._soon(self.path / "history.jsonl", lines.encode())
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self._soon(self.path / "state.pt", buffer.getvalue())

    def load_state(self) -> dict[str, Any] | None:
        """Return the last state, or None at the start of a run."""
        path = self.path / "state.pt"
        if not path.exists():
            return None
        with contextlib.closing(io.BytesIO(path.read_bytes())) as buffer:
            state: dict[str, Any] = torch.load(buffer, weights_only=True, map_location="cpu")
        return state
