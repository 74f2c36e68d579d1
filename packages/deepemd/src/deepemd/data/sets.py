"""Readers of the field's data sets: ModelNet40 and 10, ScanObjectNN, ShapeNet (PointFlow's layout)."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepemd.data.download import cache_dir, check_file, fetch
from deepemd.solvers._exact import require

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Source:
    """Where a data set is published and how its files are recognised."""

    urls: tuple[str, ...]
    archive: str
    folder: str
    md5: str | None = None
    size: int | None = None
    files: tuple[tuple[str, str], ...] = ()
    terms: str = ""


SOURCES: dict[str, Source] = {
    "modelnet40": Source(
        (
            "https://shapenet.cs.stanford.edu/media/modelnet40_ply_hdf5_2048.zip",
            "https://huggingface.co/datasets/Msun/modelnet40/resolve/main/modelnet40_ply_hdf5_2048.zip",
        ),
        "modelnet40_ply_hdf5_2048.zip",
        "modelnet40_ply_hdf5_2048",
        md5="c9ab8e6dfb16f67afdab25e155c79e59",
        files=(
            ("ply_data_train0.h5", "3176385ffc31a7b6b5af22191fd920d1"),
            ("ply_data_train1.h5", "e3f613fb500559403b34925112754dc4"),
            ("ply_data_train2.h5", "0c56e233a090ff87c3049d4ce08e7d8b"),
        ),
    ),
    "modelnet10": Source(
        ("http://vision.princeton.edu/projects/2014/3DShapeNets/ModelNet10.zip",),
        "ModelNet10.zip",
        "ModelNet10",
        size=473_402_300,
    ),
    "scanobjectnn": Source(
        ("http://hkust-vgd.ust.hk/scanobjectnn/h5_files.zip",),
        "h5_files.zip",
        "h5_files",
        md5="36876af479f9ad39abad5ebcd89038dd",
        terms="ScanObjectNN is for research; accept its terms of use at https://hkust-vgd.github.io/"
        "scanobjectnn/ first, then pass accept_terms=True (--accept-terms)",
    ),
}
SHAPENET = (
    "ShapeNetCore.v2.PC15k is shared by the authors of PointFlow on Google Drive, folder "
    "1G0rf-6HSHoTll6aH7voh-dXj6hCRhSAQ. Download ShapeNetCore.v2.PC15k.zip by hand and unpack it to "
    "{path}, so that {path}/<synset>/train/*.npy exist."
)


def fetch_set(
    name: str, data_dir: str | Path | None = None, *, accept_terms: bool = False, progress: bool = True
) -> Path:  # fmt: skip
    """Download and unpack a data set, once; returns its folder.

    Args:
        name: a key of :data:`SOURCES`, or ``"shapenet"``, which says how to get it by hand.
        data_dir: see :func:`~deepemd.data.download.cache_dir`.
        accept_terms: you have accepted the terms of use, where there are any.
        progress: report on stderr.

    Raises:
        KeyError: another name.
        OSError: no source answered.
        ValueError: a checksum differs.
        RuntimeError: terms to accept first, or a set that cannot be fetched.
    """
    root = cache_dir(data_dir)
    if name == "shapenet":
        folder = root / "ShapeNetCore.v2.PC15k"
        if folder.is_dir():
            return folder
        raise RuntimeError(SHAPENET.format(path=folder))
    if name not in SOURCES:
        raise KeyError(f"unknown data set {name!r}; there are {', '.join([*SOURCES, 'shapenet'])}")
    source = SOURCES[name]
    folder = root / source.folder
    if folder.is_dir():
        return folder
    if source.terms and not accept_terms:
        raise RuntimeError(source.terms)
    archive = fetch(
        source.urls, root / source.archive, checksum=source.md5, size=source.size, progress=progress
    )
    unpack(archive, folder)
    return folder


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip archive that holds ``folder.name`` beside it, under a temporary name first."""
    temporary = folder.with_name(folder.name + ".unpacking")
    with zipfile.ZipFile(archive) as file:
        for member in file.namelist():
            target = (temporary / member).resolve()
            if not target.is_relative_to(temporary.resolve()):
                raise ValueError(f"{archive}: refuses the path {member!r}")
        file.extractall(temporary)
    inner = temporary / folder.name
    if not inner.is_dir():
        raise ValueError(f"{archive} does not hold the folder {folder.name}")
    inner.rename(folder)
    for rest in sorted(temporary.rglob("*"), reverse=True):
        rest.rmdir() if rest.is_dir() else rest.unlink()
    temporary.rmdir()


def verify_set(name: str, data_dir: str | Path | None = None) -> list[str]:
    """Check the files of a data set that is on disk; returns what was checked.

    Raises:
        KeyError, FileNotFoundError, ValueError: unknown, absent, or not as published.
    """
    if name == "shapenet":
        folder = cache_dir(data_dir) / "ShapeNetCore.v2.PC15k"
        found = sorted(folder.glob("*/*/*.npy"))
        if not found:
            raise FileNotFoundError(SHAPENET.format(path=folder))
        for path in found:
            shape = np.load(path, mmap_mode="r").shape
            if shape != (15000, 3):
                raise ValueError(f"{path} has shape {shape}, expected (15000, 3)")
        return [str(path) for path in found]
    if name not in SOURCES:
        raise KeyError(f"unknown data set {name!r}; there are {', '.join([*SOURCES, 'shapenet'])}")
    source = SOURCES[name]
    root = cache_dir(data_dir)
    if not (root / source.folder).is_dir():
        raise FileNotFoundError(f"{root / source.folder} is absent; deepemd data fetch {name}")
    checked = []
    if (root / source.archive).exists():
        check_file(root / source.archive, checksum=source.md5, size=source.size)
        checked.append(source.archive)
    for file, digest in source.files:
        check_file(root / source.folder / file, checksum=digest)
        checked.append(file)
    return checked


def read_h5(path: str | Path) -> tuple[Tensor, Tensor]:
    """Read ``data`` (n, 2048, 3) and ``label`` (n,) of a ModelNet40 or ScanObjectNN file (extra ``data``)."""
    require("h5py", "data")
    import h5py

    with h5py.File(path, "r") as file:
        if missing := {"data", "label"} - set(file.keys()):
            raise ValueError(f"{path} lacks {sorted(missing)}; it holds {sorted(file.keys())}")
        points: np.ndarray[Any, Any] = file["data"][:].astype(np.float32)
        labels: np.ndarray[Any, Any] = file["label"][:].astype(np.int64).reshape(-1)
    if points.ndim != 3 or points.shape[2] != 3 or len(points) != len(labels):
        raise ValueError(f"{path}: data {points.shape} and label {labels.shape} are not n clouds")
    return torch.from_numpy(points), torch.from_numpy(labels)


def modelnet40(split: str = "train", data_dir: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """Return ModelNet40's clouds (n, 2048, 3) and labels, from the folder of :func:`fetch_set`."""
    folder = cache_dir(data_dir) / SOURCES["modelnet40"].folder
    files = sorted(folder.glob(f"ply_data_{split}*.h5"))
    if not files:
        raise FileNotFoundError(
            f"no ply_data_{split}*.h5 in {folder}; deepemd data fetch modelnet40"
        )
    parts = [read_h5(path) for path in files]
    return torch.cat([points for points, _ in parts]), torch.cat([labels for _, labels in parts])


def shapenet(
    synset: str, split: str = "train", data_dir: str | Path | None = None, *, n_points: int = 2048
) -> Tensor:
    """Return ShapeNet clouds (n, n_points, 3) of one synset in PointFlow's layout.

    Each file holds 15,000 points; the first ``n_points`` of them are a uniform sample.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    folder = cache_dir(data_dir) / "ShapeNetCore.v2.PC15k"
    files = sorted((folder / synset / split).glob("*.npy"))
    if not files:
        raise FileNotFoundError(SHAPENET.format(path=folder))
    clouds = []
    for path in files:
        cloud = np.load(path, allow_pickle=False)
        if cloud.ndim != 2 or cloud.shape[1] != 3 or len(cloud) < n_points:
            raise ValueError(f"{path} has shape {cloud.shape}, expected at least ({n_points}, 3)")
        clouds.append(cloud[:n_points].astype(np.float32))
    return torch.from_numpy(np.stack(clouds))
