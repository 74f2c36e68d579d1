"""HyperMixing under the signatures of other libraries' token mixers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hypermixer._checks import is_compiling
from hypermixer.mixing import HyperMixing


def padding_of(mask: Tensor | None) -> Tensor | None:
    """Return the key padding (B, N), True = ignore, that a Hugging Face attention mask says.

    Args:
        mask: (B, N) of 1 and 0; or (B, 1, 1 or M, N), bool (True = attend) or additive (0, or the
            most negative number of the dtype).

    Raises:
        NotImplementedError: for masks that differ from query to query or from head to head.
    """
    if mask is None:
        return None
    if mask.dim() == 2:
        return ~mask.bool()
    ignore = ~mask if mask.dtype == torch.bool else mask < torch.finfo(mask.dtype).min / 2
    first = ignore[:, :1, :1]
    if not is_compiling() and not bool((ignore == first).all()):
        raise NotImplementedError(
            "HyperMixing has no weight for each pair of tokens: the attention mask may only say "
            "which keys are padding, the same for every query and head"
        )
    return first[:, 0, 0]


class MixedTokens(nn.Module):
    """In the place of timm's ``MixerBlock.mlp_tokens``, whose input is transposed, (B, d, N)."""

    def __init__(self, mixing: HyperMixing) -> None:
        super().__init__()
        self.mixing = mixing

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, d, N) from (B, d, N)."""
        return self.mixing(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]


class TimmAttention(nn.Module):
    """In the place of timm's ``Attention``."""

    def __init__(self, mixing: HyperMixing) -> None:
        super().__init__()
        self.mixing = mixing

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Return (B, N, d) from (B, N, d).

        Raises:
            NotImplementedError: for an attention mask.
        """
        if attn_mask is not None or is_causal:
            raise NotImplementedError(
                "HyperMixing has no weight for each pair of tokens: attn_mask must be None"
            )
        return self.mixing(x)  # type: ignore[no-any-return]


class HuggingFaceAttention(nn.Module):
    """In the place of a Hugging Face encoder's self-attention: returns (output, None)."""

    def __init__(self, mixing: HyperMixing) -> None:
        super().__init__()
        self.mixing = mixing

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Return (B, N, d) from (B, N, d); further arguments concern caches and attention maps.

        Raises:
            NotImplementedError: for a key-value cache or keys from elsewhere.
        """
        for name in ("past_key_values", "past_key_value", "encoder_hidden_states"):
            if kwargs.get(name) is not None:
                raise NotImplementedError(f"{name} is for decoders; this layer mixes an encoder's")
        padding = padding_of(attention_mask)
        if padding is not None and padding.shape[0] == 1:  # one mask for the batch
            padding = padding.expand(hidden_states.shape[0], -1)
        return self.mixing(hidden_states, key_padding_mask=padding), None


class SpeechBrainAttention(nn.Module):
    """In the place of SpeechBrain's ``mha_layer``: returns (output, None), never an N×N dummy."""

    def __init__(self, mixing: HyperMixing) -> None:
        super().__init__()
        self.mixing = mixing

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        return_attn_weights: bool = True,
        pos_embs: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, None]:
        """Mix tokens; ``pos_embs`` has no meaning here, the mixer has its own positions.

        Raises:
            NotImplementedError: for an attention mask.
        """
        if attn_mask is not None:
            raise NotImplementedError(
                "HyperMixing has no weight for each pair of tokens: attn_mask must be None"
            )
        out = self.mixing(query, key, value, key_padding_mask=key_padding_mask)
        return (out, None) if return_attn_weights else out
