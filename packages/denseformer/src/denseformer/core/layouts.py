"""The two key layouts of the authors' checkpoints, in and out."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from denseformer.core.geometry import Geometry

LAYOUTS = ("alphas", "weights")
_KEY = re.compile(r"(alphas|weights)\.(\d+)\.weight")


def to_reference(spec: Geometry, weight: Tensor, layout: str) -> dict[str, Tensor]:
    """Return packed weights under the authors' keys, each (1, n)."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be 'alphas' or 'weights', got {layout!r}")
    parts = weight.split([len(spec.sources(i)) for i in spec.rows]) if spec.rows else ()
    return {
        f"{layout}.{name}.weight": part.clone().unsqueeze(0)
        for name, part in zip(_names(spec, layout), parts, strict=True)
    }


def _names(spec: Geometry, layout: str) -> list[int]:
    """Return the number of each row in the keys: its block from 0, or just the row's own."""
    return [i - 1 for i in spec.rows] if layout == "alphas" else list(range(len(spec.rows)))


def from_reference(
    spec: Geometry, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]
) -> None:
    """Replace the authors' keys below ``prefix``, if there are any, by ``weight``."""
    layout, found = LAYOUTS[0], dict[int, Tensor]()
    for key in [k for k in state_dict if k.startswith(prefix)]:
        if match := _KEY.fullmatch(key[len(prefix) :]):
            layout = match[1]
            found[int(match[2])] = state_dict.pop(key).reshape(-1)
    if not found:
        return
    sizes = {m: found[m].numel() for m in sorted(found)}
    wanted = {m: len(spec.sources(i)) for m, i in zip(_names(spec, layout), spec.rows, strict=True)}
    if sizes != wanted:
        error_msgs.append(
            f"the stored DWA (authors' layout, '{layout}.N.weight') has rows N of {sizes} weights, this one "
            f"({spec}) of {wanted}"
        )
        return
    state_dict[prefix + "weight"] = torch.cat([found[m] for m in sorted(found)])
    state_dict[prefix + "geometry"] = torch.tensor(spec.code())
