"""Data sets: scikit-learn's digits and moons, MNIST's test images, CIFAR, SVHN."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import shutil
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["DATASETS", "Split", "cache_dir", "digits", "load", "moons", "verify"]


class Split(NamedTuple):
    """Images in [0, 1], (n, channels, height, width), and labels, for training and testing."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


TORONTO = "https://www.cs.toronto.edu/~kriz/"
SVHN = "http://ufldl.stanford.edu/housenumbers/"
FILES: dict[str, list[tuple[str, str, str]]] = {
    "cifar10": [(TORONTO, "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a")],
    "cifar100": [(TORONTO, "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85")],
    "svhn": [
        (SVHN, "train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
        (SVHN, "test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
    ],
    "mnist-test": [
        ("", "t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
        ("", "t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
    ],
}
DATASETS = ("digits", *FILES)


def cache_dir() -> Path:
    """Return the platform's cache folder for this package."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "lcnn"


def verify(path: Path, md5: str) -> Path:
    """Return ``path``, or raise OSError where its MD5 sum is another.

    Example:
        >>> verify(Path("missing.gz"), "0")
        Traceback (most recent call last):
        ...
        FileNotFoundError: missing.gz does not exist: put it there, or name its folder with data_dir
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: put it there, or name its folder with data_dir"
        )
    found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if found != md5:
        raise OSError(f"{path} has MD5 {found}, not {md5}: delete it and try again")
    return path


def _fetch(base: str, name: str, md5: str, folder: Path) -> Path:
    path = folder / name
    if path.exists() or not base:
        return verify(path, md5)
    print(f"downloading {base}{name} to {path}", file=sys.stderr, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        part = Path(temporary) / name
        with urllib.request.urlopen(base + name) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target)
        verify(part, md5)
        part.replace(path)
    return path


def _split(x: Any, y: Any, share: float, seed: int) -> Split:
    from sklearn.model_selection import train_test_split

    parts = train_test_split(x, y, test_size=share, stratify=y, random_state=seed)
    a, b, c, d = (torch.as_tensor(p) for p in parts)
    return Split(a.float(), c.long(), b.float(), d.long())


def digits(seed: int = 0) -> Split:
    """Return scikit-learn's 1,797 digits, (n, 1, 8, 8) in [0, 1], split 70/30 by class.

    Example:
        >>> digits().test_x.shape
        torch.Size([540, 1, 8, 8])
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    return _split((found.images / 16)[:, None], found.target, 0.3, seed)


def moons(n: int = 400, noise: float = 0.15, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's two moons: points (n, 2) and labels (n,)."""
    from sklearn.datasets import make_moons

    x, y = make_moons(n, noise=noise, random_state=seed)
    return torch.as_tensor(x).float(), torch.as_tensor(y).long()


def _mnist_test(files: list[Path], seed: int) -> Split:
    images, labels = (gzip.decompress(f.read_bytes()) for f in files)
    x = torch.frombuffer(bytearray(images[16:]), dtype=torch.uint8).view(-1, 1, 28, 28) / 255
    y = torch.frombuffer(bytearray(labels[8:]), dtype=torch.uint8).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    cut = len(y) * 4 // 5  # 8,000 to train, 2,000 to test
    return Split(x[order[:cut]], y[order[:cut]], x[order[cut:]], y[order[cut:]])


def _cifar(files: list[Path], seed: int) -> Split:
    parts: dict[bool, list[tuple[Tensor, Tensor]]] = {True: [], False: []}
    with tarfile.open(files[0]) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            name = Path(member.name).name
            stream = archive.extractfile(member)
            test = name in ("test", "test_batch")
            if stream is None or not (test or name.startswith(("data_batch", "train"))):
                continue
            entry = pickle.load(stream, encoding="latin1")  # its checksum was verified
            labels = entry["fine_labels"] if "fine_labels" in entry else entry["labels"]
            x = torch.as_tensor(entry["data"]).view(-1, 3, 32, 32) / 255
            parts[test].append((x, torch.tensor(labels)))
    joined = [
        torch.cat(column) for test in (False, True) for column in zip(*parts[test], strict=True)
    ]
    return Split(*joined)


def _svhn(files: list[Path], seed: int) -> Split:
    from scipy.io import loadmat

    out: list[Tensor] = []
    for file in files:
        entry = loadmat(str(file))
        out.append(torch.as_tensor(entry["X"]).permute(3, 2, 0, 1).contiguous() / 255)
        out.append(torch.as_tensor(entry["y"].ravel().astype("int64")) % 10)  # 10 stands for 0
    return Split(*out)


READERS = {"cifar10": _cifar, "cifar100": _cifar, "svhn": _svhn, "mnist-test": _mnist_test}


def load(name: str, data_dir: str | Path | None = None, seed: int = 0) -> Split:
    """Return a data set by name, verified against its published checksum.

    Args:
        name: ``"digits"``, ``"mnist-test"`` (8,000 of the 10,000 test images train, 2,000 test; the two
            files must be in ``data_dir``), ``"cifar10"``, ``"cifar100"``, ``"svhn"`` (downloaded once).
        data_dir: where the files are or will be; default: the user's cache folder.
        seed: of the split, where there is none.

    Raises:
        ValueError: for an unknown name.
        OSError: for a missing file that cannot be downloaded, or a wrong checksum.

    Example:
        >>> load("digits").x.shape
        torch.Size([1257, 1, 8, 8])
    """
    if name == "digits":
        return digits(seed)
    if name not in FILES:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    folder = cache_dir() if data_dir is None else Path(data_dir)
    return READERS[name]([_fetch(*entry, folder) for entry in FILES[name]], seed)
