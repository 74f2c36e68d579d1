"""Replacing attention and static token mixing in a model by HyperMixing, in place."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hypermixer.adapters.modules import (
    HuggingFaceAttention,
    MixedTokens,
    SpeechBrainAttention,
    TimmAttention,
)
from hypermixer.attention import HyperMixingAttention
from hypermixer.layers import HyperConformerLayer, HyperMixerEncoderLayer
from hypermixer.mixing import HyperMixing

Which = str | Callable[[str, nn.Module], bool] | None

_TIMM_RELATIVE = "its relative-position bias or rotation acts on pairs of tokens"
_HF_SELF = re.compile(
    r"(Bert|Roberta|XLMRoberta|Electra|ViT|Camembert|Data2VecText|DeiT)(Sdpa)?SelfAttention"
)
_HF_WHOLE = ("ViTAttention", "DeiTAttention")
_OURS = (
    HyperMixing,
    HyperMixingAttention,
    HyperMixerEncoderLayer,
    HyperConformerLayer,
    HuggingFaceAttention,
    MixedTokens,
    SpeechBrainAttention,
    TimmAttention,
)


@dataclass
class Report:
    """What :func:`convert` did; prints as a table.

    Attributes:
        model: the model, changed in place.
        replaced: (name, class) of every module that HyperMixing took the place of.
        skipped: (name, class, reason) of every token mixer that was left.
    """

    model: nn.Module
    replaced: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    _originals: dict[str, nn.Module] = field(default_factory=dict, repr=False)
    _flags: list[tuple[nn.TransformerEncoder, bool, bool]] = field(default_factory=list, repr=False)

    def restore(self) -> nn.Module:
        """Put the original modules back and return the model."""
        for name, module in self._originals.items():
            _set(self.model, name, module)
        for encoder, nested, enabled in self._flags:
            encoder.use_nested_tensor, encoder.enable_nested_tensor = nested, enabled
        self.replaced, self._originals, self._flags = [], {}, []
        return self.model

    def __str__(self) -> str:
        """Return the table."""
        lines = [f"replaced {len(self.replaced)}, skipped {len(self.skipped)}"]
        lines += [f"  replaced  {name} ({kind})" for name, kind in self.replaced]
        lines += [f"  skipped   {name} ({kind}): {why}" for name, kind, why in self.skipped]
        return "\n".join(lines)


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _chosen(which: Which, name: str, module: nn.Module) -> bool:
    if which is None:
        return True
    if callable(which):
        return which(name, module)
    return re.search(which, name) is not None


class _Surgeon:
    """Decides for each module whether and how it is replaced."""

    def __init__(self, num_heads: int | None, hidden_dim: int | None, options: dict[str, Any]):
        self.num_heads, self.hidden_dim, self.options = num_heads, hidden_dim, options
        self.tied = bool(options.get("tied", False))

    def _factory(self, module: nn.Module) -> dict[str, Any]:
        parameter = next(module.parameters())
        return {"device": parameter.device, "dtype": parameter.dtype, **self.options}

    def mixing(self, module: nn.Module, dim: int, heads: int, **extra: Any) -> HyperMixing:
        """Return a layer for a module's width, on its device and in its dtype."""
        heads = self.num_heads or heads
        return HyperMixing(dim, self.hidden_dim, heads, **{**self._factory(module), **extra})

    def torch_attention(
        self, module: nn.MultiheadAttention, *, surely_self: bool
    ) -> HyperMixingAttention | str:
        """Return the replacement of nn.MultiheadAttention, or why there is none."""
        dim = module.embed_dim
        if (module.kdim, module.vdim) != (dim, dim):
            return "cross-attention: its keys or values have another width"
        if self.tied and not surely_self:
            return "it may be cross-attention, which tied=True cannot do"
        return HyperMixingAttention(
            dim,
            self.num_heads or module.num_heads,
            self.hidden_dim,
            batch_first=module.batch_first,
            **self._factory(module),
        )

    def replace(self, name: str, module: nn.Module, parent: nn.Module) -> nn.Module | str | None:
        """Return the replacement, the reason for leaving a token mixer, or None for other modules."""
        kind, home = type(module).__name__, type(module).__module__
        if isinstance(module, nn.MultiheadAttention):
            if isinstance(parent, nn.TransformerDecoderLayer):
                return "a decoder's: causal self-attention or cross-attention"
            surely_self = isinstance(parent, nn.TransformerEncoderLayer)
            return self.torch_attention(module, surely_self=surely_self)
        if type(parent).__name__ == "MixerBlock" and name.endswith("mlp_tokens"):
            return MixedTokens(self.mixing(module, _norm_width(parent), 1))
        if home.startswith("timm."):
            return self._timm(module, kind)
        if home.startswith("transformers."):
            return self._transformers(module, kind)
        if home.startswith("speechbrain."):
            return self._speechbrain(module, kind)
        return "an attention class that is not known" if kind.endswith("Attention") else None

    def _timm(self, module: Any, kind: str) -> nn.Module | str | None:
        if not kind.endswith("Attention") and kind != "AttentionRope":
            return None
        if getattr(module, "relative_position_bias_table", None) is not None:
            return _TIMM_RELATIVE
        if kind == "Attention" and hasattr(module, "qkv") and hasattr(module, "head_dim"):
            if module.proj.out_features != module.qkv.in_features:
                return "its output has another width than its input"
            dim = module.qkv.in_features
            return TimmAttention(self.mixing(module, dim, module.num_heads))
        if kind in ("WindowAttention", "AttentionRope", "RelPosAttention"):
            return _TIMM_RELATIVE
        return "an attention class that is not known"

    def _transformers(self, module: Any, kind: str) -> nn.Module | str | None:
        if _HF_SELF.fullmatch(kind) or (kind in _HF_WHOLE and hasattr(module, "q_proj")):
            if getattr(module, "is_decoder", False) or getattr(module, "is_causal", False):
                return "a decoder's: causal self-attention"
            if getattr(module, "position_embedding_type", "absolute") != "absolute":
                return "its relative positions act on pairs of tokens"
            first = getattr(module, "query", None) or module.q_proj
            return HuggingFaceAttention(
                self.mixing(module, first.in_features, module.num_attention_heads)
            )
        if kind.endswith("CrossAttention"):
            return "cross-attention between encoder and decoder"
        if kind.startswith("Disentangled"):
            return "its relative positions act on pairs of tokens"
        if kind.endswith("Attention") and not _wraps_attention(module):
            return "an attention class that is not known"
        return None

    def _speechbrain(self, module: Any, kind: str) -> nn.Module | str | None:
        if kind == "MultiheadAttention":
            inner = module.att
            return SpeechBrainAttention(self.mixing(module, inner.embed_dim, inner.num_heads))
        if kind.startswith(("RelPos", "RoPE")):
            return "its relative positions act on pairs of tokens"
        return "an attention class that is not known" if kind.endswith("Attention") else None


def _wraps_attention(module: nn.Module) -> bool:
    """Tell whether a module only holds the attention proper, with an output layer around it."""
    return any(
        type(child).__name__.endswith("Attention") or isinstance(child, HuggingFaceAttention)
        for child in module.children()
    )


def _norm_width(block: Any) -> int:
    width: int = block.norm1.normalized_shape[0]
    return width


def convert(
    model: nn.Module,
    num_heads: int | None = None,
    hidden_dim: int | None = None,
    which: Which = None,
    **options: Any,
) -> Report:
    """Replace self-attention and static token mixing by HyperMixing, in place.

    Replaced are nn.MultiheadAttention (alone or in nn.TransformerEncoderLayer), timm's
    ``MixerBlock.mlp_tokens`` and ViT ``Attention``, the self-attention of Hugging Face's BERT family
    and ViT, and SpeechBrain's ``mha_layer``. The new layers start untrained. Left alone, and
    reported with the reason, are decoders, cross-attention where it is recognised or where
    ``tied=True``, and attention with relative positions.

    A model that is itself an attention module cannot be changed in place: use
    :class:`hypermixer.HyperMixingAttention`. A module that several parents hold stays one module.

    Args:
        model: any torch, timm or transformers model.
        num_heads: H; that of the module replaced by default (1 for timm's Mixer).
        hidden_dim: d'; 2·d by default.
        which: a regular expression searched in module names, or ``(name, module) → bool``.
        options: further arguments of :class:`hypermixer.HyperMixing`.

    Returns:
        A report, which holds the model and can restore it.

    Raises:
        ValueError: for sizes that do not go together, a model that is itself an attention module,
            and a regular expression that is none.

    Example:
        >>> layer = nn.TransformerEncoderLayer(16, 2, batch_first=True)
        >>> print(convert(nn.Sequential(layer)))
        replaced 1, skipped 0
          replaced  0.self_attn (MultiheadAttention)
    """
    if isinstance(which, str):
        try:
            re.compile(which)
        except re.error as error:
            raise ValueError(f"which={which!r} is no regular expression: {error}") from error
    surgeon = _Surgeon(num_heads, hidden_dim, options)
    if not isinstance(model, _OURS) and isinstance(
        surgeon.replace("", model, nn.Module()), nn.Module
    ):
        raise ValueError(  # noqa: TRY004 - the class is right, its place is not
            f"model is an attention module itself ({type(model).__name__}), which cannot be replaced "
            "in place; make a hypermixer.HyperMixingAttention, or convert the module that holds it"
        )
    report = Report(model)
    made: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        seen = any(module is encoder for encoder, _, _ in report._flags)
        if isinstance(module, nn.TransformerEncoder) and not seen:
            flags = (module.use_nested_tensor, module.enable_nested_tensor)
            report._flags.append((module, *flags))
        inside = name.startswith(tuple(f"{done}." for done in report._originals))
        if not name or inside or _is_ours(module, name, model):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        # A module that several parents hold stays one module.
        answer = made.get(module) or surgeon.replace(name, module, parent)
        kind = type(module).__name__
        if answer is None:
            continue
        if isinstance(answer, str):
            report.skipped.append((name, kind, answer))
        elif not _chosen(which, name, module):
            report.skipped.append((name, kind, "not chosen by which"))
        else:
            made[module] = answer.train(module.training)
            _set(model, name, answer)
            report._originals[name] = module
            report.replaced.append((name, kind))
    for encoder, _, _ in report._flags:
        # Otherwise, in eval mode with padding, the encoder reads self_attn.in_proj_weight.
        if any(isinstance(m, HyperMixingAttention) for m in encoder.modules()):
            encoder.use_nested_tensor = encoder.enable_nested_tensor = False
    return report


def _is_ours(module: nn.Module, name: str, model: nn.Module) -> bool:
    """Tell whether a module is, or lies in, a layer of this package."""
    parts = name.split(".")
    above = (model.get_submodule(".".join(parts[:i])) for i in range(1, len(parts)))
    return isinstance(module, _OURS) or any(isinstance(m, _OURS) for m in above)
