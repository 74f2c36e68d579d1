"""Whether base and models fit together: names, shapes and dtypes, before anything is read."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

from .cells import Entry
from .errors import KeyMismatchError, ShapeMismatchError, SkippedTensorsWarning
from .sources import FLOAT8, FLOATS, TensorInfo, TensorSource, check_dtype

_EMBEDDING = {
    "embed_tokens",
    "tok_embeddings",
    "word_embeddings",
    "token_embedding",
    "wte",
    "shared",
}
_EMBEDDING |= {"lm_head", "embed_in", "embed_out"}
_ADAPTER = re.compile(r"(?:^|\.)lora_(?:embedding_)?[AB](?:\.|$)")


@dataclass
class Aligned:
    """Tensors to work on, sorted by name; what a model lacks, and what only a model has.

    `aliases` are the base's ties that every model shares: those tensors are worked on once.
    """

    entries: dict[str, Entry]
    aliases: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    extra: dict[str, list[str]] = field(default_factory=dict)


def align(
    base: TensorSource,
    models: Sequence[TensorSource],
    *,
    strict: bool,
    vocab: str | None,
    dtype_given: bool,
) -> Aligned:
    """Compare the tensors of base and models.

    Raises:
        KeyMismatchError: missing or extra tensors, with `strict`.
        ShapeMismatchError: other shapes, rows of embeddings with `vocab="base"` aside.
        UnsupportedDtypeError: quantised tensors; float8 without a dtype for the result.
        ValueError: another word for `vocab`.
    """
    if vocab not in {None, "base"}:
        raise ValueError(f"vocab must be None or 'base', got {vocab!r}")
    result = Aligned({})
    wanted = base.tensors
    for source in [base, *models]:
        for name, info in source.tensors.items():
            check_dtype(name, info, source.label, dtype_given=dtype_given)
            if _ADAPTER.search(name):
                raise ValueError(
                    f"{source.label}: {name!r} is a factor of an adapter; merging the factors apart is "
                    "not merging their products: pass lines_merge.adapted(base, adapter) instead, or "
                    "the state dict after PEFT's merge_and_unload"
                )
    aliases = {
        alias: name
        for alias, name in base.aliases.items()
        if all(_tied(model, alias, name) for model in models)
    }
    result.aliases = aliases
    for source in models:
        # a tied tensor may be stored under one of its names only
        missing = [n for n in wanted if n not in source.tensors and n not in aliases]
        extra = [n for n in source.tensors if n not in wanted and n not in source.aliases]
        if strict and (missing or extra):
            raise KeyMismatchError(
                f"{source.label} does not have the tensors of the base: "
                f"missing {_some(missing)}; extra {_some(extra)}; "
                "strict=False keeps base values for the missing and drops the extra ones"
            )
        if missing:
            result.skipped[source.label] = missing
        if extra:
            result.extra[source.label] = extra
    if result.skipped:
        text = "; ".join(f"{label}: {_some(names)}" for label, names in result.skipped.items())
        warnings.warn(f"kept from the base: {text}", SkippedTensorsWarning, stacklevel=6)
    absent = {name for names in result.skipped.values() for name in names}
    result.entries = {
        name: _entry(name, wanted[name], base, models, vocab, absent=name in absent)
        for name in sorted(wanted)
        if name not in aliases
    }
    return result


def _tied(model: TensorSource, alias: str, name: str) -> bool:
    """Whether a tie of the base holds in a model, which may store one of the two names only."""
    if alias not in model.tensors or name not in model.tensors:
        return True
    return model.aliases.get(alias, alias) == model.aliases.get(name, name)


def _entry(
    name: str,
    info: TensorInfo,
    base: TensorSource,
    models: Sequence[TensorSource],
    vocab: str | None,
    *,
    absent: bool,
) -> Entry:
    if absent:
        return Entry(name, info, merged=False)
    limits = []
    for source in models:
        other = source.tensors[name]
        limits.append(info.numel)
        if other.shape == info.shape:
            continue
        rows_only = (
            vocab == "base"
            and len(info.shape) == len(other.shape) == 2
            and info.shape[1] == other.shape[1]
            and any(part in _EMBEDDING for part in name.split("."))
        )
        if not rows_only:
            raise ShapeMismatchError(
                f"{name!r} has shape {info.shape} in {base.label} and {other.shape} in "
                f"{source.label}; vocab='base' accepts embeddings with other numbers of rows"
            )
        limits[-1] = min(info.numel, other.numel)
    return Entry(name, info, info.dtype in FLOATS + FLOAT8, tuple(limits))


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:10])
    return f"[{shown}{', ...' if len(names) > 10 else ''}] ({len(names)})"
