"""Data of the GAN experiments: scikit-learn's digits, MNIST from its original files, a ring of Gaussians."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}


def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1,797 digits as (n, 64) in [-1, 1], and their labels.

    Raises:
        ImportError: scikit-learn is missing (`pip install "lookahead-minmax[gan]"`).
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            'the digits come with scikit-learn: pip install "lookahead-minmax[gan]"'
        ) from error
    data, target = load_digits(return_X_y=True)
    return torch.as_tensor(data, dtype=torch.float32) / 8 - 1, torch.as_tensor(target).long()


RING_DEVIATION = 0.02
"""Standard deviation of each mode of the ring, whose radius is 1."""


def ring_centres() -> Tensor:
    """Return the eight modes of the ring, (8, 2), on the unit circle."""
    angles = torch.arange(8) * (torch.pi / 4)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def ring(count: int = 2000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return points (count, 2) of the mixture of eight Gaussians on a ring, and their modes (count,).

    Args:
        count: number of points.
        seed: of modes and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    modes = torch.randint(8, (count,), generator=generator)
    noise = torch.randn(count, 2, generator=generator)
    return ring_centres()[modes] + RING_DEVIATION * noise, modes


def default_folder() -> Path:
    """Return the user's cache folder for data."""
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA", Path.home()))
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return root / "lookahead-minmax"


def fetch(name: str, folder: Path, url: str = MNIST_URL, md5: str | None = None) -> Path:
    """Return a file of MNIST, downloaded and verified if it is not there.

    The file arrives under a temporary name and is renamed when its checksum is right.

    Args:
        name: the file's name on the server and on disk.
        folder: where it is kept.
        url: the server's folder.
        md5: checksum; None takes that of the canonical file.

    Raises:
        OSError: the download failed, or the checksum is wrong.
    """
    md5 = md5 or MNIST_MD5[name]
    path = folder / name
    if not path.exists():
        print(f"downloading {url}{name} to {path}", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url + name) as response:
            content = response.read()
        _verify(content, md5, url + name)
        handle, temporary = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
        return path
    _verify(path.read_bytes(), md5, str(path))
    return path


def _verify(content: bytes, md5: str, what: str) -> None:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise OSError(f"{what} has the checksum {found}, expected {md5}: remove it and try again")


def read_idx(path: Path) -> Tensor:
    """Return the uint8 array of a gzipped IDX file.

    Raises:
        OSError: the file is no such array, or is cut short.
    """
    with gzip.open(path, "rb") as file:
        content = file.read()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise OSError(f"{path} is no IDX file of bytes")
    ndim = content[3]
    header = 4 + 4 * ndim
    shape = struct.unpack(f">{ndim}I", content[4:header])
    if len(content) - header != int(torch.Size(shape).numel()):
        raise OSError(f"{path} says {shape} and holds {len(content) - header} bytes")
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).view(shape)


def mnist(data_dir: Path | None = None, *, train: bool = False) -> tuple[Tensor, Tensor]:
    """Return MNIST images (n, 1, 28, 28) in [-1, 1] and labels (n,).

    Args:
        data_dir: a folder that holds the four .gz files, or a folder `mnist-test` or `mnist` that does; None is
            the user's cache, where they are downloaded and verified.
        train: the 60,000 training images, else the 10,000 test images.

    Raises:
        OSError: a file cannot be had, or is damaged.
    """
    folder = default_folder() / "mnist" if data_dir is None else Path(data_dir)
    for name in ("mnist-test", "mnist"):
        if data_dir is not None and (folder / name).is_dir():
            folder = folder / name
            break
    part = "train" if train else "t10k"
    images = read_idx(fetch(f"{part}-images-idx3-ubyte.gz", folder))
    labels = read_idx(fetch(f"{part}-labels-idx1-ubyte.gz", folder))
    return images.unsqueeze(1).float() / 127.5 - 1, labels.long()


def load(
    name: Literal["digits", "ring", "mnist"],
    data_dir: Path | None = None,
    *,
    train: bool = False,
    scale: Literal["-1_1", "0_1"] = "-1_1",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return the examples of a data set, as the networks take them, and their labels.

    Args:
        name: "digits" (n, 64), "ring" (n, 2) or "mnist" (n, 1, 28, 28).
        data_dir: of MNIST's files.
        train: MNIST's training images, else its test images; the others have no parts.
        scale: range of the pixels, [-1, 1] or [0, 1]; the points of the ring have none.
        seed: of the ring's points.

    Raises:
        ValueError: `scale` is given for the ring.
        ImportError: scikit-learn is missing.
        OSError: a file of MNIST cannot be had, or is damaged.

    Example:
        >>> points, modes = load("ring")
        >>> points.shape, int(modes.max())
        (torch.Size([2000, 2]), 7)
    """
    if name == "ring":
        if scale != "-1_1":
            raise ValueError("scale belongs to images, the ring has none")
        return ring(seed=seed)
    images, labels = digits() if name == "digits" else mnist(data_dir, train=train)
    return (images + 1) / 2 if scale == "0_1" else images, labels
