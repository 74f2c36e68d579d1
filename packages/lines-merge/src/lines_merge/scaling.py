"""From a merged task vector to weights: factors, alpha (Eq. 2), and the rounding of the result."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .cells import Cell
from .depth import DepthMap
from .engine import Engine, Sink
from .errors import LargeAlphaWarning, OverflowWarning, ZeroTaskVectorError
from .merges import BaseMerge, Merge
from .schedule import NUMBER, Outside, check_finite, factors, position, resolve_depth

_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Scaling:
    """How the merged task vector is scaled: Eq. 1 and what surrounds it.

    Attributes:
        alpha: factor of the first block, or "auto" for the norm ratio of Eq. 2.
        beta: increase from the first block to the last.
        lines: False multiplies everything by alpha ("auto" stands for 1), the plain merge.
        norm: 1 or 2, the norm of Eq. 2.
        depth: a `DepthMap`, "auto" or a family.
        schedule: "linear" or "reverse".
        outside: see `schedule.factors`.
        towers: see `DepthMap.with_towers`.
        buffers: batch-norm statistics: "scale" (like parameters, variances clamped at 0), "base", or
            "finetuned" (one model only).
        allow_gaps: see `DepthMap.from_names`.
    """

    alpha: float | Literal["auto"] = "auto"
    beta: float = 0.5
    lines: bool = True
    norm: int = 1
    depth: DepthMap | str = "auto"
    schedule: str = "linear"
    outside: Outside = "alpha"
    towers: str = "separate"
    buffers: str = "scale"
    allow_gaps: bool = False

    def __post_init__(self) -> None:
        """Check the arguments that need no model."""
        if self.alpha != "auto":
            check_finite(alpha=self.alpha)
        check_finite(beta=self.beta)
        if self.norm not in {1, 2}:
            raise ValueError(f"norm must be 1 or 2, got {self.norm!r}")
        if self.buffers not in {"scale", "base", "finetuned"}:
            raise ValueError(
                f"buffers must be 'scale', 'base' or 'finetuned', got {self.buffers!r}"
            )
        # unknown words and factors that are not finite
        factors(
            DepthMap({}),
            1.0,
            self.beta,
            schedule=self.schedule,
            outside=self.outside,
            towers=self.towers,
        )
        if isinstance(self.outside, str) and self.outside not in {"alpha", "depth"}:
            raise ValueError(
                f"outside must be 'alpha', 'depth', a number or a function, got {self.outside!r}"
            )

    @property
    def needs_depth(self) -> bool:
        """Whether the factors differ between tensors."""
        return self.lines and (self.beta != 0 or self.outside not in ("alpha", "depth"))

    def factors(self, sizes: Mapping[str, int], alpha: float) -> dict[str, float]:
        """Return the factor of every tensor, given their numbers of elements."""
        if not self.needs_depth:
            values = dict.fromkeys(sizes, float(alpha))
        else:
            depth = resolve_depth(self.depth, sizes, allow_gaps=self.allow_gaps, sizes=sizes)
            values = factors(
                depth,
                alpha,
                self.beta,
                schedule=self.schedule,
                outside=self.outside,
                towers=self.towers,
            )
        if self.buffers != "scale":
            fixed = 0.0 if self.buffers == "base" else 1.0
            values.update({n: fixed for n in sizes if n.rpartition(".")[2] in _STATISTICS})
        return values


@dataclass
class Plan:
    """A merge that is ready to be written: method prepared, alpha known, factors by tensor."""

    engine: Engine
    method: Merge
    scaling: Scaling
    alpha: float
    seen: list[bool] = field(default_factory=lambda: [False])
    overflow: list[str] = field(default_factory=list)

    def kernel(
        self, factors: Sequence[Mapping[str, float]]
    ) -> Callable[[Cell, Sequence[Tensor]], None]:
        """Return the function that merges, scales and rounds one cell, once for each set of factors."""
        watch = self.scaling.lines and self.scaling.alpha == "auto"

        copied = _STATISTICS if self.scaling.buffers == "finetuned" else ()

        def work(cell: Cell, outs: Sequence[Tensor]) -> None:
            if cell.name.rpartition(".")[2] in copied:
                for out in outs:
                    out.copy_(cell.raw_models[0])
                return
            merged = self.method(cell.base, cell.deltas, cell)
            if watch and not self.seen[0] and bool(merged.any()):
                self.seen[0] = True
            for table, out in zip(factors, outs, strict=True):
                combine(cell, merged, table[cell.name], out)
                if out.dtype == torch.float16 and not self.overflow:
                    self._look_for_overflow(cell.name, out)

        return work

    def _look_for_overflow(self, name: str, out: Tensor) -> None:
        """Note the first result beyond the range of float16; inputs with infinities are the caller's."""
        if not self.engine.allow_nonfinite and not bool(torch.isfinite(out).all()):
            self.overflow.append(name)

    def write(self, sinks: Sequence[Sink], factors: Sequence[Mapping[str, float]]) -> None:
        """Write the result; once more for tensors whose statistics came late.

        Raises:
            ZeroTaskVectorError: alpha is "auto" and the merged task vector is zero.
        """
        kernel = self.kernel(factors)
        self.engine.write(kernel, sinks)
        if isinstance(self.method, BaseMerge):
            late = self.method.unresolved()
            if late:
                self.engine.write(kernel, sinks, late)
        if self.scaling.lines and self.scaling.alpha == "auto" and not self.seen[0]:
            raise zero_vector()
        if self.overflow:
            warnings.warn(
                f"{self.overflow[0]!r} of the result holds infinities: values beyond 65504, the largest "
                "of float16; dtype=torch.bfloat16 or torch.float32 holds them",
                OverflowWarning,
                stacklevel=4,
            )


def zero_vector() -> ZeroTaskVectorError:
    """Return the error of a merged task vector that is zero."""
    return ZeroTaskVectorError(
        "the merged task vector is zero, so that alpha='auto' (a ratio of norms) is undefined; "
        "pass a number"
    )


def combine(cell: Cell, merged: Tensor, factor: float, out: Tensor) -> None:
    """Write base + factor * merged, rounded once to the dtype of `out`.

    Factor 0 copies the base, factor 1 of a single model's own task vector copies that model, and an entry
    without update keeps the bits of the base (-0.0 included).
    """
    if factor == 0:
        out.copy_(cell.raw_base)
        return
    result = cell.scratch(6)
    if factor == 1:
        torch.add(cell.base, merged, out=result)
    else:
        torch.mul(merged, factor, out=result).add_(cell.base)
    if len(cell.raw_models) == 1 and factor == 1:
        model = cell.raw_models[0].to(cell.base.dtype)
        torch.where(merged == model - cell.base, model, result, out=result)
    elif _has_negative_zero(cell.raw_base):
        torch.where((cell.base == 0) & (merged == 0), cell.base, result, out=result)
    if cell.name.endswith("running_var"):
        result.clamp_min_(0)
    out.copy_(result)


def _has_negative_zero(raw: Tensor) -> bool:
    """-0.0 is the smallest integer among the bit patterns."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(raw.element_size())
    if kind is None or not raw.numel():
        return True
    return int(raw.view(kind).min()) == torch.iinfo(kind).min


def prepare(engine: Engine, method: Merge, scaling: Scaling) -> Plan:
    """Run the passes that come before writing: the method's statistics, then alpha.

    Raises:
        ZeroTaskVectorError: alpha is "auto" and the merged task vector is zero.
        ValueError: `buffers="finetuned"` with several models.
    """
    if scaling.buffers == "finetuned" and engine.num_models > 1:
        raise ValueError("buffers='finetuned' needs a single model; use 'base' or 'scale'")
    sizes = engine.sizes()
    # before the passes: a model whose depth cannot be read should not be read at all
    scaling.factors(sizes, 1.0)
    if _has_gradient(method):
        depth = resolve_depth(scaling.depth, sizes, allow_gaps=scaling.allow_gaps, sizes=sizes)
        engine.depth = {name: position(name, depth[name]) for name in sizes}
    method.prepare(engine)
    return Plan(engine, method, scaling, _alpha(engine, method, scaling))


def _has_gradient(method: Merge) -> bool:
    weights = getattr(method, "weights", None) or ()
    return any(not isinstance(weight, NUMBER) for weight in weights)


def _alpha(engine: Engine, method: Merge, scaling: Scaling) -> float:
    """Return alpha, by Eq. 2 if it is "auto"."""
    if scaling.alpha != "auto":
        return float(scaling.alpha)
    if not scaling.lines:
        return 1.0
    closed = getattr(method, "closed_alpha", lambda _: None)(engine.num_models)
    if closed is not None:
        return float(closed)
    norms = method.norms if isinstance(method, BaseMerge) else _Measured(method).norms
    total, merged = norms(engine, scaling.norm)
    if merged == 0:
        raise zero_vector()
    return norm_ratio(total, merged, engine.num_models, scaling.norm)


class _Measured(BaseMerge):
    """A user's merge with the default norm pass."""

    def __init__(self, method: Merge) -> None:
        self._method = method

    def __call__(self, base: Tensor, deltas: Tensor, ctx: Cell) -> Tensor:
        return self._method(base, deltas, ctx)


def norm_ratio(total: float, merged: float, num_models: int, norm: int) -> float:
    """Return alpha from the sums of ``|x|^norm`` (Eq. 2); warn above 1."""
    alpha = (
        (total / merged) ** (1 / norm) / num_models if norm == 2 else total / merged / num_models
    )
    if alpha > 1:
        warnings.warn(
            f"alpha = {alpha:.3g} is above 1: the merged task vector is much sparser than the sum",
            LargeAlphaWarning,
            stacklevel=4,
        )
    return alpha
