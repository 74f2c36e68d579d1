"""Which modules are adapted: matching names, and what can and cannot take adapters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from palora.core.layers import original_class

__all__ = ["Selector", "classify", "matches", "rank_of"]

Selector = str | Sequence[str] | Callable[[str, nn.Module], bool]
DEFAULT_KINDS = ("linear", "conv1d-hf", "conv", "attention")


def matches(selector: Selector, name: str, module: nn.Module) -> bool:
    """Whether ``selector`` names the module: by name, by dotted suffix, by regex or by predicate.

    Example:
        >>> matches("fc", "encoder.fc", nn.Identity()), matches(r"enc.*", "decoder", nn.Identity())
        (True, False)
    """
    if isinstance(selector, str):
        if name == selector or name.endswith("." + selector):
            return True
        try:
            return re.fullmatch(selector, name) is not None
        except re.error:
            return False
    if callable(selector):
        return bool(selector(name, module))
    return any(matches(pattern, name, module) for pattern in selector)


def rank_of(rank: int | Mapping[str, int], name: str, module: nn.Module) -> int:
    """The rank for one layer; of a mapping, the first pattern that matches.

    Raises:
        ValueError: no pattern of the mapping matches.
    """
    if not isinstance(rank, Mapping):
        return rank
    for pattern, value in rank.items():
        if matches(pattern, name, module):
            return value
    raise ValueError(
        f"rank gives no value for layer {name!r}; its patterns are {list(rank)} "
        "(the pattern '.*' matches every layer)"
    )


def check_rank(rank: object) -> None:
    """Refuse ranks that are not positive integers.

    Raises:
        ValueError: a rank below 1 or not an int.
    """
    values = list(rank.values()) if isinstance(rank, Mapping) else [rank]
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"rank must be an integer of at least 1, got {value!r}")


def _is_hf_conv1d(module: nn.Module) -> bool:
    names = {(c.__module__.split(".")[0], c.__name__) for c in original_class(module).__mro__}
    return ("transformers", "Conv1D") in names


def is_quantised(module: nn.Module) -> bool:
    """Whether the weight is packed: not a floating-point matrix that could be added to."""
    weight = module._parameters.get("weight", getattr(module, "weight", None))
    return weight is not None and (
        hasattr(weight, "quant_state") or not weight.dtype.is_floating_point
    )


def classify(module: nn.Module) -> tuple[str | None, str]:
    """Return the kind of adapter that ``module`` takes, or None and the reason why not.

    The reason is empty where there is nothing to adapt in the first place.
    """
    original = original_class(module)
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        raise ValueError(
            f"{original.__name__} has no shape yet: run the model once on a batch before inject"
        )
    if isinstance(module, nn.MultiheadAttention):
        if original.forward is not nn.MultiheadAttention.forward:
            return None, "overrides nn.MultiheadAttention.forward"
        return "attention", ""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return None, "transposed convolutions are not supported"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return None, "recurrent layers are not supported"
    if isinstance(module, nn.EmbeddingBag):
        return None, "nn.EmbeddingBag is not supported"
    kinds: list[tuple[str, type[nn.Module]]] = [
        ("linear", nn.Linear),
        ("conv", nn.Conv1d),
        ("conv", nn.Conv2d),
        ("conv", nn.Conv3d),
        ("embedding", nn.Embedding),
    ]
    for kind, base in kinds:
        if isinstance(module, base):
            if is_quantised(module):
                return ("linear", "") if kind == "linear" else (None, "quantised weight")
            if original.forward is not base.forward:
                return None, f"overrides {base.__name__}.forward"
            if module._parameters.get("weight") is None:
                return None, "its weight is computed (parametrised), not a parameter"
            if kind == "embedding" and module.max_norm is not None:
                return None, "max_norm rewrites the table at every look-up"
            return kind, ""
    if _is_hf_conv1d(module):
        return "conv1d-hf", ""
    return None, ""
