"""The safetensors header: parsed with suspicion, written in the canonical form."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, UnsupportedDtypeError
from ..sources import TensorInfo
from .files import ReadFile

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_KNOWN_ELSEWHERE = {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "U16", "U32", "U64", "C64"}
_LONGEST = 100_000_000  # as in the reference implementation
_LARGEST = 2**63 - 1  # of a dimension


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its header and the absolute offset of its first byte."""

    info: TensorInfo
    offset: int


def read_header(file: ReadFile) -> dict[str, Stored]:
    """Return the tensors of a safetensors file.

    Raises:
        CheckpointError: the header is damaged: truncated, not JSON, duplicate names, offsets that are
            negative, overlap, leave gaps or run past the end.
        UnsupportedDtypeError: a dtype of the format that has no counterpart here.
    """
    if file.size < 8:
        raise CheckpointError(f"{file.path}: {file.size} bytes are too few for a safetensors file")
    prefix = bytearray(8)
    file.read_into(memoryview(prefix), 0)
    (length,) = struct.unpack("<Q", prefix)
    if length > min(_LONGEST, file.size - 8):
        raise CheckpointError(f"{file.path}: header of {length} bytes in a file of {file.size}")
    text = bytearray(length)
    file.read_into(memoryview(text), 8)
    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        return _tensors(table, 8 + length, file.size)
    except UnsupportedDtypeError as error:
        raise UnsupportedDtypeError(f"{file.path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.path}: bad header: {error}") from error


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _tensors(table: Any, start: int, size: int) -> dict[str, Stored]:
    if not isinstance(table, dict):
        raise ValueError("not a JSON object")
    found = {name: _tensor(name, entry) for name, entry in table.items() if name != "__metadata__"}
    end = 0
    for name, (_, (begin, stop)) in sorted(found.items(), key=lambda item: item[1][1]):
        if begin != end:
            raise ValueError(f"{name!r} starts at {begin}, where {end} is the first free byte")
        end = stop
    if start + end != size:
        raise ValueError(f"tensors end at byte {start + end} of {size}")
    return {name: Stored(info, start + begin) for name, (info, (begin, _)) in found.items()}


def _tensor(name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise ValueError(f"{name!r} lacks dtype, shape or data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if kind in _KNOWN_ELSEWHERE if isinstance(kind, str) else False:
        raise UnsupportedDtypeError(f"{name!r} is {kind}, which has no merge; dequantise first")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"{name!r} has dtype {kind!r}")
    if not _counts(shape) or any(size > _LARGEST for size in shape):
        raise ValueError(f"{name!r} has shape {shape!r}")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the name {name!r} is no text") from error
    if not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r} has data_offsets {offsets!r}")
    info = TensorInfo(DTYPES[kind], tuple(shape))
    if offsets[1] - offsets[0] != info.nbytes:
        raise ValueError(f"{name!r} has offsets {offsets} for {info.nbytes} bytes")
    return info, (offsets[0], offsets[1])


def _counts(value: Any) -> bool:
    """Whether the value is a list of non-negative integers."""
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value
    )


@dataclass(frozen=True)
class Layout:
    """A file to be written: its header's bytes, where each tensor starts, its size."""

    header: bytes
    tensors: Mapping[str, Stored]
    size: int


def layout(tensors: Mapping[str, TensorInfo]) -> Layout:
    """Lay tensors out without gaps, wide dtypes first so that each is aligned, then by name."""
    if "__metadata__" in tensors:
        raise ValueError("a tensor cannot be called '__metadata__': the format reserves the name")
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in order:
        info = tensors[name]
        end = begin + info.nbytes
        shape = list(info.shape)
        table[name] = {"dtype": NAMES[info.dtype], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    start = len(header)
    stored = {name: Stored(tensors[name], start + table[name]["data_offsets"][0]) for name in order}
    return Layout(header, stored, start + begin)


def file_name(index: int, count: int) -> str:
    """Return the customary name of shard `index`, from 1.

    >>> file_name(2, 3), file_name(1, 1)
    ('model-00002-of-00003.safetensors', 'model.safetensors')
    """
    return f"model-{index:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"


def is_safetensors(path: Path) -> bool:
    """Whether the name says so."""
    return path.suffix == ".safetensors"
