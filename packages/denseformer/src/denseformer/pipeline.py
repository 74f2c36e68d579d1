"""Splitting a network between blocks: what crosses a boundary, and exact gradients through it.

After block b the next stage needs Y_b and, for the rows still to come, either the X_j that they read or
the partial sums ``P_i = Σ_{j<=b} α_ij X_j``, whichever are fewer: at d = 48, b = 24 these are 24 for 1 × 1
and 5 for 4 × 5. Every α_ij belongs to the stage that multiplies by it, so no weight is shared.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from denseformer.core import kernels
from denseformer.core.dwa import DWA, KeepsDtype
from denseformer.core.geometry import Geometry
from denseformer.core.plan import Plan, best_plan
from denseformer.core.run import DepthRun, check_stream


@dataclass(frozen=True)
class Boundary:
    """What is sent after block ``after``, beside Y: columns (kind ``"live"``) or rows (``"sums"``)."""

    after: int
    kind: str
    items: tuple[int, ...]


def boundaries(spec: Geometry, after: Sequence[int]) -> list[Boundary]:
    """Return the payload of each boundary. Once partial sums are sent, sums are sent to the end.

    Raises:
        ValueError: boundaries outside 1..depth-1 or not ascending.

    >>> [len(boundaries(Geometry(48, k, p), [24])[0].items) for k, p in ((1, 1), (4, 5), (4, 10))]
    [24, 5, 2]
    """
    cuts = list(after)
    if cuts != sorted(set(cuts)) or not all(1 <= b < spec.depth for b in cuts):
        raise ValueError(f"boundaries must ascend within 1..{spec.depth - 1}, got {cuts}")
    made: list[Boundary] = []
    for b in cuts:
        live, sums = spec.live(b), spec.pending(b)
        only_sums = bool(made) and made[-1].kind == "sums"
        kind = "sums" if only_sums or len(sums) <= len(live) else "live"
        made.append(Boundary(b, kind, sums if kind == "sums" else live))
    return made


class StageDWA(KeepsDtype):
    """The averages of one pipeline stage; made by :func:`split`.

    ``begin(x, partials=...)`` takes Y of the boundary before (X_0 in the first stage) and its payload;
    after the stage's blocks ``run.payload()`` is the next one's. Sums are float32 (float64 for float64).

    Attributes:
        weight: this stage's weights in one vector.
        pairs: the (i, j) of each.
        receives: the payload before it; ``None`` in the first stage.
        sends: the payload after it; ``None`` in the last.
    """

    def __init__(
        self, spec: Geometry, receives: Boundary | None, sends: Boundary | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.spec, self.receives, self.sends = spec, receives, sends
        self.start = receives.after if receives else 0
        self.stop = sends.after if sends else spec.depth
        given: tuple[int, ...] = (0,) if receives is None else ()
        if receives is not None and receives.kind == "live":
            given = receives.items
        columns = [*given, *range(self.start + 1, self.stop + 1)]
        at = {j: c for c, j in enumerate(columns)}
        later = sends.items if sends is not None and sends.kind == "sums" else ()
        rows = [i for i in spec.rows if self.start < i <= self.stop]
        rows += [i for i in later if any(j in at for j in spec.sources(i))]
        local = [[at[j] for j in spec.sources(i) if j in at] for i in rows]
        steps = [min(i, self.stop + 1) - self.start for i in rows]
        keep = [at[j] for j in sends.items] if sends is not None and sends.kind == "live" else []
        payload = [rows.index(i) if i in rows else -1 for i in later]
        size = (self.stop - self.start, len(given))
        self.plan: Plan = best_plan(*size, local, steps, keep, payload)
        self.pairs = [(i, j) for i in rows for j in spec.sources(i) if j in at]
        self._rows, self._given = rows, len(given)
        self.weight = nn.Parameter(torch.empty(len(self.pairs), dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the averages the identity."""
        with torch.no_grad():
            self.weight.copy_(torch.tensor([float(i == j) for i, j in self.pairs]))

    def begin(self, x: Tensor, *, partials: Sequence[Tensor] = ()) -> DepthRun:
        """Start this stage's part of a forward pass.

        Raises:
            ValueError: the number or the shape of ``partials`` is not what the stage before sends.
            TypeError: ``x`` is not floating point.
        """
        made = self(x, tuple(partials))
        assert isinstance(made, DepthRun)
        return made

    def forward(self, x: Tensor, partials: Sequence[Tensor] = ()) -> DepthRun:
        """Return the run; :meth:`begin` is the documented way to it."""
        check_stream(x, "x")
        expected = len(self.receives.items) if self.receives is not None else 0
        if len(partials) != expected or any(p.shape != x.shape for p in partials):
            shapes = [tuple(p.shape) for p in partials]
            raise ValueError(
                f"the stage of blocks {self.start + 1} to {self.stop} receives {expected} partials of shape "
                f"{tuple(x.shape)}, got {shapes}"
            )
        columns, inits, passing = [x], {}, []
        if self.receives is not None:
            columns = list(partials) if self.receives.kind == "live" else []
            if self.receives.kind == "sums":
                wide = [p.to(kernels.accumulate_dtype(x.dtype)) for p in partials]
                for i, p in zip(self.receives.items, wide, strict=True):
                    if i in self._rows:
                        inits[self._rows.index(i)] = p
                    else:
                        passing.append(p)
        return DepthRun(self.plan, self.weight, x, columns, inits, passing, offset=self.start)

    def extra_repr(self) -> str:
        """Describe the stage."""
        return f"blocks {self.start + 1} to {self.stop} of {self.spec}"


def split(dwa: DWA, after: Sequence[int]) -> list[StageDWA]:
    """Return one :class:`StageDWA` per stage, with the weights of ``dwa``.

    Args:
        dwa: the averages of the whole network.
        after: the blocks, from 1, after which a boundary lies.

    Raises:
        ValueError: boundaries outside 1..depth-1 or not ascending.

    >>> stages = split(DWA(4), after=[2])
    >>> x = torch.ones(1, 3)
    >>> run = stages[0].begin(x)
    >>> for _ in range(2):
    ...     x = run(x * 2)
    >>> run = stages[1].begin(x, partials=run.payload())
    >>> for _ in range(2):
    ...     x = run(x * 2)
    >>> x.tolist()
    [[16.0, 16.0, 16.0]]
    """
    ends: list[Boundary | None] = [None, *boundaries(dwa.spec, after), None]
    made = []
    full = dwa.matrix()
    for receives, sends in itertools.pairwise(ends):
        stage = StageDWA(dwa.spec, receives, sends, dwa.weight.dtype)
        with torch.no_grad():
            if stage.pairs:
                rows, columns = zip(*stage.pairs, strict=True)
                stage.weight.copy_(full[[i - 1 for i in rows], list(columns)])
        made.append(stage.to(dwa.weight.device))
    return made


def join(dwa: DWA, stages: Sequence[StageDWA]) -> DWA:
    """Copy the stages' weights back into ``dwa``; return it."""
    full = dwa.matrix().cpu()
    for stage in stages:
        for (i, j), value in zip(stage.pairs, stage.weight.detach().cpu(), strict=True):
            full[i - 1, j] = value
    packed = [full[i - 1, list(dwa.sources(i))] for i in dwa.rows]
    with torch.no_grad():
        dwa.weight.copy_(torch.cat(packed) if packed else dwa.weight)
    return dwa
