"""Loaders of public data sets: checked, cached, and never run on import.

Downloads go to ``data_dir`` (default: the user's cache folder). Files with a published checksum
are verified against it; for the others the SHA-256 of the first download is written to
``palora.lock.json`` beside them and checked from then on.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palora.core.checkpoint import atomically, write_json

__all__ = ["adult", "census", "default_dir", "fetch", "mnist", "multimnist", "sarcos", "utkface"]

Array = NDArray[Any]

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
SARCOS_URL = "http://www.gaussianprocess.org/gpml/data/"
CENSUS_URL = "https://archive.ics.uci.edu/ml/machine-learning-databases/census-income-mld/"
LOCK = "palora.lock.json"


def default_dir() -> Path:
    """The folder for data where none is given: the user's cache."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "palora"


def _digest(path: Path, algorithm: str) -> str:
    found = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            found.update(block)
    return found.hexdigest()


def fetch(name: str, url: str, data_dir: str | Path | None, md5: str | None = None) -> Path:
    """Return the file ``name`` in ``data_dir``, downloading and verifying it if it is absent.

    Raises:
        ValueError: its checksum differs from the published or the recorded one.
        OSError: it is absent and cannot be downloaded.
    """
    folder = default_dir() if data_dir is None else Path(data_dir)
    path = folder / name
    if not path.exists():
        print(f"downloading {url + name} to {path}", file=sys.stderr)
        atomically(path, lambda temporary: _download(url + name, temporary))
    if md5 is not None:
        if (found := _digest(path, "md5")) != md5:
            raise ValueError(f"{path} has MD5 {found}, expected {md5}: delete it and try again")
        return path
    lock = folder / LOCK
    known = json.loads(lock.read_text()) if lock.exists() else {}
    found = _digest(path, "sha256")
    if known.setdefault(name, found) != found:
        raise ValueError(f"{path} has SHA-256 {found}, {lock} records {known[name]}")
    write_json(lock, known)
    return path


def _download(url: str, path: str) -> None:
    with urllib.request.urlopen(url, timeout=60) as answer, Path(path).open("wb") as file:
        while block := answer.read(1 << 20):
            file.write(block)


def _idx(path: Path) -> Array:
    """Read an IDX file of bytes."""
    with gzip.open(path, "rb") as file:
        content = file.read()
    dims = content[3]
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)


def mnist(part: str, data_dir: str | Path | None = None) -> tuple[Array, Array]:
    """Return images ``(n, 28, 28)`` and labels of MNIST's ``train`` or ``t10k`` part.

    ``data_dir`` may hold the files itself or in a folder ``mnist-test`` (test part only).
    """
    if part not in ("train", "t10k"):
        raise ValueError(f"part must be 'train' or 't10k', got {part!r}")
    folder = default_dir() if data_dir is None else Path(data_dir)
    if part == "t10k" and (folder / "mnist-test").is_dir():
        folder = folder / "mnist-test"
    names = (f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz")
    images, labels = (_idx(fetch(n, MNIST_URL, folder, MNIST_MD5[n])) for n in names)
    return images, labels


def _resize(canvas: Tensor) -> Tensor:
    """Resize ``(n, s, s)`` pictures in 0..255 to 28×28 as PIL does by default (bicubic)."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('MultiMNIST needs Pillow: pip install "palora[data]"') from error
    small = [
        np.asarray(Image.fromarray(picture).resize((28, 28))) for picture in canvas.byte().numpy()
    ]
    return torch.from_numpy(np.stack(small)).float().unsqueeze(1) / 255


def multimnist(
    part: str, data_dir: str | Path | None = None, *, digits: int = 2, seed: int = 0
) -> tuple[Tensor, ...]:
    """Make MultiMNIST (2 digits) or its three-digit version from MNIST, by a fixed seed.

    Two digits: a 36×36 canvas with a at [0:28, 0:28] and b at [6:34, 6:34], maximum in the
    overlap, resized to 28×28; pairs uniform with replacement, a ≠ b; 60,000 / 10,000 of them.
    Three: top-left, bottom-middle and top-right of the canvas.

    Returns:
        images ``(n, 1, 28, 28)`` in [0, 1] and one label tensor per digit.
    """
    if digits not in (2, 3):
        raise ValueError(f"digits must be 2 or 3, got {digits}")
    images, labels = mnist(part, data_dir)
    count = len(images)
    rng = np.random.default_rng([seed, digits, part == "train"])
    chosen = rng.integers(count, size=(digits, count))
    while (same := (chosen[0] == chosen[1])).any():
        chosen[1, same] = rng.integers(count, size=int(same.sum()))
    pictures, targets = torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))
    side = 36
    corners = [(0, 0), (6, 6)] if digits == 2 else [(0, 0), (side - 28, side // 2 - 14), (0, 8)]
    canvas = torch.zeros(count, side, side, dtype=torch.uint8)
    for index, (row, column) in zip(chosen, corners, strict=True):
        place = canvas[:, row : row + 28, column : column + 28]
        torch.maximum(place, pictures[index], out=place)
    return _resize(canvas), *(targets[index] for index in chosen)


def sarcos(data_dir: str | Path | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Return SARCOS as ``train``, ``val`` (the first 4,448 rows) and ``test``: inputs, 7 torques.

    Targets are divided by the 0.9 quantile of the training part.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError('SARCOS files need SciPy: pip install "palora[data]"') from error
    tables = {}
    for key, name in (("sarcos_inv", "sarcos_inv.mat"), ("sarcos_inv_test", "sarcos_inv_test.mat")):
        content = loadmat(fetch(name, SARCOS_URL, data_dir))
        tables[key] = torch.from_numpy(np.asarray(content[key], dtype=np.float32))
    rows, test = tables["sarcos_inv"], tables["sarcos_inv_test"]
    train, val = rows[4448:], rows[:4448]
    scale = torch.quantile(train[:, 21:], 0.9, dim=0)
    parts = {"train": train, "val": val, "test": test}
    return {k: (v[:, :21], v[:, 21:] / scale) for k, v in parts.items()}


def _encode(columns: list[list[str]], known: list[Any] | None) -> tuple[Tensor, list[Any]]:
    """Standardise numeric columns and one-hot the others; reuse ``known`` encodings for tests."""
    blocks, encodings = [], []
    for i, column in enumerate(columns):
        if known is None:
            try:
                values = np.array([float(v) for v in column])
                encoding: Any = (values.mean(), values.std() or 1.0)
            except ValueError:
                encoding = sorted(set(column))
        else:
            encoding = known[i]
        encodings.append(encoding)
        if isinstance(encoding, tuple):
            values = (np.array([float(v) for v in column]) - encoding[0]) / encoding[1]
            blocks.append(values[:, None])
        else:
            index = {v: j for j, v in enumerate(encoding)}
            hot = np.zeros((len(column), len(encoding)))
            for row, value in enumerate(column):
                if value in index:
                    hot[row, index[value]] = 1.0
            blocks.append(hot)
    return torch.from_numpy(np.concatenate(blocks, 1)).float(), encodings


def _table(
    rows: list[list[str]], drop: list[int], known: list[Any] | None = None
) -> tuple[Tensor, list[Any]]:
    columns = [list(c) for i, c in enumerate(zip(*rows, strict=True)) if i not in drop]
    return _encode(columns, known)


def adult(data_dir: str | Path) -> tuple[Tensor, Tensor, Tensor]:
    """Return UCI Adult from ``data_dir/adult/*.csv``: features, income > 50k, never married.

    The two labels and what gives them away (marital status and relationship) are not features.

    Raises:
        OSError: no CSV file there.
    """
    files = sorted(Path(data_dir, "adult").glob("*.csv"))
    if not files:
        raise FileNotFoundError(f"no CSV file in {Path(data_dir, 'adult')}")
    with files[0].open(newline="", encoding="utf-8") as file:
        header, *rows = [[cell.strip() for cell in row] for row in csv.reader(file) if row]
    low = [h.strip().lower().replace("_", "-") for h in header]
    income, marital = (
        _column(low, "income", "income-per-year", "class", "salary"),
        _column(low, "marital-status", "marital.status"),
    )
    hidden = [income, marital, _column(low, "relationship")]
    features, _ = _table(rows, hidden)
    rich = torch.tensor([int(">50" in row[income]) for row in rows])
    single = torch.tensor([int("never" in row[marital].lower()) for row in rows])
    return features, rich, single


def _column(header: list[str], *names: str) -> int:
    for i, name in enumerate(header):
        if name in names:
            return i
    raise ValueError(f"no column {' or '.join(names)} among {header}")


def census(data_dir: str | Path | None = None) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return Census-Income KDD as ``train`` and ``test``: features, age > 40, college degree."""
    parts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    encodings: list[Any] | None = None
    for part, name in (("train", "census-income.data.gz"), ("test", "census-income.test.gz")):
        with gzip.open(fetch(name, CENSUS_URL, data_dir), "rt", encoding="utf-8") as file:
            rows = [[c.strip() for c in row] for row in csv.reader(file) if row]
        degrees = ("Bachelors", "Masters", "Doctorate", "Prof school")
        age = torch.tensor([int(float(row[0]) > 40) for row in rows])
        school = torch.tensor([int(row[4].startswith(degrees)) for row in rows])
        features, encodings = _table(rows, [0, 4], encodings)
        parts[part] = (features, age, school)
    return parts


def utkface(data_dir: str | Path) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return UTKFace from ``data_dir/UTKFace/<age>_<gender>_<race>_*.jpg`` at 64×64.

    Split 70/10/20 with seed 42 into ``train``, ``val``, ``test``: images, age (standardised on the
    training part), gender, race. The data set asks for registration: it is not downloaded.

    Raises:
        OSError: no image there.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('UTKFace needs Pillow: pip install "palora[data]"') from error
    files = []
    for path in sorted(Path(data_dir, "UTKFace").glob("*.jpg")):
        fields = path.name.split("_")
        if len(fields) >= 4 and all(f.isdigit() for f in fields[:3]):
            files.append((path, [int(f) for f in fields[:3]]))
    if not files:
        raise FileNotFoundError(f"no <age>_<gender>_<race>_*.jpg in {Path(data_dir, 'UTKFace')}")
    pictures = []
    for path, _ in files:
        with Image.open(path) as image:
            pictures.append(np.asarray(image.convert("RGB").resize((64, 64))))
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    labels = torch.tensor([f for _, f in files])
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(42))
    a, b = int(0.7 * len(files)), int(0.8 * len(files))
    age = labels[:, 0].float()
    mean, deviation = age[order[:a]].mean(), age[order[:a]].std().clamp_min(1e-6)
    age = (age - mean) / deviation
    rows = {"train": order[:a], "val": order[a:b], "test": order[b:]}
    return {k: (images[r], age[r], labels[r, 1], labels[r, 2]) for k, r in rows.items()}
