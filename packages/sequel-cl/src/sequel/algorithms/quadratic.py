"""Regularisation by (lam/2) Σ omega (θ - anchor)²: what EWC, SI and MAS share."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sequel import _check
from sequel.algorithms.base import Algorithm, Context, Info, State, check_lam
from sequel.functional import prox_step, quad_penalty
from sequel.ops.base import Array, Ops, Tree

if TYPE_CHECKING:
    from sequel.engine import Tools

__all__ = ["Quadratic", "merge"]


def merge(ops: Ops, state: State, omega: Tree, anchor: Tree) -> State:
    """Add Σ omega (θ - anchor)² to a state's penalty exactly, in O(P).

    a(θ - p)² + b(θ - q)² = (a + b)(θ - r)² + const with r = p + b/(a + b) (q - p), and r = p where
    a + b = 0.
    """

    def centre(a: Array, p: Array, b: Array, q: Array) -> Array:
        total = a + b
        mixed = p + ops.where(total > 0, b / ops.where(total > 0, total, 1 + 0 * b), 0 * b) * (
            q - p
        )
        return ops.where((a == 0) & (b > 0), q, mixed)  # exact, not p + (q - p)

    centres = ops.map(centre, state["omega"], state["anchor"], omega, anchor)
    return {
        **state,
        "omega": ops.map(lambda a, b: a + b, state["omega"], omega),
        "anchor": centres,
    }


@dataclass(frozen=True)
class Quadratic(Algorithm):
    """A quadratic penalty, applied as a gradient or as a proximal step.

    ``apply="grad"`` adds lam omega (θ - anchor) to the gradient, which is what differentiating the
    penalty does. ``apply="prox"`` moves the parameters after the optimizer's step to the minimum of
    the penalty plus the squared distance; it is stable for every lam.

    ``exclude`` is a regular expression: parameters in whose names it is found get no importance, e.g.
    ``"norm"`` for the scales and shifts of normalisation layers.
    """

    lam: float = 1.0
    apply: str = "grad"
    exclude: str | None = None

    def check(self) -> None:
        check_lam(self.lam)
        _check.one_of("apply", self.apply, ("grad", "prox"))
        try:
            re.compile(self.exclude or "")
        except (re.error, TypeError) as error:
            raise ValueError(
                f"exclude must be a regular expression, got {self.exclude!r}"
            ) from error

    def without(self, ops: Ops, omega: Tree) -> Tree:
        """Return importances with zeros for the parameters that ``exclude`` names."""
        if self.exclude is None:
            return omega
        out = {n for n in omega if re.search(self.exclude, n)}
        return {**omega, **ops.zeros_like({n: omega[n] for n in out})}

    def init(self, ops: Ops, params: Tree, info: Info) -> State:
        if self.exclude is not None and not any(re.search(self.exclude, n) for n in params):
            raise ValueError(
                f"exclude={self.exclude!r} is found in no parameter's name: {sorted(params)}"
            )
        zeros = ops.wide(ops.zeros_like(params))
        return {"omega": zeros, "anchor": ops.wide(ops.copy(params))}

    def penalty(self, params: Tree, state: State) -> Any:
        """Return the value of the penalty."""
        return quad_penalty(params, state["omega"], state["anchor"], self.lam)

    def grads(self, ops: Ops, grads: Tree, params: Tree, ctx: Context, state: State) -> Tree:
        if self.apply == "prox" or self.lam == 0 or ctx.past == 0:
            return grads
        keep = "task_grads" in self.needs
        return ops.pull(grads, params, state["omega"], state["anchor"], self.lam, keep=keep)

    def after_step(
        self, ops: Ops, old: Tree, new: Tree, grads: Tree, ctx: Context, state: State
    ) -> tuple[Tree, State]:
        if self.apply == "grad" or self.lam == 0 or ctx.past == 0:
            return new, state
        step = ctx.lr * self.lam
        moved = ops.map(
            lambda p, w, a: ops.cast(prox_step(p, w, a, step), p),
            ops.stop_gradient(new),
            state["omega"],
            state["anchor"],
        )
        return ctx.assign(moved), state

    def warn_if_unstable(self, ops: Ops, tools: Tools, state: State) -> None:
        """Warn where explicit steps on the penalty diverge: lr lam max(omega) > 2."""
        if self.apply == "prox" or tools.lr is None:
            return
        largest = max(float(leaf.max()) for leaf in state["omega"].values())
        if tools.lr * self.lam * largest > 2 and not tools.warned:
            tools.warned = True
            warnings.warn(
                f"lr * lam * max(omega) = {tools.lr * self.lam * largest:.3g} > 2: gradient steps on "
                f"the penalty diverge; use {type(self).__name__}(..., apply='prox') or a smaller lam",
                RuntimeWarning,
                stacklevel=2,
            )
