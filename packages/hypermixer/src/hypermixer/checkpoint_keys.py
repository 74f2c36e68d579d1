"""The parameter names of the two public implementations, and ours.

ours                     authors' code and SpeechBrain
w1.fc1_weight (H, h, f)  hyper.w1_gen.fc1_weights
w1.fc1_bias   (H, h)     hyper.w1_gen.fc1_biases
w1.fc2_weight (H, k, h)  hyper.w1_gen.fc2_weights
w1.fc2_bias   (H, k)     hyper.w1_gen.fc2_biases
w2.*  (none when tied)   hyper.w2_gen.*  (duplicates of w1_gen when tied)
norm.weight, norm.bias   layer_norm.weight, layer_norm.bias
(none: it is computed)   token_information.pe, positional_encoding.pe
"""

from __future__ import annotations

import torch
from torch import Tensor

TABLES = ("token_information.pe", "positional_encoding.pe")
RENAMED = {
    **{
        f"hyper.w{i}_gen.fc{j}_{kind}": f"w{i}.fc{j}_{ours}"
        for i in (1, 2)
        for j in (1, 2)
        for kind, ours in (("weights", "weight"), ("biases", "bias"))
    },
    "layer_norm.weight": "norm.weight",
    "layer_norm.bias": "norm.bias",
}


def rename_reference_keys(state_dict: dict[str, Tensor], prefix: str = "") -> None:
    """Give the reference names under a prefix our names, in place; drop the position tables."""
    for theirs, ours in RENAMED.items():
        if prefix + theirs in state_dict:
            state_dict[prefix + ours] = state_dict.pop(prefix + theirs)
    for table in TABLES:
        state_dict.pop(prefix + table, None)


def is_reference(state_dict: dict[str, Tensor], prefix: str = "") -> bool:
    """Tell whether a layer's parameters have the reference names."""
    return f"{prefix}hyper.w1_gen.fc1_weights" in state_dict


def second_repeats_first(state_dict: dict[str, Tensor], prefix: str = "") -> bool:
    """Tell whether every w2 entry (in our names) is absent or equal to its w1 entry."""
    firsts = [name for name in state_dict if name.startswith(f"{prefix}w1.")]
    for first in firsts:
        second = state_dict.get(f"{prefix}w2.{first[len(prefix) + 3 :]}")
        if second is not None and not torch.equal(second, state_dict[first]):
            return False
    return True


def drop_second(state_dict: dict[str, Tensor], prefix: str = "") -> None:
    """Remove the w2 entries, in place."""
    for name in [n for n in state_dict if n.startswith(f"{prefix}w2.")]:
        del state_dict[name]
