"""Where weights come from: state dicts, modules and files behind one small reading interface."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from .errors import UnsupportedDtypeError

StateDict = Mapping[str, Tensor]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLOAT8 = tuple(
    getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name)
)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
# Names that bitsandbytes, GPTQ and AWQ give to packed weights and their scales.
_QUANTISED = (".qweight", ".qzeros", ".absmax", ".quant_map", ".SCB", ".weight_format", ".g_idx")


@dataclass(frozen=True)
class TensorInfo:
    """Dtype and shape of a tensor that has not been read yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


@runtime_checkable
class TensorSource(Protocol):
    """What the engine reads from: headers at once, elements on request."""

    label: str
    """How messages call this source: a path, or the kind of object."""
    tensors: Mapping[str, TensorInfo]
    """All tensors, without their elements."""
    aliases: Mapping[str, str]
    """Names that share the storage of another one, which is the key in `tensors` to read."""
    on_disk: bool
    """Whether reading costs a copy, so that the engine should bring a buffer."""

    def read(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """Return elements start..stop of the flattened tensor, in `buffer` if that is needed."""
        ...

    def close(self) -> None:
        """Release files."""
        ...


Source = StateDict | nn.Module | str | os.PathLike[str]


class MemorySource:
    """A state dict."""

    on_disk = False

    def __init__(
        self, tensors: StateDict, label: str = "state dict", *, shards: bool = False
    ) -> None:
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{label}: {name!r} is a {type(tensor).__name__}, not a tensor")
            if tensor.device.type == "meta":
                raise TypeError(f"{label}: {name!r} is on the meta device and has no values")
            if hasattr(tensor, "to_local") and not shards:
                raise TypeError(
                    f"{label}: {name!r} is a DTensor; pass a full state dict "
                    "(torch.distributed.checkpoint.state_dict), or edit the module with edit_"
                )
        self.label = label
        self._tensors = {name: local_part(tensor.detach()) for name, tensor in tensors.items()}
        self._flat: tuple[str, Tensor] = ("", torch.empty(0))
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(tensor.dtype, tuple(tensor.shape))
            for name, tensor in self._tensors.items()
        }
        self.aliases: Mapping[str, str] = _shared(self._tensors)

    def read(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """Return a view of the elements (a copy if the tensor is not contiguous or not on the CPU)."""
        tensor = self._tensors[name]
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            flat = self._flat  # one copy at a time, shared by threads
            if flat[0] != name:
                flat = self._flat = (name, tensor.cpu().contiguous().view(-1))
            return flat[1][start:stop]
        return tensor.view(-1)[start:stop]

    def close(self) -> None:
        """Nothing to release."""

    def device_of(self, name: str) -> torch.device:
        """Return where a tensor lives."""
        return self._tensors[name].device


class RenamedSource:
    """A source under other names.

    Args:
        inner: the source.
        names: new name -> name in `inner`.
        aliases: further names that share storage, in new names.
    """

    def __init__(
        self, inner: TensorSource, names: Mapping[str, str], aliases: Mapping[str, str]
    ) -> None:
        self.label, self.on_disk = inner.label, inner.on_disk
        self._inner, self._names = inner, names
        back = {old: new for new, old in names.items()}
        self.tensors: Mapping[str, TensorInfo] = {n: inner.tensors[old] for n, old in names.items()}
        own = {back[a]: back[b] for a, b in inner.aliases.items() if a in back and b in back}
        self.aliases: Mapping[str, str] = {**own, **aliases}

    def read(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """Read from the inner source."""
        return self._inner.read(self._names[name], start, stop, buffer)

    def close(self) -> None:
        """Close the inner source."""
        self._inner.close()


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else cast(Tensor, to_local())


def _shared(tensors: StateDict) -> dict[str, str]:
    """Map each tensor that is a view of the same memory as an earlier one to that one's name."""
    seen: dict[tuple[object, ...], str] = {}
    shared = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        first = seen.setdefault(key, name)
        if first != name:
            shared[name] = first
    return shared


def open_source(source: Source | TensorSource, label: str | None = None) -> TensorSource:
    """Return a reader for a state dict, a module, or a path.

    Raises:
        TypeError: anything else.
        CheckpointError: the path cannot be read as a checkpoint.
    """
    if isinstance(source, nn.Module):
        return MemorySource(source.state_dict(), label or type(source).__name__)
    if isinstance(source, (str, os.PathLike)):
        from .io.checkpoint import open_checkpoint

        return open_checkpoint(source)
    if isinstance(source, TensorSource):
        return source
    if isinstance(source, Mapping):
        return MemorySource(source, label or "state dict")
    raise TypeError(
        f"expected a state dict, a module or a path, got {type(source).__name__}; "
        "for an optimizer checkpoint, pass its 'state_dict' entry"
    )


def label_models(
    models: Sequence[Source] | Mapping[str, Source],
) -> tuple[list[str], list[Source]]:
    """Return (keys, sources); a plain sequence gets its positions as keys.

    Raises:
        TypeError: one model where a list of models is meant.
        ValueError: no model at all.
    """
    if isinstance(models, (str, os.PathLike, nn.Module)):
        raise TypeError("models must be a sequence or a mapping of sources; wrap one in a list")
    if isinstance(models, Mapping):
        if models and all(isinstance(value, Tensor) for value in models.values()):
            raise TypeError("models must be a sequence or a mapping of sources; wrap one in a list")
        keys, sources = [str(key) for key in models], list(models.values())
    else:
        sources = list(models)
        keys = [str(i) for i in range(len(sources))]
    if not sources:
        raise ValueError("no model to merge: pass at least one")
    return keys, sources


def check_dtype(name: str, info: TensorInfo, label: str, *, dtype_given: bool) -> None:
    """Raise UnsupportedDtypeError for quantised tensors, and for float8 unless a dtype is given."""
    if name.endswith(_QUANTISED) or ".quant_state." in name:
        raise UnsupportedDtypeError(
            f"{label}: {name!r} belongs to a quantised layer (bitsandbytes, GPTQ, AWQ); "
            "dequantise the checkpoint first"
        )
    if info.dtype in FLOAT8:
        if not dtype_given:
            raise UnsupportedDtypeError(
                f"{label}: {name!r} is {info.dtype}; pass dtype= for the result (e.g. torch.bfloat16), "
                "or dequantise first"
            )
    elif info.dtype not in FLOATS and info.dtype not in INTEGERS:
        raise UnsupportedDtypeError(
            f"{label}: {name!r} is {info.dtype}, which has no merge; dequantise first"
        )


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype that a name stands for.

    Raises:
        ValueError: not one of the floating-point dtypes that a result can have.
    """
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None) or torch.int8
    if dtype is None or dtype in FLOATS:
        return dtype
    allowed = ", ".join(str(float_dtype) for float_dtype in FLOATS)
    raise ValueError(f"dtype must be one of {allowed}, got {dtype}")
