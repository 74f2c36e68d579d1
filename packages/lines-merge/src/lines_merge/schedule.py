"""The factors of LiNeS (Eq. 1): one number for every parameter, linear in the depth of its block."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from .depth import Block, DepthMap

NUMBER = (int, float, np.integer, np.floating)
"""What counts as a number where a factor is meant; a bool does not."""

Outside = str | float | Callable[[str], float]

# Outside the blocks, what lies behind the last one; all else (embeddings, stem) lies before the first.
_BEFORE = re.compile(r"(?:^|[._])(?:stem|patch|\w*embed(?!_out)\w*)(?:\.|$)")
_BEHIND = re.compile(
    r"(?:^|\.)(?:norm|ln_f|ln_post|ln_final|norm_f|fc_norm|final_\w*norm|final_layernorm|post_layernorm"
    r"|layer_norm|layernorm|ln|head\w*|lm_head|classifier|fc|score|proj|pooler|embed_out|logit_scale"
    r"|logit_bias|text_projection|visual_projection|image_projection)(?:\.|$)"
)


def check_finite(**values: float) -> None:
    """Raise ValueError for a factor that is NaN or infinite, TypeError for what is no number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(
            value, NUMBER
        ):  # NumPy's scalars are real, too
            raise TypeError(f"{name} must be a finite number, got {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")


def from_gamma(gamma: float | None, alpha: float | None, beta: float | None) -> tuple[float, float]:
    """Return (alpha, beta), where gamma stands for alpha = gamma, beta = 1 - gamma.

    Raises:
        TypeError: neither or both of gamma and (alpha, beta) are given.
        ValueError: gamma outside [0, 1], or a value that is not finite.
    """
    if gamma is None:
        if alpha is None or beta is None:
            raise TypeError("pass gamma, or both alpha and beta")
        check_finite(alpha=alpha, beta=beta)
        return float(alpha), float(beta)
    if alpha is not None or beta is not None:
        raise TypeError("pass gamma or alpha and beta, not both")
    check_finite(gamma=gamma)
    if not 0 <= gamma <= 1:
        raise ValueError(
            f"gamma must be in [0, 1], got {gamma}; pass alpha and beta for extrapolation"
        )
    return float(gamma), 1.0 - float(gamma)


def linear_factor(index: int, count: int, alpha: float, beta: float) -> float:
    """Return alpha + beta * index / (count - 1); a single block is the deepest one.

    >>> [linear_factor(i, 3, 0.25, 0.75) for i in range(3)]
    [0.25, 0.625, 1.0]
    """
    if count == 1 or index == count - 1:
        return alpha + beta
    return alpha + beta * index / (count - 1)


def position(name: str, block: Block | None) -> float:
    """Return the relative depth in [0, 1]; outside the blocks 0 before them and 1 behind."""
    if block is None:
        return float(_BEHIND.search(name) is not None and _BEFORE.search(name) is None)
    return linear_factor(block.index, block.count, 0.0, 1.0)


def factors(
    depth: DepthMap,
    alpha: float,
    beta: float,
    *,
    schedule: str = "linear",
    outside: Outside = "alpha",
    towers: str = "separate",
) -> dict[str, float]:
    """Return the factor of every name in the map.

    Args:
        depth: blocks of the names.
        alpha: factor of the first block (Eq. 1).
        beta: increase from the first block to the last.
        schedule: "linear", or "reverse" (the paper's control: deep blocks get the small factors).
        outside: factor of parameters outside the blocks: "alpha" (the authors' code), "depth" (alpha
            before the blocks, alpha + beta behind them), a number, or a function of the name.
        towers: see `DepthMap.with_towers`.

    Raises:
        ValueError: unknown word, or a factor that is not finite.
    """
    check_finite(alpha=alpha, beta=beta)
    if schedule not in {"linear", "reverse"}:
        raise ValueError(f"schedule must be 'linear' or 'reverse', got {schedule!r}")
    result = {}
    for name, block in _items(depth.with_towers(towers)):
        if block is None:
            result[name] = _outside(name, outside, alpha, beta)
        else:
            last = block.count - 1
            mirrored = schedule == "reverse" and block.count > 1
            index = last - block.index if mirrored else block.index
            result[name] = linear_factor(index, block.count, alpha, beta)
    return result


def _items(depth: DepthMap) -> Iterable[tuple[str, Block | None]]:
    return ((name, depth[name]) for name in depth)


def _outside(name: str, outside: Outside, alpha: float, beta: float) -> float:
    if callable(outside):
        value = float(outside(name))
        check_finite(**{f"outside({name!r})": value})
        return value
    if outside == "alpha":
        return alpha
    if outside == "depth":
        return alpha + beta * position(name, None)
    if isinstance(outside, str):
        raise ValueError(
            f"outside must be 'alpha', 'depth', a number or a function, got {outside!r}"
        )
    check_finite(outside=outside)
    return float(outside)


def scales(
    names: Iterable[str],
    alpha: float,
    beta: float,
    *,
    depth: DepthMap | str = "auto",
    schedule: str = "linear",
    outside: Outside = "alpha",
    towers: str = "separate",
    allow_gaps: bool = False,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """Return the LiNeS factor of every parameter name (Eq. 1).

    Args:
        names: parameter names.
        alpha: factor of the first block and, by default, of everything outside the blocks.
        beta: increase from the first block to the last.
        depth: a `DepthMap`, "auto" or the name of a family.
        schedule: see `factors`.
        outside: see `factors`.
        towers: see `factors`.
        allow_gaps: see `DepthMap.from_names`.
        sizes: see `DepthMap.from_names`.

    Example:
        >>> scales(["blocks.0.w.a", "blocks.1.w.a", "blocks.2.w.a", "head.a"], 0.2, 0.8)
        {'blocks.0.w.a': 0.2, 'blocks.1.w.a': 0.6000000000000001, 'blocks.2.w.a': 1.0, 'head.a': 0.2}
    """
    names = list(names)
    resolved = resolve_depth(depth, names, allow_gaps=allow_gaps, sizes=sizes)
    values = factors(resolved, alpha, beta, schedule=schedule, outside=outside, towers=towers)
    return {name: values[name] for name in names}


def resolve_depth(
    depth: DepthMap | str,
    names: Iterable[str],
    *,
    allow_gaps: bool = False,
    sizes: Mapping[str, int] | None = None,
) -> DepthMap:
    """Return the map for these names."""
    if isinstance(depth, DepthMap):
        return depth.resolve(names)
    return DepthMap.from_names(names, depth, allow_gaps=allow_gaps, sizes=sizes)
