"""Writing results: shards at their final offsets, in a folder that gets its name at the end."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..cells import Entry, Worker
from ..errors import CheckpointError
from ..sources import Source
from .files import WriteFile, as_bytes, sync_folder
from .header import Layout, file_name
from .report import RECIPE

_COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}


class FileSink:
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
            with path.open("rb") as written:
                written.seek(offset)
                if zlib.crc32(written.read(size)) != expected:
                    raise CheckpointError(f"{path}: bytes at {offset} differ from what was written")

    def abandon(self) -> None:
        """Close the files of a failed merge."""
        for file in self._files:
            file.abandon()


def check_target(folder: Path, sources: Sequence[Source], overwrite: bool) -> None:
    """Refuse to write over an input, or over anything unless told to."""
    resolved = folder.resolve()
    for source in sources:
        if isinstance(source, (str, os.PathLike)):
            path = Path(source).resolve()
            if resolved == path or resolved in path.parents:
                raise ValueError(f"out_dir {folder} is or holds an input, {source}")
    if resolved.exists() and not resolved.is_dir():
        raise FileExistsError(f"out_dir {folder} is a file; give a folder")
    if resolved.exists() and any(resolved.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{folder} exists and is not empty; pass overwrite (--overwrite) to replace it"
        )


def check_space(folders: Sequence[Path], size: int) -> None:
    """Raise OSError(ENOSPC) if the results do not fit the disk."""
    parent = next(path for path in folders[0].resolve().parents if path.exists())
    free = shutil.disk_usage(parent).free
    need = size * len(folders)
    if free < need:
        raise OSError(
            errno.ENOSPC, f"{need / 1e9:.2f} GB to write and {free / 1e9:.2f} GB free", str(parent)
        )


def temporary(folder: Path) -> Path:
    """Create the folder that will be renamed; what killed runs left under such names goes."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*"):
        if not _runs(left.name.rpartition("-")[2]):
            shutil.rmtree(left, ignore_errors=True)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return partial


def _runs(pid: str) -> bool:
    """Whether a process of this number runs, as far as the platform can tell."""
    if os.name != "posix" or not pid.isdecimal():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def publish(partial: Path, target: Path) -> None:
    """Give the finished folder its name; what was there goes once the new one is in place."""
    target = target.resolve()  # a link goes on pointing to the result
    old = None
    if target.exists():
        if target.is_dir() and not any(target.iterdir()):
            target.rmdir()
        else:
            old = target.parent / f".{target.name}.replaced-{os.getpid()}"
            os.replace(target, old)
    os.replace(partial, target)
    sync_folder(target.parent)
    if old is not None:
        shutil.rmtree(old)


def copy_companions(
    base: Source, folder: Path, dtype: torch.dtype | None, *, untied: bool = False
) -> None:
    """Copy config, tokenizer and the like; note a new dtype, and an untied head, in the config."""
    if not isinstance(base, (str, os.PathLike)) or not Path(base).is_dir():
        return
    for path in sorted(Path(base).iterdir()):
        weights = path.name.endswith(".index.json") or path.name == RECIPE
        if path.is_file() and path.suffix in _COPIED and not weights:
            shutil.copyfile(path, folder / path.name)
    config = folder / "config.json"
    if (dtype is not None or untied) and config.exists():
        content = json.loads(config.read_text(encoding="utf-8"))
        for key in ("torch_dtype", "dtype"):
            if dtype is not None and key in content:
                content[key] = str(dtype).removeprefix("torch.")
        if untied:
            content["tie_word_embeddings"] = False
        config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
