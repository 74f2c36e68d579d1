"""Checkpoints: one safetensors file with a JSON header; written whole or not at all, never pickled."""

from __future__ import annotations

import json
import os
import struct
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

__all__ = ["load_latest", "prune", "read", "write"]

FORMAT = 1


def _flat(tree: Any, prefix: str = "") -> dict[str, np.ndarray[Any, Any]]:
    if not isinstance(tree, dict):
        return {prefix: np.ascontiguousarray(tree).reshape(np.shape(tree))}
    out: dict[str, np.ndarray[Any, Any]] = {}
    for key, value in tree.items():
        if "|" in key:
            raise ValueError(f"names must not contain '|', got {key!r}")
        out |= _flat(value, f"{prefix}|{key}" if prefix else key)
    return out


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in flat.items():
        at = out
        *parents, last = name.split("|")
        for key in parents:
            at = at.setdefault(key, {})
        at[last] = value
    return out


_NAMES = {"b": "BOOL", "f": "F", "i": "I", "u": "U"}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a header holds JSON's types and NumPy's numbers, got {type(value).__name__}")


def _encoded(flat: dict[str, np.ndarray[Any, Any]], text: str) -> Iterator[Any]:
    """Yield the parts of a safetensors file, the arrays as they are in memory instead of in copies."""
    order = sorted(flat, key=lambda name: (-flat[name].dtype.itemsize, name))  # all aligned
    header: dict[str, Any] = {"__metadata__": {"sequel": text}}
    at = 0
    for name in order:
        array = flat[name]
        kind = _NAMES.get(array.dtype.kind)
        if kind is None or array.dtype.itemsize > 8:
            raise TypeError(f"{name} has dtype {array.dtype}, which a checkpoint cannot hold")
        header[name] = {
            "dtype": kind if kind == "BOOL" else f"{kind}{8 * array.dtype.itemsize}",
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    yield struct.pack("<Q", len(encoded)) + encoded
    for name in order:
        yield flat[name].astype(flat[name].dtype.newbyteorder("<"), copy=False).data


def write(path: str | os.PathLike[str], tree: dict[str, Any], header: dict[str, Any]) -> None:
    """Write a nested dict of arrays and a JSON-able header.

    The bytes go to a temporary file of the same folder, are synced, and take the name in one step, so a
    process killed at any moment leaves the previous file whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, **header}, default=_plain)
    parts = _encoded(_flat(tree), text)
    handle, temporary = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what :func:`write` wrote: (tree, header). Raises RuntimeError where the file is damaged."""
    try:
        with safe_open(str(path), framework="np") as file:
            header = json.loads((file.metadata() or {})["sequel"])
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise RuntimeError(f"{path} is not a whole checkpoint of sequel: {error}") from error
    if header.get("format") != FORMAT:
        raise RuntimeError(f"{path} has format {header.get('format')}, this reads {FORMAT}")
    return _nested(flat), header


def load_latest(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the newest whole checkpoint of a folder, or None where there is none.

    Damaged files are passed over with a warning; RuntimeError where all are damaged.
    """
    files = sorted(Path(folder).glob("step-*.safetensors"), reverse=True)
    for file in files:
        try:
            return read(file)
        except RuntimeError as error:
            warnings.warn(f"{error}; trying the one before", RuntimeWarning, stacklevel=2)
    if files:
        raise RuntimeError(f"no whole checkpoint among the {len(files)} files of {folder}")
    return None


def prune(folder: str | os.PathLike[str], keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, and what killed writers left."""
    for old in sorted(Path(folder).glob("step-*.safetensors"))[:-keep]:
        old.unlink(missing_ok=True)
    for rest in Path(folder).glob(".writing-*"):
        rest.unlink(missing_ok=True)
