"""LoRA adapters as models: the base plus the products of their factors, computed row by row."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError, KeyMismatchError, ShapeMismatchError
from .sources import FLOATS, Source, TensorInfo, TensorSource, open_source

_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?:\.weight)?$")
_PREFIX = "base_model.model."


class _Product:
    """The update of one weight, `scaling * B A`, in the weight's own layout."""

    def __init__(
        self, first: Tensor, second: Tensor, scaling: float, shape: tuple[int, ...]
    ) -> None:
        """Take A (rank, in, ...) and B (out, rank, ...)."""
        self._right = first.flatten(1).double()
        self._left = second.flatten(1).double() * scaling
        self.shape = shape

    def transposed(self) -> _Product:
        """Swap input and output (embeddings, and `fan_in_fan_out`)."""
        self._left, self._right = self._right.t(), self._left.t()
        return self

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self._left.shape[0] * self._right.shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        """Return elements start..stop of the flattened update; only their rows are computed."""
        width = self._right.shape[1]
        first, last = start // width, -(-stop // width)
        block = (self._left[first:last] @ self._right).view(-1)
        return block[start - first * width : stop - first * width]


class AdapterSource:
    """A base with a LoRA adapter baked in, read like any model; see `adapted`."""

    on_disk = False

    def __init__(
        self,
        base: TensorSource,
        label: str,
        updates: Mapping[str, _Product],
        replaced: Mapping[str, Tensor],
    ) -> None:
        self.label = label
        self._base, self._updates, self._replaced = base, dict(updates), dict(replaced)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(self._dtype(name, info.dtype), info.shape)
            for name, info in base.tensors.items()
        }
        # a tie holds unless one of the two names changes
        changed = {*updates, *replaced}
        self.aliases: Mapping[str, str] = {
            a: b for a, b in base.aliases.items() if a not in changed and b not in changed
        }

    def _dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        if name in self._replaced:
            return self._replaced[name].dtype
        return torch.promote_types(dtype, torch.float32) if name in self._updates else dtype

    def read(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """Return elements start..stop: base plus product, in float32 (float64 for such a base)."""
        if name in self._replaced:
            return self._replaced[name].reshape(-1)[start:stop]
        stored = self._base.aliases.get(name, name)
        values = self._base.read(stored, start, stop)
        if name in self._updates:
            total = values.double() + self._updates[name].rows(start, stop)
            return total.to(self.tensors[name].dtype)
        return values

    def close(self) -> None:
        """Close the base."""
        self._base.close()


def adapted(
    base: Source, adapter: str | os.PathLike[str] | Mapping[str, Tensor], **config: Any
) -> AdapterSource:
    r"""Return a model for `edit`, `merge` and `merge_files`: the base with a LoRA adapter baked in.

    Every adapted weight is :math:`W_0 + s B A`, so that task vectors are the *products* (merging the
    factors A and B apart adds cross terms). The product is computed for the rows that are read, in
    float64, rounded once to float32; nothing of the size of the model is held.

    Args:
        base: the weights that the adapter was trained on.
        adapter: PEFT's folder (adapter_config.json and adapter_model.safetensors), or its state dict.
        **config: entries that replace those of the config; with a state dict `lora_alpha` is needed, and
            `use_rslora`, `fan_in_fan_out`, `rank_pattern`, `alpha_pattern` where they were used.

    Raises:
        CheckpointError: the folder cannot be read.
        ValueError: not LoRA, or a variant (DoRA) whose update is no product.
        KeyMismatchError: a factor without its partner, or a weight that the base lacks.
        ShapeMismatchError: a product that does not fit its weight.

    Example:
        >>> base = {"blocks.0.q.weight": torch.zeros(2, 2), "blocks.1.q.weight": torch.zeros(2, 2)}
        >>> name = "base_model.model.blocks.1.q.lora_{}.weight"
        >>> factors = {name.format("A"): torch.tensor([[1.0, 2.0]]), name.format("B"): torch.ones(2, 1)}
        >>> model = adapted(base, factors, lora_alpha=3)
        >>> from lines_merge import TaskVector
        >>> TaskVector(base, model)["blocks.1.q.weight"]
        tensor([[3., 6.],
                [3., 6.]])
    """
    reader = open_source(base, "base")
    label, tensors, settings = _load(adapter)
    settings.update(config)
    _refuse_variants(settings, tensors)
    factors: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    embeddings: set[str] = set()
    for key, value in tensors.items():
        plain = key.removeprefix(_PREFIX).replace(".default", "")
        match = _FACTOR.match(plain)
        if match is None:
            replaced[_in_base(plain.replace(".modules_to_save", ""), reader)] = value.detach().cpu()
            continue
        factors.setdefault(match["module"], {})[match["side"]] = value.detach().cpu()
        if match["kind"]:
            embeddings.add(match["module"])
    updates: dict[str, _Product] = {}
    for module, pair in factors.items():
        if set(pair) != {"A", "B"}:
            raise KeyMismatchError(f"{label}: {module!r} has only the factor {', '.join(pair)}")
        name = _in_base(f"{module}.weight", reader)
        info = reader.tensors[name]
        scaling = _scaling(module, pair["A"].shape[0], settings)
        product = _Product(pair["A"], pair["B"], scaling, info.shape)
        if module in embeddings or settings.get("fan_in_fan_out"):
            product = product.transposed()
        if product.numel != info.numel or info.dtype not in FLOATS:
            raise ShapeMismatchError(
                f"{label}: the product of {module!r} has {product.numel} elements, {name!r} of "
                f"{reader.label} is {info.shape}, {info.dtype}"
            )
        updates[name] = product
    for name, value in replaced.items():
        if tuple(value.shape) != reader.tensors[name].shape:
            raise ShapeMismatchError(
                f"{label}: {name!r} has shape {tuple(value.shape)}, in {reader.label} "
                f"{reader.tensors[name].shape}"
            )
    return AdapterSource(reader, label, updates, replaced)


def _load(
    adapter: str | os.PathLike[str] | Mapping[str, Tensor],
) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Return a label, the tensors and the config."""
    if isinstance(adapter, Mapping):
        return "adapter", dict(adapter), {}
    from .io.checkpoint import open_checkpoint

    folder = Path(adapter)
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no readable adapter_config.json: {error}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{folder}: adapter_config.json holds no table")
    for weights in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / weights).exists():
            source = open_checkpoint(folder / weights)
            tensors = {
                name: source.read(name, 0, info.numel).clone().view(info.shape)
                for name, info in source.tensors.items()
            }
            source.close()
            return str(folder), tensors, settings
    raise CheckpointError(f"{folder}: holds no adapter_model.safetensors")


def _refuse_variants(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    kind = settings.get("peft_type", "LORA")
    if str(kind).rpartition(".")[2] != "LORA":
        raise ValueError(f"only LoRA adapters are baked in, this one is {kind}")
    dora = settings.get("use_dora") or any("lora_magnitude_vector" in name for name in tensors)
    if dora:
        raise ValueError("a DoRA adapter is not a product of factors: use PEFT's merge_and_unload")


def _in_base(name: str, base: TensorSource) -> str:
    if name not in base.tensors:
        raise KeyMismatchError(f"{base.label} lacks {name!r}, which the adapter changes")
    return name


def _scaling(module: str, rank: int, settings: Mapping[str, Any]) -> float:
    """Return alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA; patterns name single modules."""
    if "lora_alpha" not in settings:
        raise ValueError("lora_alpha is needed: pass lora_alpha=, it is not in the tensors")
    alpha = settings["lora_alpha"]
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
