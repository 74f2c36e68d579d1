"""MNIST, Fashion-MNIST and KMNIST: IDX files, gzipped or raw."""

from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from sequel.data.download import cache_dir, fetch
from sequel.rng import stream
from sequel.scenarios import Dataset

__all__ = ["fashion", "kmnist", "mnist", "mnist_test", "read_idx"]

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
SOURCES: dict[str, tuple[str, tuple[str, ...]]] = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
    ),
    "fashion": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
    ),
    "kmnist": (
        "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        (
            "bdb82020997e1d708af4cf47b453dcf7",
            "e144d726b3acfaa3e44228e80efcd344",
            "5c965bf0a639b31b8f53240b1b52f4d7",
            "7320c461ea6c1c855c0b718fb2a4b134",
        ),
    ),
}
RAW_T10K = ("2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637")


def read_idx(data: bytes) -> np.ndarray[Any, Any]:
    """Parse an IDX file of unsigned bytes, gzipped or not.

    >>> read_idx(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9])).tolist()
    [7, 9]
    """
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ValueError("not an IDX file of unsigned bytes")
    rank = data[3]
    shape = tuple(int(n) for n in np.frombuffer(data, ">i4", rank, 4))
    if len(data) - 4 - 4 * rank != int(np.prod(shape)):
        raise ValueError(f"the IDX file is cut off: {shape} announced")
    out: np.ndarray[Any, Any] = np.frombuffer(data, np.uint8, offset=4 + 4 * rank)
    whole: np.ndarray[Any, Any] = out.reshape(shape).copy()
    return whole


def _load(name: str, data_dir: str | os.PathLike[str] | None, mean: float, std: float) -> Dataset:
    url, sums = SOURCES[name]
    folder = cache_dir(data_dir) / name
    arrays = []
    for file, checksum in zip(FILES, sums, strict=True):
        path = fetch(f"{url}{file}.gz", folder / f"{file}.gz", checksum)
        arrays.append(read_idx(path.read_bytes()))
    x, y, xt, yt = arrays
    return Dataset(x[:, None], y.astype(np.int64), xt[:, None], yt.astype(np.int64), mean, std)


def mnist(data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Return MNIST (60,000 / 10,000 images, uint8, N x 1 x 28 x 28), downloaded where it is missing."""
    return _load("mnist", data_dir, 0.1307, 0.3081)


def fashion(data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Return Fashion-MNIST; like :func:`mnist`."""
    return _load("fashion", data_dir, 0.2860, 0.3530)


def kmnist(data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Return Kuzushiji-MNIST; like :func:`mnist`."""
    return _load("kmnist", data_dir, 0.1918, 0.3483)


def mnist_test(
    data_dir: str | os.PathLike[str], *, seed: int = 0, checksum: bool = True
) -> Dataset:
    """Return MNIST's 10,000 test images alone, split 8,000 / 2,000; no download.

    Looks for ``t10k-images-idx3-ubyte`` and its labels, raw or ``.gz``, below ``data_dir``. ``checksum``
    compares the decompressed bytes' md5. Raises OSError where they are missing or differ.
    """
    parts = []
    for file, expected in zip(FILES[2:], RAW_T10K, strict=True):
        found = sorted(Path(data_dir).rglob(file + "*"))
        if not found:
            raise OSError(f"no {file} or {file}.gz below {data_dir}")
        raw = found[0].read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        if checksum and hashlib.md5(raw, usedforsecurity=False).hexdigest() != expected:
            raise OSError(f"{found[0]} is not MNIST's {file}: its md5 differs from {expected}")
        parts.append(read_idx(raw))
    x, y = parts[0][:, None], parts[1].astype(np.int64)
    order = stream(seed, "mnist-split").permutation(len(y))
    cut = len(y) * 4 // 5
    a, b = order[:cut], order[cut:]
    return Dataset(x[a], y[a], x[b], y[b], 0.1307, 0.3081)
