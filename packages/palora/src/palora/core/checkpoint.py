"""State dicts and files: adapters alone, plain checkpoints into injected models, save and load."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from palora.core.inject import adapted_layers, inject
from palora.core.layers import Switched
from palora.core.preference import Active, PreferenceState, as_preference, state_of

__all__ = [
    "Overhead",
    "adapter_state_dict",
    "load",
    "load_adapter_state_dict",
    "load_base_state_dict",
    "overhead",
    "save",
]

CONFIG, WEIGHTS = "palora_config.json", "palora.safetensors"
# what a model and the file that it loads must have in common: as a whole, and layer by layer
_SAME = ("tasks", "rank", "alpha", "scaling", "conv", "qkv", "targets")
_SAME_LAYER = ("kind", "mode", "rank", "scale", "exponent")


def is_adapter_key(key: str) -> bool:
    """Whether a state-dict key names one of the two adapter tensors."""
    return key.rpartition(".")[2] in ("palora_A", "palora_B")


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapters alone, ``<layer>.palora_A`` and ``<layer>.palora_B``.

    Raises:
        RuntimeError: the model is not injected.
    """
    state_of(model)
    return {k: v for k, v in model.state_dict().items() if is_adapter_key(k)}


def load_adapter_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True
) -> None:
    """Load what :func:`adapter_state_dict` returned.

    Raises:
        ValueError: the adapters were made for other tasks, rank or mode (both shapes are named);
            with ``strict`` also for missing or unknown layers.
        RuntimeError: the model is not injected.
    """
    own = adapter_state_dict(model)
    missing, unknown = sorted(own.keys() - state_dict), sorted(state_dict.keys() - own)
    if strict and (missing or unknown):
        raise ValueError(f"adapters do not fit: missing {missing}, unknown {unknown}")
    shared = own.keys() & state_dict.keys()
    for key in sorted(shared):
        if own[key].shape != state_dict[key].shape:
            raise ValueError(
                f"{key}: the model has (tasks, ...) {tuple(own[key].shape)}, the file "
                f"{tuple(state_dict[key].shape)}: other tasks, rank or convolution mode"
            )
    model.load_state_dict({k: state_dict[k] for k in shared}, strict=False)


def load_base_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load a plain checkpoint into an injected model, strictly; the adapters stay as they are.

    Raises:
        RuntimeError: PyTorch's own, for missing, unexpected or misshapen keys.
    """
    model.load_state_dict({**adapter_state_dict(model), **state_dict}, strict=True)


@dataclass
class Overhead:
    """Parameters added by the adapters.

    Attributes:
        base: parameters of the plain model.
        adapters: parameters added.
        ratio: adapters / base.
        vs_pamal: how many times less is added than by T copies of the model.
    """

    base: int
    adapters: int
    ratio: float
    vs_pamal: float


def overhead(model: nn.Module) -> Overhead:
    """Count the parameters that injection added.

    Raises:
        RuntimeError: the model is not injected.

    Example:
        >>> net = inject(nn.Linear(100, 100), 2, rank=1)
        >>> found = overhead(net)
        >>> found.base, found.adapters, found.vs_pamal
        (10100, 400, 25.25)
    """
    tasks = len(state_of(model).tasks)
    counts = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        counts[is_adapter_key(name)] += parameter.numel()
    base, adapters = counts[False], counts[True]
    ratio = adapters / base if base else float("inf")
    return Overhead(base, adapters, ratio, (tasks - 1) / ratio)


def _safetensors() -> Any:
    try:
        import safetensors.torch as st
    except ImportError as error:
        raise ImportError(
            'saving and loading files needs safetensors: pip install "palora[safetensors]"'
        ) from error
    return st


def atomically(path: Path, write: Callable[[str], None]) -> None:
    """Call ``write`` on a temporary name beside ``path`` and rename the result to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    try:
        write(name)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    atomically(path, lambda name: _write_text(name, text))


def _write_text(name: str, text: str) -> None:
    Path(name).write_text(text + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically; tied tensors are written once for each key."""
    st = _safetensors()
    flat = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    atomically(path, lambda name: st.save_file(flat, name, metadata=metadata))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ValueError: it is damaged, or no such file.
        OSError: there is none.
    """
    st = _safetensors()
    try:
        found: dict[str, Tensor] = st.load_file(str(path))
    except OSError:
        raise
    except Exception as error:  # the library's own kind derives from Exception alone
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    return found


def config_of(model: nn.Module) -> dict[str, Any]:
    """The configuration written by :func:`save`: the arguments of inject and the layers' kinds."""
    state = state_of(model)
    layers = {}
    names = {id(layer) for _, layer in adapted_layers(model)}
    # a module used under two names has two keys in the state dict: both are listed
    for name, layer in model.named_modules(remove_duplicate=False):
        if id(layer) not in names:
            continue
        s: Any = layer._palora_spec
        layers[name] = {
            "kind": s.kind,
            "mode": s.mode,
            "rank": s.rank,
            "scale": s.scale,
            "dropout": s.dropout,
            "path": s.path,
            "exponent": s.exponent,
        }
    preset = None if state.default is None else state.default.value
    default = None if preset is None else preset.tolist()
    return {**state.config, "default": default, "layers": layers}


def save(model: nn.Module, dir: str | os.PathLike[str], *, base: bool | None = None) -> None:
    """Write ``palora_config.json`` and ``palora.safetensors`` to a folder.

    Args:
        model: an injected model.
        dir: the folder; made if absent.
        base: also write the base weights and buffers; None: if they are trained
            (``train_base``).

    Raises:
        RuntimeError: the model is not injected.
        ImportError: safetensors is not installed.
    """
    config = config_of(model)
    tensors: Mapping[str, Tensor] = adapter_state_dict(model)
    if config["train_base"] if base is None else base:
        tensors = model.state_dict()
    folder = Path(dir)
    write_tensors(folder / WEIGHTS, tensors, {"palora_config": json.dumps(config)})
    write_json(folder / CONFIG, config)


def read_config(dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Read ``palora_config.json``.

    Raises:
        ValueError: it has another format version, or lacks an entry.
        OSError: there is none.
    """
    config: Any = json.loads((Path(dir) / CONFIG).read_text(encoding="utf-8"))
    version = config.get("format") if isinstance(config, dict) else None
    if version != 1:
        raise ValueError(f"{CONFIG} has format {version!r}; this version reads 1")
    if missing := [key for key in (*_SAME, "train_base", "layers") if key not in config]:
        raise ValueError(f"{CONFIG} has no entry {', '.join(missing)}")
    found: dict[str, Any] = config
    return found


def load(model: nn.Module, dir: str | os.PathLike[str]) -> nn.Module:
    """Load a folder written by :func:`save` into ``model`` (injecting it first if it is plain).

    Returns:
        The same object.

    Raises:
        ValueError: the model was injected with other tasks, rank, mode, scale or targets (both
            named), or a file is damaged.
    """
    config = read_config(dir)
    tensors = read_tensors(Path(dir) / WEIGHTS)
    if not any(isinstance(m, Switched) for m in model.modules()):
        inject(
            model,
            config["tasks"],
            rank={
                f"(?:{re.escape(name)})": layer["rank"] for name, layer in config["layers"].items()
            }
            | {".*": 1},
            alpha=config["alpha"],
            scaling=config["scaling"],
            target=lambda name, module: name in config["targets"],
            conv=config["conv"],
            qkv=config["qkv"],
            train_base=config["train_base"],
        )
        _restore(model, state_of(model), config)
    here = config_of(model)
    for key in _SAME:
        if here[key] != config[key]:
            raise ValueError(f"{key} is {here[key]!r} in the model and {config[key]!r} in {dir}")
    for name, layer in here["layers"].items():
        for key in _SAME_LAYER:
            there = config["layers"].get(name, layer)[key]
            if layer[key] != there:
                raise ValueError(
                    f"{key} of layer {name!r} is {layer[key]!r} in the model and {there!r} in {dir}"
                )
    adapters = {k: v for k, v in tensors.items() if is_adapter_key(k)}
    load_adapter_state_dict(model, adapters)
    if len(adapters) < len(tensors):
        model.load_state_dict(tensors, strict=True)
    return model


def _restore(model: nn.Module, state: PreferenceState, config: dict[str, Any]) -> None:
    """Give every layer the options it was saved with."""
    state.config = {k: v for k, v in config.items() if k not in ("layers", "default")}
    if config.get("default") is not None:
        state.default = Active(as_preference(config["default"], state.tasks))
    for name, layer in adapted_layers(model):
        for key in ("dropout", "path", "exponent", "scale"):
            setattr(layer._palora_spec, key, config["layers"][name][key])
