"""Read point clouds from files: npy, npz, pt, xyz, and meshes (ply, off, obj) by trimesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepemd.solvers._exact import require

MESHES = (".ply", ".off", ".obj", ".stl")
SUFFIXES = (".npy", ".npz", ".pt", ".xyz", ".txt", *MESHES)


def _mesh(path: Path, points: int | None, seed: int) -> np.ndarray[Any, Any]:
    require("trimesh", "mesh")
    import trimesh

    loaded = trimesh.load(path, process=False)
    if isinstance(loaded, trimesh.Scene):
        loaded = loaded.to_geometry()
    faces = getattr(loaded, "faces", None)
    if faces is None or len(faces) == 0:  # a point cloud
        return np.asarray(loaded.vertices)
    sample, _ = trimesh.sample.sample_surface(loaded, points or 2048, seed=seed)
    return np.asarray(sample)


def read_points(path: str | Path, *, points: int | None = None, seed: int = 0) -> Tensor:
    """Read one cloud (N, D), or a stack of them (B, N, D), in float32 (float64 where stored so).

    Args:
        path: ``.npy``, ``.npz`` (its first array), ``.pt`` (a tensor), ``.xyz``/``.txt`` (a row of numbers
            per point) or a mesh ``.ply``, ``.off``, ``.obj``, ``.stl`` (the extra ``mesh``), whose
            surface is sampled uniformly; meshes without faces are read as points.
        points: how many points: of a mesh's surface (2048 by default), otherwise a random subset.
        seed: of the sampling.

    Raises:
        ValueError: another suffix, or a content that is not points.
        ImportError: a mesh without trimesh.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: suffix must be one of {', '.join(SUFFIXES)}, got {suffix!r}")
    if suffix == ".npy":
        array = np.load(path, allow_pickle=False)
    elif suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            array = archive[archive.files[0]]
    elif suffix == ".pt":
        value = torch.load(path, weights_only=True)
        if not isinstance(value, Tensor):
            raise ValueError(f"{path} holds a {type(value).__name__}, not a tensor")
        array = value.detach().cpu().numpy()
    elif suffix in MESHES:
        array = _mesh(path, points, seed)
    else:
        array = np.loadtxt(path, ndmin=2)
    if array.ndim not in (2, 3) or not np.issubdtype(array.dtype, np.number):
        raise ValueError(f"{path} holds an array {array.shape} of {array.dtype}, not points (N, D)")
    if points is not None and array.shape[-2] != points:
        if array.shape[-2] < points:
            raise ValueError(f"{path} has {array.shape[-2]} points, {points} were asked for")
        chosen = np.random.default_rng(seed).permutation(array.shape[-2])[:points]
        array = array[..., chosen, :]
    kind = np.float64 if array.dtype == np.float64 else np.float32
    return torch.from_numpy(np.ascontiguousarray(array, dtype=kind))
