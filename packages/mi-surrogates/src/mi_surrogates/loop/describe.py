"""What a run is recognised by: its simulator and options as plain values that JSON can hold."""

from __future__ import annotations

import functools
import hashlib
import os
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def describe(value: Any) -> Any:
    """Return something stable that JSON can hold and that differs where the value differs.

    Functions are known by their name, arrays by a digest, objects by their type and public attributes.

    Example:
        >>> describe(np.arange(3)) == describe(np.arange(3)) != describe(np.arange(1, 4))
        True
        >>> describe(functools.partial(print, 1, end=""))
        {'function': 'builtins.print', 'arguments': [1], 'keywords': {'end': ''}}
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [describe(each) for each in value]
    if isinstance(value, dict):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, Tensor):
        value = (
            value.detach().cpu().float() if value.dtype == torch.bfloat16 else value.detach().cpu()
        )
        value = value.numpy()
    if isinstance(value, np.ndarray) and value.dtype != object:
        digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return {"array": [str(value.dtype), list(value.shape)], "sha256": digest}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, functools.partial):
        return {
            "function": describe(value.func),
            "arguments": describe(value.args),
            "keywords": describe(value.keywords),
        }
    if callable(value) and hasattr(value, "__qualname__"):
        name = f"{value.__module__}.{value.__qualname__}"
        owner = getattr(value, "__self__", None)
        bound = owner is not None and not isinstance(owner, (ModuleType, type))
        return {"method": name, "of": describe(owner)} if bound else name
    public = {k: v for k, v in getattr(value, "__dict__", {}).items() if not k.startswith("_")}
    if isinstance(value, nn.Module):
        public.update(value.state_dict())
    return {"type": type(value).__qualname__, **describe(public)}
