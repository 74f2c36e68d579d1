"""CIFAR-10, CIFAR-100 and Tiny ImageNet; archives are read without running what they contain."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from typing import Any

import numpy as np

from sequel.data.download import cache_dir, fetch
from sequel.scenarios import Dataset

__all__ = ["cifar10", "cifar100", "safe_unpickle", "tiny_imagenet"]

CIFAR = "https://www.cs.toronto.edu/~kriz/"
TINY = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = {
    "cifar-10": "c58f30108f718f92721af3b95e74349a",
    "cifar-100": "eb9058c3a382ffc7106e4002c42a8d85",
    "tiny": "90528d7ca1a48142e341f4ef8d21d0de",
}
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not a NumPy array or a builtin container")


def safe_unpickle(data: bytes) -> Any:
    """Unpickle NumPy arrays and builtin containers; UnpicklingError for anything else.

    >>> safe_unpickle(pickle.dumps({"a": np.arange(3)}))["a"].tolist()
    [0, 1, 2]
    """
    return _Unpickler(io.BytesIO(data), encoding="bytes").load()


def _parts(archive: Any, names: list[str], label: bytes) -> tuple[Any, Any]:
    x, y = [], []
    with tarfile.open(archive) as tar:
        for name in names:
            member = tar.extractfile(name)
            assert member is not None
            batch = safe_unpickle(member.read())
            x.append(np.asarray(batch[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
            y += list(batch[label])
    return np.concatenate(x), np.asarray(y, dtype=np.int64)


def cifar10(data_dir: str | os.PathLike[str] | None = None, *, md5: str | None = None) -> Dataset:
    """Return CIFAR-10 (uint8, N x 3 x 32 x 32), downloaded where it is missing."""
    file = cache_dir(data_dir) / "cifar-10-python.tar.gz"
    archive = fetch(f"{CIFAR}{file.name}", file, md5 or MD5["cifar-10"])
    root = "cifar-10-batches-py"
    x, y = _parts(archive, [f"{root}/data_batch_{i}" for i in range(1, 6)], b"labels")
    xt, yt = _parts(archive, [f"{root}/test_batch"], b"labels")
    return Dataset(x, y, xt, yt, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def cifar100(data_dir: str | os.PathLike[str] | None = None, *, md5: str | None = None) -> Dataset:
    """Return CIFAR-100 with its fine labels; like :func:`cifar10`."""
    file = cache_dir(data_dir) / "cifar-100-python.tar.gz"
    archive = fetch(f"{CIFAR}{file.name}", file, md5 or MD5["cifar-100"])
    x, y = _parts(archive, ["cifar-100-python/train"], b"fine_labels")
    xt, yt = _parts(archive, ["cifar-100-python/test"], b"fine_labels")
    return Dataset(x, y, xt, yt, (0.5071, 0.4867, 0.4408), (0.2673, 0.2564, 0.2762))


def tiny_imagenet(
    data_dir: str | os.PathLike[str] | None = None, *, md5: str | None = None
) -> Dataset:
    """Return Tiny ImageNet (uint8, N x 3 x 64 x 64; 200 classes in the order of ``wnids.txt``).

    The validation images are the test set. Needs Pillow to decode JPEG.
    """
    try:
        from PIL import Image
    except ImportError as error:  # pragma: no cover - Pillow comes with matplotlib
        raise ImportError("tiny_imagenet needs Pillow: pip install pillow") from error
    archive = fetch(TINY, cache_dir(data_dir) / "tiny-imagenet-200.zip", md5 or MD5["tiny"])
    root = "tiny-imagenet-200"
    with zipfile.ZipFile(archive) as files:

        def picture(name: str) -> Any:
            with files.open(name) as member, Image.open(member) as image:
                return np.asarray(image.convert("RGB")).transpose(2, 0, 1)

        wnids = files.read(f"{root}/wnids.txt").decode().split()
        number = {w: i for i, w in enumerate(wnids)}
        names = sorted(n for n in files.namelist() if n.endswith(".JPEG"))
        train = [n for n in names if n.startswith(f"{root}/train/")]
        lines = files.read(f"{root}/val/val_annotations.txt").decode().splitlines()
        val = [line.split("\t")[:2] for line in lines if line]
        x = np.stack([picture(n) for n in train])
        y = np.array([number[n.split("/")[2]] for n in train])
        xt = np.stack([picture(f"{root}/val/images/{name}") for name, _ in val])
        yt = np.array([number[w] for _, w in val])
    return Dataset(x, y, xt, yt, (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821))
