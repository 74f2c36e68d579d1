"""The one point where an algorithm is chosen: every mixing of a whole sequence passes :func:`mix`.

"direct" and "factored" are plain torch. A faster kernel for some device registers itself under a name
of its own with :func:`register_kernel`, and is then asked for by ``algorithm=name``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hypermixer.functional import Activation, crossover_length, mix_heads

Kernel = Callable[..., Tensor]
BUILT_IN = ("auto", "direct", "factored")
_KERNELS: dict[str, Kernel] = {}


def register_kernel(name: str, kernel: Kernel) -> None:
    """Make a kernel available as ``algorithm=name``.

    Args:
        name: any name but the built-in ones.
        kernel: called as ``kernel(g1, u1, c1, g2, u2, c2, value, activation, tied=..., scale=...)``
            with the head-major layout and meaning of :func:`hypermixer.functional.mix_heads`.

    Raises:
        ValueError: for a built-in name.
    """
    if name in BUILT_IN:
        raise ValueError(f"name={name!r} is built in; register the kernel under another name")
    _KERNELS[name] = kernel


def check_algorithm(algorithm: str) -> None:
    """Raise ValueError for an algorithm that is neither built in nor registered."""
    known = (*BUILT_IN, *_KERNELS)
    if algorithm not in known:
        names = ", ".join(map(repr, known))
        raise ValueError(
            f"algorithm must be one of {names}; got {algorithm!r} "
            "(other kernels appear here after hypermixer.kernels.register_kernel)"
        )


def choose_direct(
    algorithm: str, keys: int, queries: int, hidden: int, hypernet: int, width: int, *, tied: bool
) -> tuple[bool, bool]:
    """Return (key side direct, query side direct), from shapes alone."""
    if algorithm != "auto":
        return algorithm == "direct", algorithm == "direct"
    limit = crossover_length(hidden, hypernet, width, tied=tied)
    return keys < limit, queries < limit


def mix(
    g1: Tensor,
    u1: Tensor,
    c1: Tensor | None,
    g2: Tensor,
    u2: Tensor,
    c2: Tensor | None,
    value: Tensor,
    activation: Activation,
    *,
    algorithm: str = "auto",
    tied: bool = False,
    scale: Tensor | None = None,
) -> Tensor:
    """Mix tokens in the head-major layout by the algorithm asked for.

    The arguments are those of :func:`hypermixer.functional.mix_heads`.
    """
    check_algorithm(algorithm)
    if algorithm in _KERNELS:
        kernel = _KERNELS[algorithm]
        return kernel(g1, u1, c1, g2, u2, c2, value, activation, tied=tied, scale=scale)
    key_direct, query_direct = choose_direct(
        algorithm, g1.shape[2], g2.shape[2], u1.shape[1], g1.shape[3], value.shape[3], tied=tied
    )
    return mix_heads(
        g1,
        u1,
        c1,
        g2,
        u2,
        c2,
        value,
        activation,
        key_direct=key_direct,
        query_direct=query_direct,
        tied=tied,
        scale=scale,
    )
