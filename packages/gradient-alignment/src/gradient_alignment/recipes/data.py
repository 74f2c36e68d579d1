"""Real images: scikit-learn's digits, MNIST and CIFAR from their original files, verified by checksum."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Source:
    """A file on a server.

    Attributes:
        url: its address.
        md5: its checksum.
    """

    url: str
    md5: str

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.url.rsplit("/", 1)[1]


_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_CIFAR = "https://www.cs.toronto.edu/~kriz/"
MNIST = {
    "train": (
        Source(_MNIST + "train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        Source(_MNIST + "train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
    ),
    "test": (
        Source(_MNIST + "t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
        Source(_MNIST + "t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
    ),
}
CIFAR = {
    10: Source(_CIFAR + "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
    100: Source(_CIFAR + "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
}


@dataclass(frozen=True)
class Split:
    """A data set in memory, images (n, C, H, W) in [0, 1] and class indices (n,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int


def digits(seed: int = 0) -> Split:
    """Return scikit-learn's 1,797 digits, (n, 1, 8, 8) in [0, 1], 70 % to train, the same share of every class.

    Args:
        seed: of the split.

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            'the digits come with scikit-learn: pip install "gradient-alignment[data]"'
        ) from error
    images, target = load_digits(return_X_y=True)
    x = torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.as_tensor(target).long()
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for label in range(10):
        rows = torch.nonzero(y == label).squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        cut = round(0.7 * len(rows))
        train.append(rows[:cut])
        test.append(rows[cut:])
    a, b = torch.cat(train), torch.cat(test)
    return Split(x[a], y[a], x[b], y[b], 10)


def cache() -> Path:
    """Return the user's folder for downloaded data."""
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA", Path.home()))
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return root / "gradient-alignment"


def obtain(source: Source, folder: Path) -> Path:
    """Return a file, verified; it is downloaded if it is not there, and appears under its name only when whole.

    Raises:
        OSError: it cannot be downloaded, or its checksum is wrong (a file that was there stays).
    """
    path = folder / source.name
    if path.exists():
        _check(path, source)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    print(f"downloading {source.url}", file=sys.stderr)
    handle, name = tempfile.mkstemp(dir=folder, suffix=".part")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(source.url) as response:
            shutil.copyfileobj(response, file)
        _check(temporary, source)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _check(path: Path, source: Source) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != source.md5:
        raise OSError(
            f"{path} has the md5 {digest.hexdigest()} instead of {source.md5}: remove it and try again"
        )


def read_idx(path: Path) -> Tensor:
    """Return the bytes of a gzipped IDX file as a uint8 tensor of its shape.

    Raises:
        OSError: the file holds no array of bytes, or is cut short.
    """
    with gzip.open(path, "rb") as file:
        content = file.read()
    rank = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    shape = np.frombuffer(content, ">u4", rank, 4).tolist() if len(content) >= 4 + 4 * rank else []
    body = content[4 + 4 * rank :]
    if not shape or len(body) != int(np.prod(shape)):
        raise OSError(f"{path} is no whole IDX file of bytes")
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(shape)


def mnist(data_dir: Path | None = None, *, test_only: bool = False) -> Split:
    """Return MNIST, (n, 1, 28, 28) in [0, 1].

    Args:
        data_dir: the folder of the .gz files, or one with a folder `mnist` or `mnist-test` in it; None is the user's
            cache. Missing files are downloaded there.
        test_only: make do with the 10,000 test images: 8,000 to train, 2,000 to test.

    Raises:
        OSError: a file cannot be had, or is damaged.
    """
    folder = cache() / "mnist" if data_dir is None else Path(data_dir)
    inside = [folder / name for name in ("mnist-test", "mnist")]
    folder = next((each for each in inside if data_dir is not None and each.is_dir()), folder)

    def part(name: str) -> tuple[Tensor, Tensor]:
        images, labels = (read_idx(obtain(source, folder)) for source in MNIST[name])
        return images.unsqueeze(1).float() / 255, labels.long()

    test_x, test_y = part("test")
    if test_only:
        return Split(test_x[:8000], test_y[:8000], test_x[8000:], test_y[8000:], 10)
    return Split(*part("train"), test_x, test_y, 10)


class _Plain(pickle.Unpickler):
    """Reads numpy arrays, lists and dicts, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {("numpy", "dtype"), ("numpy", "ndarray"), ("_codecs", "encode")}
        if name == "_reconstruct" and module.endswith("core.multiarray"):
            return np.empty(0).__reduce__()[0]
        if (module, name) in allowed:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"refused {module}.{name}")


def cifar(num_classes: int = 10, data_dir: Path | None = None) -> Split:
    """Return CIFAR-10 or CIFAR-100, (n, 3, 32, 32) in [0, 1], from the archive of its authors.

    Args:
        num_classes: 10 or 100.
        data_dir: the folder of the .tar.gz; None is the user's cache, where it is downloaded.

    Raises:
        ValueError: another number of classes.
        OSError: the archive cannot be had, or is damaged.
    """
    if num_classes not in CIFAR:
        raise ValueError(f"num_classes must be 10 or 100, got {num_classes!r}")
    path = obtain(CIFAR[num_classes], cache() if data_dir is None else Path(data_dir))
    if num_classes == 10:
        parts, key = ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]), b"labels"
    else:
        parts, key = (["train"], ["test"]), b"fine_labels"
    batches: dict[str, dict[bytes, Any]] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = member.name.rsplit("/", 1)[-1]
                file = archive.extractfile(member) if name in parts[0] + parts[1] else None
                if file is not None:
                    batches[name] = _Plain(file, encoding="bytes").load()
        halves = []
        for names in parts:
            images = np.concatenate([batches[name][b"data"] for name in names])
            labels = np.concatenate([np.asarray(batches[name][key]) for name in names])
            x = torch.from_numpy(images).view(-1, 3, 32, 32).float() / 255
            halves += [x, torch.from_numpy(labels).long()]
    except (KeyError, tarfile.TarError, pickle.UnpicklingError, EOFError) as error:
        raise OSError(f"{path} is no archive of CIFAR-{num_classes}: {error}") from error
    return Split(halves[0], halves[1], halves[2], halves[3], num_classes)


def load(name: str, data_dir: Path | None = None, seed: int = 0) -> Split:
    """Return a data set by name: digits, mnist, mnist-test (its test images alone), cifar10, cifar100.

    Raises:
        ValueError: an unknown name.
    """
    if name == "digits":
        return digits(seed)
    if name in ("mnist", "mnist-test"):
        return mnist(data_dir, test_only=name == "mnist-test")
    if name in ("cifar10", "cifar100"):
        return cifar(int(name[5:]), data_dir)
    raise ValueError(
        f"dataset must be one of digits, mnist, mnist-test, cifar10, cifar100; got {name!r}"
    )
