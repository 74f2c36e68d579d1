"""Reading and writing at an offset: one system call where the platform has it, seek and read elsewhere."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError

POSITIONAL = hasattr(os, "preadv") and hasattr(os, "pwrite")
"""Whether to read and write without moving a file position; settled when a file is opened."""
ADVICE = hasattr(os, "posix_fadvise")
"""Whether the kernel takes advice about the page cache."""


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return memoryview(tensor.view(torch.uint8).numpy().data) if tensor.numel() else memoryview(b"")


class ReadFile:
    """A file that several threads read at given offsets."""

    def __init__(self, path: Path) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
        self.path = path
        self.size = os.fstat(self._fd).st_size
        self.drop_behind = False
        self._positional = POSITIONAL
        self._lock = threading.Lock()
        if ADVICE:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target` from an offset.

        Raises:
            CheckpointError: the file ends before, or cannot be read.
        """
        try:
            done = 0
            while done < len(target):
                count = self._read(target[done:], offset + done)
                if not count:
                    raise CheckpointError(f"{self.path}: ends at byte {offset + done}: truncated")
                done += count
            if self.drop_behind and ADVICE:
                os.posix_fadvise(self._fd, offset, len(target), os.POSIX_FADV_DONTNEED)
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error}") from error

    def _read(self, target: memoryview, offset: int) -> int:
        if self._positional:
            return os.preadv(self._fd, [target], offset)
        with self._lock:
            os.lseek(self._fd, offset, os.SEEK_SET)
            data = os.read(self._fd, len(target))
        target[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the file; again is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class WriteFile:
    """A new file of known size that several threads write at given offsets."""

    def __init__(self, path: Path, size: int) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        self._fd = os.open(path, flags, 0o666)
        self._positional = POSITIONAL
        self._lock = threading.Lock()
        os.ftruncate(self._fd, size)

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at an offset."""
        done = 0
        while done < len(data):
            if self._positional:
                done += os.pwrite(self._fd, data[done:], offset + done)
            else:
                with self._lock:
                    os.lseek(self._fd, offset + done, os.SEEK_SET)
                    done += os.write(self._fd, data[done:])

    def close(self) -> None:
        """Flush to the disk and close; again is harmless."""
        if self._fd >= 0:
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1

    def abandon(self) -> None:
        """Close without flushing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def sync_folder(path: Path) -> None:
    """Make the entries of a folder durable, where folders can be opened."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
