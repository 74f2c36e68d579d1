"""Shards of labelled pairs on disk: safetensors files, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from deepemd.data.pairs import PairDataset, PairSpec


def write_shards(
    directory: str | Path,
    *,
    n_points: int,
    pairs: int,
    per_shard: int = 1024,
    seed: int = 0,
    spec: PairSpec | None = None,
    half: bool = False,
    seeds_only: bool = False,
) -> list[Path]:
    """Make labelled pairs and write them in shards ``shard-00000.safetensors``, ...

    A shard that is already there is left as it is, so an interrupted run goes on where it stopped.

    Args:
        directory: made if missing.
        n_points, seed, spec: of :class:`~deepemd.data.PairDataset`; pair ``i`` is its item ``i``.
        pairs: how many in all.
        per_shard: how many to a file.
        half: store coordinates as float16; they are rounded *after* labelling, so labels near a tie may
            be off by the rounding.
        seeds_only: store only the matchings (2 or 4 bytes per point) and make the coordinates again from
            the seed when reading.

    Returns:
        The paths.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    data = PairDataset(spec, n_points, seed, pairs)
    narrow = np.uint16 if n_points <= 1 << 16 else np.uint32
    paths = []
    for number, start in enumerate(range(0, pairs, per_shard)):
        path = directory / f"shard-{number:05d}.safetensors"
        paths.append(path)
        if path.exists():
            continue
        items = [data[i] for i in range(start, min(start + per_shard, pairs))]
        stack = {key: torch.stack([item[key] for item in items]).numpy() for key in items[0]}
        tensors = {"index": stack["index"].astype(narrow), "distance": stack["distance"]}
        if not seeds_only:
            kind = np.float16 if half else np.float32
            tensors |= {"x": stack["x"].astype(kind), "y": stack["y"].astype(kind)}
        meta = {
            "format": "1", "seed": str(seed), "start": str(start), "n_points": str(n_points),
            "spec": json.dumps({"weights": dict(data.spec.weights), "planar": data.spec.planar,
                                "rotate": data.spec.rotate, "shapes": data.spec.shapes}),
        }  # fmt: skip
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary, metadata=meta)
        os.replace(temporary, path)
    return paths


def read_shard(path: str | Path) -> Iterator[dict[str, Tensor]]:
    """Yield the items of one shard as :class:`~deepemd.data.PairDataset` gives them."""
    with safe_open(path, framework="numpy") as file:
        meta = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    index = torch.from_numpy(tensors["index"].astype(np.int64))
    distance = torch.from_numpy(tensors["distance"])
    made: PairDataset | None = None
    if "x" not in tensors:
        spec = PairSpec(**json.loads(meta["spec"]))
        made = PairDataset(spec, int(meta["n_points"]), int(meta["seed"]))
    for k in range(len(index)):
        if made is not None:
            yield made.pair(int(meta["start"]) + k) | {"index": index[k], "distance": distance[k]}
        else:
            x, y = (torch.from_numpy(tensors[name][k].astype(np.float32)) for name in "xy")
            yield {"x": x, "y": y, "index": index[k], "distance": distance[k]}


def verify_shard(path: str | Path, *, every: int = 1) -> int:
    """Label every ``every``-th pair again and compare; returns how many were checked.

    Raises:
        ValueError: a stored distance differs by more than the rounding of the coordinates allows.
    """
    from deepemd.data.labels import exact_matching

    checked = 0
    for k, item in enumerate(read_shard(path)):
        if k % every:
            continue
        _, distance = exact_matching(item["x"].numpy(), item["y"].numpy())
        # rounding to half precision moves a point of norm at most 1 by less than 2^-11
        if abs(distance - float(item["distance"])) > 2**-10 + 1e-5 * distance:
            raise ValueError(
                f"{path}: pair {k} is labelled {float(item['distance'])}, is {distance}"
            )
        checked += 1
    return checked
