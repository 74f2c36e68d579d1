"""The methods' formulas as pure functions of NumPy, PyTorch or JAX arrays."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sequel import _check

if TYPE_CHECKING:
    import torch

__all__ = [
    "agem_project",
    "fisher_diagonal",
    "gem_dual",
    "gem_project",
    "herding",
    "prox_step",
    "quad_penalty",
    "reservoir_slots",
]


def _namespace(x: Any) -> Any:
    root = type(x).__module__.partition(".")[0]
    if root == "torch":
        return sys.modules["torch"]
    if root in ("jax", "jaxlib"):
        return sys.modules["jax.numpy"]
    return np


def agem_project(g: Any, r: Any) -> Any:
    """Project g so that it does not increase the reference loss: g - min(g·r, 0) / (r·r) r.

    A-GEM, equation 11 of Chaudhry et al. 2019. g and r are vectors of the same shape; g comes back
    unchanged where g·r >= 0 or r = 0.

    >>> agem_project(np.array([1.0, 0.0]), np.array([-1.0, 1.0])).tolist()
    [0.5, 0.5]
    """
    xp = _namespace(g)
    gr, rr = (g * r).sum(), (r * r).sum()
    one = xp.ones_like(rr)
    coefficient = xp.where((gr < 0) & (rr > 0), gr / xp.where(rr > 0, rr, one), 0 * one)
    return xp.where(coefficient < 0, g - coefficient * r, g)


def gem_dual(
    gram: NDArray[Any],
    gg: NDArray[Any],
    margin: float = 0.5,
    ridge: float = 1e-3,
    active: NDArray[Any] | None = None,
) -> NDArray[np.float64]:
    """Solve GEM's dual: argmin_v ½ v'(GG' + ridge I)v + (Gg)'v subject to v >= margin.

    Args:
        gram: GG', (m, m), the inner products of the m reference gradients.
        gg: Gg, (m,), their inner products with the current gradient.
        margin: lower bound of every multiplier, >= 0 (0.5 in Lopez-Paz & Ranzato 2017).
        ridge: added to the diagonal, so that the program is strictly convex.
        active: which of the m constraints exist; the others get v = 0.

    Returns:
        v (m,) in float64; zeros when no constraint is violated (all Gg >= 0).

    The program has at most one row per past task and is solved exactly by an active-set method.

    >>> gem_dual(np.array([[2.0]]), np.array([-1.0]), margin=0.0, ridge=0.0).tolist()
    [0.5]
    """
    _check.at_least("margin", margin, 0.0)
    _check.at_least("ridge", ridge, 0.0)
    rows = np.arange(len(gg)) if active is None else np.flatnonzero(np.asarray(active))
    v = np.zeros(len(gg))
    q0 = np.asarray(gg, dtype=np.float64)[rows]
    if not (q0 < 0).any():
        return v
    p = np.asarray(gram, dtype=np.float64)[np.ix_(rows, rows)] + ridge * np.eye(len(rows))
    v[rows] = margin + _nonnegative_qp(p, q0 + p @ np.full(len(rows), margin))
    return v


def _nonnegative_qp(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """argmin_{u >= 0} ½ u'pu + q'u by Lawson and Hanson's active set."""
    n = len(q)
    u, free = np.zeros(n), np.zeros(n, dtype=bool)
    tolerance = 1e-13 * max(1.0, float(np.abs(q).max()))
    for _ in range(10 * n + 10):
        gain = np.where(free, -np.inf, -(q + p @ u))
        best = int(gain.argmax())
        if gain[best] <= tolerance:
            break
        free[best] = True
        while True:
            step = np.zeros(n)
            index = np.flatnonzero(free)
            step[index] = np.linalg.lstsq(p[np.ix_(index, index)], -q[index], rcond=None)[0]
            if (step[index] > 0).all():
                u = step
                break
            bad = index[step[index] <= 0]
            ratio = float((u[bad] / np.maximum(u[bad] - step[bad], 1e-300)).min())
            u = u + ratio * (step - u)
            free &= u > 1e-300
            u[~free] = 0.0
    return u


def gem_project(g: Any, G: Any, margin: float = 0.5, ridge: float = 1e-3) -> Any:
    """Return g + G'v*, the gradient nearest to g that agrees with all reference gradients.

    g (P,) and G (m, P), one row per past task; equation 11 of Lopez-Paz & Ranzato 2017 with the
    multipliers of :func:`gem_dual`. With one row, no margin and no ridge it equals A-GEM.

    >>> gem_project(np.array([1.0, 0.0]), np.array([[-1.0, 1.0]]), margin=0.0, ridge=0.0).tolist()
    [0.5, 0.5]
    """
    xp = _namespace(g)
    if xp is np:
        v: Any = gem_dual(G @ G.T, G @ g, margin, ridge)
        return g + v.astype(g.dtype) @ G
    host = (lambda x: x.detach().cpu().numpy()) if xp.__name__ == "torch" else np.asarray
    v = gem_dual(host(G @ G.T), host(G @ g), margin, ridge)
    if xp.__name__ == "torch":
        return g + xp.as_tensor(v, dtype=g.dtype, device=g.device) @ G
    return g + xp.asarray(v, dtype=g.dtype) @ G


def quad_penalty(params: Any, omega: Any, anchor: Any, lam: float = 1.0) -> Any:
    """Return (lam/2) Σ omega (params - anchor)², over arrays or over mappings of arrays.

    >>> float(quad_penalty(np.array([3.0]), np.array([2.0]), np.array([1.0]), lam=0.5))
    2.0
    """
    if isinstance(params, Mapping):
        return sum(quad_penalty(params[k], omega[k], anchor[k], lam) for k in omega)
    d = params - anchor
    return 0.5 * lam * (omega * d * d).sum()


def prox_step(params: Any, omega: Any, anchor: Any, step: float) -> Any:
    """Return argmin_p ½|p - params|² + (step/2) omega (p - anchor)², elementwise.

    With ``step = lr * lam`` this applies a quadratic penalty implicitly after an optimizer's step: it
    is stable for every lam >= 0.

    >>> float(prox_step(np.array([2.0]), np.array([1.0]), np.array([0.0]), 1.0)[0])
    1.0
    """
    w = step * omega
    return params + (w / (1.0 + w)) * (anchor - params)


def reservoir_slots(
    seen: int, n: int, capacity: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return the slots of items ``seen .. seen + n - 1``; a slot >= capacity means: not stored.

    Vitter's algorithm R: item number i (1-based) draws from {0, ..., i - 1}, or enters slot i - 1
    while the memory fills. All slots of a batch are drawn at once; of two items for one slot the later stays.

    >>> reservoir_slots(0, 3, 5, np.random.default_rng(0)).tolist()
    [0, 1, 2]
    """
    _check.count("capacity", capacity)
    _check.count("seen", seen, 0)
    return slots_from_uniforms(rng.random(n), seen, capacity)


def slots_from_uniforms(u: NDArray[np.float64], seen: int, capacity: int) -> NDArray[np.int64]:
    """Map uniforms in [0, 1) to reservoir slots of items ``seen``, ``seen + 1``, ..."""
    number = seen + np.arange(len(u))
    drawn = np.minimum((u * (number + 1)).astype(np.int64), number)
    slots = np.where(number < capacity, number, drawn)
    return last_wins(np.minimum(slots, capacity), capacity)


def last_wins(slots: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Drop (set to ``capacity``) all but the last of equal slots."""
    slots = np.asarray(slots, dtype=np.int64).copy()
    kept = np.flatnonzero(slots < capacity)
    if len(kept) > 1:
        reverse = slots[kept][::-1]
        _, first = np.unique(reverse, return_index=True)
        drop = np.ones(len(kept), dtype=bool)
        drop[len(kept) - 1 - first] = False
        slots[kept[drop]] = capacity
    return slots


def herding(features: Any, k: int, *, normalize: bool = True) -> NDArray[np.int64]:
    """Return the k rows whose running means follow the mean feature most closely (iCaRL, Algorithm 4).

    Greedy: the next row minimises ‖μ - (φ + Σ chosen)/(j + 1)‖; no row twice, ties to the lowest
    index. ``features`` is (N, d); ``normalize`` scales every row to length 1 first.

    >>> herding(np.array([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7]]), 2).tolist()
    [2, 0]
    """
    if not isinstance(features, np.ndarray) and hasattr(features, "detach"):
        features = features.detach().cpu().numpy()
    phi = np.asarray(features, dtype=np.float64).reshape(len(features), -1)
    _check.count("k", k)
    if normalize:
        phi = phi / np.maximum(np.linalg.norm(phi, axis=1, keepdims=True), 1e-12)
    mean, total = phi.mean(0), np.zeros(phi.shape[1])
    chosen: list[int] = []
    open_ = np.ones(len(phi), dtype=bool)
    for j in range(min(k, len(phi))):
        distance = ((mean - (phi + total) / (j + 1)) ** 2).sum(1)
        # Rounding to 12 digits makes ties of equal rows exact, whatever the order of summation.
        best = int(np.where(open_, np.round(distance, 12), np.inf).argmin())
        chosen.append(best)
        open_[best] = False
        total += phi[best]
    return np.array(chosen, dtype=np.int64)


def fisher_diagonal(
    model: torch.nn.Module, loader: Any, kind: str = "empirical", **options: Any
) -> dict[str, torch.Tensor]:
    """Return the diagonal Fisher information of a classifier's trainable parameters.

    F_k = (1/N) Σ_n (∂ log p(y_n|x_n) / ∂θ_k)². See :func:`sequel.fisher.fisher_diagonal` for the kinds
    (``"empirical"``, ``"true"``, ``"mc"``, ``"batch"``) and options. ``loader`` yields (x, y) batches.

    >>> import torch
    >>> x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([0])
    >>> F = fisher_diagonal(torch.nn.Linear(2, 2), [(x, y)])
    >>> sorted(F), F["weight"].shape
    (['bias', 'weight'], torch.Size([2, 2]))
    """
    from sequel.fisher import fisher_diagonal as compute

    return compute(model, loader, kind, **options)
