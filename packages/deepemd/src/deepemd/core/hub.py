"""Checkpoints: a folder with ``config.json`` and ``model.safetensors``, bundled or the user's own."""

from __future__ import annotations

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file

from deepemd.core.model import DeepEMD

FORMAT = 1
WEIGHTS = Path(__file__).parents[1] / "weights"
SHA256: dict[str, str] = {
    "tiny": "880df168f2adc0f93b3271321ed6d97661b4fa066c1874d84300b10ffde69c6c",
}


def bundled() -> list[str]:
    """Return the names of the checkpoints inside this package."""
    return sorted(path.parent.name for path in WEIGHTS.glob("*/config.json"))


def save_pretrained(
    model: DeepEMD,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint folder; each file is written under a temporary name and renamed.

    Args:
        model: the network.
        directory: where to, made if missing.
        dtype: of the stored weights (half precision halves the file); None keeps the model's.
        extra: more entries for ``config.json``.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value.detach().cpu().to(dtype or value.dtype).contiguous()
        for name, value in model.state_dict().items()
        if not (model.config["tie_qk"] and name == "head.k.weight")
    }
    temporary = directory / "model.safetensors.tmp"
    save_file(tensors, temporary)
    os.replace(temporary, directory / "model.safetensors")
    config = {
        "format": FORMAT, "model": model.config, "trained_dims": list(model.trained_dims),
        **(extra or {}),
    }  # fmt: skip
    temporary = directory / "config.json.tmp"
    temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, directory / "config.json")
    return directory


def from_pretrained(
    name_or_path: str | Path = "tiny",
    *,
    map_location: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> DeepEMD:
    """Load a bundled checkpoint by name, or a folder; nothing is downloaded.

    Args:
        name_or_path: ``"tiny"``, or a folder written by :func:`save_pretrained`.
        map_location: the device.
        dtype: of the weights in memory.

    Raises:
        KeyError: neither a bundled name nor a folder with a checkpoint.
        ValueError: a newer format, or a bundled file that is not the one that was shipped.

    >>> from_pretrained("tiny").config["width"]
    64
    """
    folder = Path(name_or_path)
    known = str(name_or_path) in bundled()
    if known:
        folder = WEIGHTS / str(name_or_path)
    if not (folder / "config.json").is_file():
        raise KeyError(
            f"unknown checkpoint {str(name_or_path)!r}; bundled are {', '.join(bundled())}, or give a "
            "folder with config.json and model.safetensors"
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["format"] > FORMAT:
        raise ValueError(
            f"{folder} has checkpoint format {config['format']}, this version reads up to {FORMAT}: "
            "upgrade deepemd"
        )
    content = (folder / "model.safetensors").read_bytes()
    if known and (digest := hashlib.sha256(content).hexdigest()) != SHA256.get(str(name_or_path)):
        raise ValueError(f"{folder} is damaged: SHA-256 {digest}; reinstall deepemd")
    model = DeepEMD(**config["model"])
    tensors = load(content)
    if model.config["tie_qk"]:
        tensors["head.k.weight"] = tensors["head.q.weight"]
    model.load_state_dict(tensors)
    model.trained_dims = tuple(config["trained_dims"])
    return model.to(device=map_location, dtype=dtype).eval()


@lru_cache(maxsize=8)
def cached(name: str, device: str) -> DeepEMD:
    """Return a checkpoint that is loaded once per device, for :func:`deepemd.emd`."""
    return from_pretrained(name, map_location=device).requires_grad_(False)
