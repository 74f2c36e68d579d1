"""Checkpoints on disk: one safetensors file, a sharded folder, or a pickled state dict (weights only)."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, UnsupportedDtypeError
from ..sources import MemorySource, TensorInfo, TensorSource
from .files import ReadFile, as_bytes
from .header import Stored, is_safetensors, read_header

_PICKLED = {".bin", ".pt", ".pth", ".ckpt"}
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "shared.weight")
_WRAPPED = ("state_dict", "model_state_dict", "model")


class FileSource:
    """Safetensors files, read range by range."""

    on_disk = True

    def __init__(
        self, label: str, files: Sequence[ReadFile], where: Mapping[str, int] | None
    ) -> None:
        self.label, self._files = label, files
        self.origin: Path | None = None  # what `open_checkpoint` was given
        self._stored: dict[str, tuple[ReadFile, Stored]] = {}
        for number, file in enumerate(files):
            for name, stored in read_header(file).items():
                wanted = number if where is None else where.get(name, number)
                if name in self._stored and wanted == number and where is None:
                    raise CheckpointError(f"{file.path}: {name!r} is in another shard, too")
                if wanted == number:
                    self._stored[name] = (file, stored)
        for name, number in (where or {}).items():
            if name not in self._stored:
                raise CheckpointError(
                    f"{files[number].path}: lacks {name!r}, which the index names"
                )
        self.tensors: Mapping[str, TensorInfo] = {
            name: stored.info for name, (_, stored) in self._stored.items()
        }
        self.aliases: Mapping[str, str] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by path: the copy opens the files again."""
        return open_checkpoint, (self.origin,)

    def read(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """Read elements start..stop into the buffer (a new one if there is none)."""
        file, stored = self._stored[name]
        if buffer is None:
            buffer = torch.empty(stop - start, dtype=stored.info.dtype)
        values = buffer[: stop - start]
        offset = stored.offset + start * stored.info.dtype.itemsize
        file.read_into(as_bytes(values), offset)
        return values

    def drop_behind(self) -> None:
        """Let pages go once they are read: the inputs are larger than memory."""
        for file in self._files:
            file.drop_behind = True

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def open_checkpoint(path: str | os.PathLike[str]) -> TensorSource:
    """Open a folder, a `.safetensors` file, an index, or a pickled state dict.

    Raises:
        CheckpointError: nothing to read there, or damaged, or unsafe.
        UnsupportedDtypeError: GGUF, or dtypes without arithmetic.
    """
    path = Path(path)
    if path.is_dir():
        source = open_checkpoint(_in_folder(path))
        if isinstance(source, FileSource):
            source.aliases, source.origin = _tied_head(path, source.tensors), path
        return source
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    source = _open_file(path)
    if isinstance(source, FileSource):
        source.origin = path
    return source


def _open_file(path: Path) -> TensorSource:
    label = str(path.parent if path.name in {*_INDEXES, *_WHOLE} else path)
    if path.suffix == ".gguf":
        raise UnsupportedDtypeError(f"{path}: GGUF holds quantised weights; dequantise first")
    if path.name.endswith(".index.json"):
        return _open_index(path, label)
    if is_safetensors(path):
        return _open_files(label, [path], None)
    if path.suffix in _PICKLED:
        return MemorySource(_load_pickled(path), label)
    raise CheckpointError(
        f"{path}: not a checkpoint; expected a folder, .safetensors, .index.json, or one of "
        f"{', '.join(sorted(_PICKLED))}"
    )


def _in_folder(folder: Path) -> Path:
    """Choose what to read in a folder."""
    for name in (_INDEXES[0], _WHOLE[0], _INDEXES[1], _WHOLE[1]):
        if (folder / name).exists():
            return folder / name
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder}: holds an adapter; bake it into its base first (PEFT's merge_and_unload)"
        )
    found = sorted([*folder.glob("*.safetensors.index.json"), *folder.glob("*.safetensors")])
    if len(found) == 1 or (found and found[0].name.endswith(".index.json")):
        return found[0]
    what = "several weight files and no index" if found else "no weight file"
    raise CheckpointError(f"{folder}: {what}; looked for {', '.join((*_INDEXES, *_WHOLE))}")


def _tied_head(folder: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Return {head: embedding} if the config ties them: a stored head is then a copy, or stale."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    head = tensors.get("lm_head.weight")
    if (
        head is None
        or not isinstance(config, dict)
        or config.get("tie_word_embeddings") is not True
    ):
        return {}
    embeddings = [n for n, info in tensors.items() if n.endswith(_EMBEDDINGS) and info == head]
    return {"lm_head.weight": embeddings[0]} if len(embeddings) == 1 else {}


def _open_files(label: str, paths: Sequence[Path], where: Mapping[str, int] | None) -> FileSource:
    files: list[ReadFile] = []
    try:
        files.extend(ReadFile(path) for path in paths)
        return FileSource(label, files, where)
    except BaseException:
        for file in files:
            file.close()
        raise


def _open_index(path: Path, label: str) -> TensorSource:
    """Open the shards that an index names, each by a plain file name beside it."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
        if not shards or not all(isinstance(shard, str) for shard in shards):
            raise ValueError("weight_map must map names to file names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: bad index: {error}") from error
    for shard in shards:
        plain = PurePosixPath(shard).name == shard and "\\" not in shard and ":" not in shard
        if not plain or shard in {"", ".", ".."}:
            raise CheckpointError(f"{path}: {shard!r} is not a plain file name beside the index")
        if not (path.parent / shard).is_file():
            raise CheckpointError(f"{path}: names {shard!r}, which is absent")
    paths = [path.parent / shard for shard in shards]
    if all(map(is_safetensors, paths)):
        where = {name: shards.index(shard) for name, shard in weight_map.items()}
        return _open_files(label, paths, where)
    tensors: dict[str, Tensor] = {}
    for shard_path in paths:
        tensors.update(_load_pickled(shard_path))
    missing = [name for name in weight_map if name not in tensors]
    if missing:
        raise CheckpointError(f"{path}: no shard holds {missing[:10]}")
    return MemorySource(tensors, label)


def _load_pickled(path: Path) -> dict[str, Tensor]:
    """Load a pickled state dict without executing code, memory-mapped where the format allows it."""
    loaded = _load(path)
    for key in _WRAPPED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise CheckpointError(f"{path}: holds no state dict (a mapping of names to tensors)")
    return dict(loaded)


def _load(path: Path) -> Any:
    for mmap in (True, False):
        try:
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path}: refused, it holds more than tensors (only weights are ever unpickled): "
                f"{str(error).splitlines()[0]}"
            ) from error
        except Exception as error:
            # the old format cannot be memory-mapped
            if not mmap or "mmap" not in str(error):
                raise CheckpointError(f"{path}: cannot be read: {error}") from error
    raise AssertionError("unreachable")
