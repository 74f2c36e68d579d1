"""Checks at the package's boundary: each raises with the argument's name, what came and the fix."""

from __future__ import annotations

import torch
from torch import Tensor


def is_compiling() -> bool:
    """Tell whether torch.compile or torch.export is tracing."""
    return torch.compiler.is_compiling()


def in_transform() -> bool:
    """Tell whether torch.func (vmap, grad, jvp, ...) is at work, which custom functions do not join."""
    return torch._C._are_functorch_transforms_active()


def positive(name: str, value: object) -> None:
    """Require an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")


def divisible(name: str, value: int, num_heads: int) -> None:
    """Require that heads divide a width evenly."""
    if value % num_heads:
        raise ValueError(f"{name}={value} must be divisible by num_heads={num_heads}")


def one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Require one of a few options."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def is_nested(x: object) -> bool:
    """Tell whether this is a nested tensor; torch.compile before 2.6 cannot trace getattr with a default."""
    return isinstance(x, Tensor) and x.is_nested


def tokens(name: str, x: Tensor, embed_dim: int, ndim: int = 3) -> None:
    """Require a floating (B, N, d) tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")
    if x.dim() != ndim:
        layout = "(batch, length, embed_dim)" if ndim == 3 else "(tokens, embed_dim)"
        raise ValueError(f"{name} must have shape {layout}, got {tuple(x.shape)}")
    if x.shape[-1] != embed_dim:
        raise ValueError(f"{name} has {x.shape[-1]} features, but embed_dim={embed_dim}")


def key_value(query: Tensor, key: Tensor, value: Tensor, embed_dim: int) -> None:
    """Require keys and values that go together and share the queries' batch."""
    tokens("key", key, embed_dim)
    tokens("value", value, embed_dim)
    if key.shape[1] != value.shape[1]:
        raise ValueError(
            f"key and value must have one length, got {key.shape[1]} and {value.shape[1]}"
        )
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(
            "query, key and value must have one batch size, "
            f"got {query.shape[0]}, {key.shape[0]} and {value.shape[0]}"
        )


def padding_mask(name: str, mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """Return a mask as bool, True where a token is to be ignored.

    Bool and uint8 masks say so directly; float masks are additive (0 keeps, −inf ignores). The values
    of a float mask are checked on the CPU only, where looking at them costs no synchronisation.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(mask).__name__}")
    if tuple(mask.shape) != (batch, length):
        raise ValueError(f"{name} must have shape {(batch, length)}, got {tuple(mask.shape)}")
    if mask.dtype == torch.bool:
        return mask
    if mask.dtype == torch.uint8:
        return mask.bool()
    if mask.dtype.is_floating_point:
        ignore = mask == float("-inf")
        if mask.device.type == "cpu" and not is_compiling() and not ((mask == 0) | ignore).all():
            raise TypeError(f"{name} as a float mask may hold 0 (keep) and -inf (ignore) only")
        return ignore
    raise TypeError(
        f"{name} must be bool or uint8 (True = ignore) or float (-inf = ignore), got {mask.dtype}"
    )


def position_ids(ids: Tensor | None, batch: int, length: int, name: str = "position_ids") -> None:
    """Require integer positions (N,) or (B, N), or None."""
    if ids is None:
        return
    if ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {ids.dtype}")
    if tuple(ids.shape) not in ((length,), (batch, length), (1, length)):
        raise ValueError(
            f"{name} must have shape {(length,)} or {(batch, length)}, got {tuple(ids.shape)}"
        )


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are one: the same object, or one storage, shape and stride."""
    if a is b:
        return True
    if is_compiling() or a.shape != b.shape or a.dtype != b.dtype or a.stride() != b.stride():
        return False
    try:
        return a.numel() > 0 and a.data_ptr() == b.data_ptr()
    except RuntimeError:  # tensors inside torch.func transforms have no storage to compare
        return False


def one_gradient(a: Tensor, b: Tensor) -> bool:
    """Tell whether a and b, which :func:`same_tensor` holds for one, have one gradient too.

    ``x.detach()`` shares x's storage, but nothing is to flow back through it.
    """
    return a is b or not (a.requires_grad or b.requires_grad)


def cu_seqlens(offsets: Tensor, total: int) -> None:
    """Require cumulative sequence lengths 0 = o_0 <= o_1 <= ... <= o_n = total."""
    if not isinstance(offsets, Tensor):
        raise ValueError(  # noqa: TRY004 - one class for all that is wrong with the offsets
            f"cu_seqlens must be an int32 or int64 tensor, got {type(offsets).__name__}"
        )
    if offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, got {offsets.dtype}")
    if offsets.dim() != 1 or offsets.numel() < 1:
        raise ValueError(f"cu_seqlens must be one-dimensional, got shape {tuple(offsets.shape)}")
    if int(offsets[0]) != 0 or bool((offsets.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must start at 0 and never fall, got {offsets.tolist()}")
    if int(offsets[-1]) != total:
        raise ValueError(f"cu_seqlens must end at the {total} tokens given, got {int(offsets[-1])}")
