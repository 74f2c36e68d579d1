"""Reading HyperMixing parameters as the authors' code and SpeechBrain save them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hypermixer._checks import one_of
from hypermixer.checkpoint_keys import (
    drop_second,
    is_reference,
    rename_reference_keys,
    second_repeats_first,
)
from hypermixer.mixing import HyperMixing

_STYLES = {"idiap": "idiap", "speechbrain": "sinusoidal"}


def _sizes(state_dict: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """Return HyperMixing's arguments for parameters under our names."""
    heads, hidden, width = state_dict[f"{prefix}w1.fc1_weight"].shape
    return {
        "embed_dim": heads * width,
        "hidden_dim": heads * state_dict[f"{prefix}w1.fc2_weight"].shape[1],
        "num_heads": heads,
        "hypernet_dim": heads * hidden,
        "bias": f"{prefix}w1.fc1_bias" in state_dict,
        "tied": not any(name.startswith(f"{prefix}w2.") for name in state_dict),
        "norm": f"{prefix}norm.weight" in state_dict,
    }


def from_reference(
    state_dict: Mapping[str, Tensor],
    num_heads: int | None = None,
    style: Literal["idiap", "speechbrain"] = "idiap",
    *,
    prefix: str = "",
    **options: Any,
) -> HyperMixing:
    """Make a layer with the sizes, options and parameters of a public checkpoint.

    Heads, widths, biases, LayerNorm and tying are read off the tensors: a checkpoint whose second
    hypernetwork repeats the first is tied. A checkpoint made with "full" heads
    (``fix_tm_hidden_size``) gives the same function as a split layer with H times the width.

    Args:
        state_dict: of the authors' ``HyperMixing`` ("idiap") or SpeechBrain's.
        num_heads: checked against the tensors when given.
        style: which implementation, which settles the positions.
        prefix: of the layer's names, such as ``"encoder.layers.0.mha_layer."``.
        options: further arguments of :class:`hypermixer.HyperMixing`.

    Raises:
        ValueError: for an unknown style or another number of heads.
        KeyError: where the parameters are not there.
    """
    one_of("style", style, tuple(_STYLES))
    own = {name[len(prefix) :]: t for name, t in state_dict.items() if name.startswith(prefix)}
    rename_reference_keys(own)
    if "w1.fc1_weight" not in own:
        raise KeyError(f"no HyperMixing parameters such as {prefix}hyper.w1_gen.fc1_weights")
    heads = own["w1.fc1_weight"].shape[0]
    if num_heads is not None and num_heads != heads:
        raise ValueError(f"num_heads={num_heads}, but the checkpoint has {heads} heads")
    if second_repeats_first(own):
        drop_second(own)
    sizes = {**_sizes(own), "token_info": _STYLES[style], "dtype": own["w1.fc1_weight"].dtype}
    layer = HyperMixing(**{**sizes, **options})
    layer.load_state_dict(own)
    return layer


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from *.safetensors, or from a torch file (weights only).

    Raises:
        ValueError: for a file that holds no tensors by name.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what unpickling raises on other files is of many kinds
        raise ValueError(f"{path} is no torch checkpoint of tensors: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ValueError(  # noqa: TRY004 - the file is wrong, not its type
            f"{path} holds a {type(content).__name__}, not a state dict"
        )
    return {name: t for name, t in content.items() if isinstance(t, Tensor)}


def _prefixes(state_dict: Mapping[str, Tensor]) -> list[str]:
    ends = ("hyper.w1_gen.fc1_weights", "w1.fc1_weight")
    return [n[: -len(end)] for n in state_dict for end in ends if n.endswith(end)]


def layer_sizes(path: str | Path) -> dict[str, dict[str, Any]]:
    """Return the arguments of every HyperMixing layer in a checkpoint, by the layer's name.

    Raises:
        ValueError: where there is none.
    """
    state_dict = load_tensors(path)
    sizes = {}
    for prefix in _prefixes(state_dict):
        if is_reference(state_dict, prefix):
            rename_reference_keys(state_dict, prefix)
            if second_repeats_first(state_dict, prefix):
                drop_second(state_dict, prefix)
        sizes[prefix.rstrip(".") or "layer"] = _sizes(state_dict, prefix)
    if not sizes:
        raise ValueError(f"{path} has no HyperMixing parameters")
    return sizes


def convert_checkpoint(source: str | Path, target: str | Path) -> dict[str, Any]:
    """Rename the reference names of every HyperMixing layer in a file; other tensors are kept.

    Second hypernetworks that repeat the first are left out. The target is written under a temporary
    name and renamed.

    Args:
        source: ``*.safetensors`` or a torch file.
        target: ``*.safetensors``, or ``*.pt`` and the like for torch's format.

    Returns:
        ``{"layers": {name: num_heads}}``.

    Raises:
        ValueError: where there is no layer with reference names.
    """
    state_dict = load_tensors(source)
    layers = {}
    for prefix in _prefixes(state_dict):
        if is_reference(state_dict, prefix):
            rename_reference_keys(state_dict, prefix)
            if second_repeats_first(state_dict, prefix):
                drop_second(state_dict, prefix)
            heads = state_dict[f"{prefix}w1.fc1_weight"].shape[0]
            layers[prefix.rstrip(".") or "layer"] = heads
    if not layers:
        raise ValueError(f"{source} has no parameters such as hyper.w1_gen.fc1_weights")
    target = Path(target)
    temporary = target.with_name(target.name + ".tmp")
    if target.suffix == ".safetensors":
        save_file({name: t.contiguous().clone() for name, t in state_dict.items()}, temporary)
    else:
        torch.save(state_dict, temporary)
    os.replace(temporary, target)
    return {"layers": layers}
