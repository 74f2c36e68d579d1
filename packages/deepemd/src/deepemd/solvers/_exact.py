"""Exact optimal matchings and transport plans, by SciPy, lapx or POT, in worker processes if asked."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepemd.core.bounds import potentials_from_matching
from deepemd.core.distance import cost_matrix
from deepemd.core.output import Solution

Array = NDArray[Any]
BACKENDS = ("auto", "scipy", "lapx", "pot")
_HIGHS_LIMIT = 40_000  # variables that SciPy's linear-programming solver does in about a second


def installed(module: str) -> bool:
    """Tell whether an optional library can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def require(module: str, extra: str) -> None:
    """Raise an ImportError that names the extra of this package which brings ``module``."""
    if not installed(module):
        raise ImportError(f'this needs {module}: pip install "deepemd[{extra}]"')


def _lap_scipy(cost: Array) -> Array:
    from scipy.optimize import (
        linear_sum_assignment,  # here: it takes longer to import than all else
    )

    rows, columns = linear_sum_assignment(cost)
    index = np.full(cost.shape[0], -1, dtype=np.int64)
    index[rows] = columns
    return index


def _lap_lapx(cost: Array) -> Array:
    import lap

    return np.asarray(lap.lapjv(cost, extend_cost=True)[1], dtype=np.int64)


def _lap_pot(cost: Array) -> Array:
    import ot

    n = len(cost)
    plan = ot.emd(np.full(n, 1 / n), np.full(n, 1 / n), cost, numItermax=10_000_000)
    return np.asarray(plan.argmax(1), dtype=np.int64)


_LAP: dict[str, Callable[[Array], Array]] = {
    "scipy": _lap_scipy,
    "lapx": _lap_lapx,
    "pot": _lap_pot,
}


def _solve_one(job: tuple[str, Array]) -> Array:
    backend, cost = job
    return _LAP[backend](cost)


@lru_cache(maxsize=1)
def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def _check_backend(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "lapx":
        require("lap", "exact")
    if backend == "pot":
        require("ot", "pot")
    return "scipy" if backend == "auto" else backend


def assignment(cost: Tensor, *, backend: str = "auto", workers: int | None = None) -> Tensor:
    """Solve the linear assignment problem of each matrix of a batch, exactly.

    Args:
        cost: (B, N, M); for N != M the smaller side is matched, the other rows get -1.
        backend: ``"scipy"`` (also ``"auto"``), ``"lapx"`` or ``"pot"`` (square only).
        workers: processes that share the batch (they stay alive for the next call); None solves here.
            A script that asks for workers must guard its entry with ``if __name__ == "__main__"``.

    Returns:
        (B, N) int64 on the device of ``cost``.

    >>> assignment(torch.tensor([[[2.0, 1.0], [5.0, 9.0]]]))
    tensor([[1, 0]])
    """
    name = _check_backend(backend)
    if name == "pot" and cost.shape[1] != cost.shape[2]:
        raise ValueError("backend='pot' matches clouds of equal size only; use 'scipy'")
    matrices = cost.detach().cpu().numpy()
    jobs = [(name, matrix) for matrix in matrices]
    found = list(_pool(workers).map(_solve_one, jobs)) if workers else [_solve_one(j) for j in jobs]
    index = np.stack(found) if found else np.empty(cost.shape[:2], np.int64)
    return torch.from_numpy(index).to(cost.device)


def solve_exact(
    x: Tensor,
    y: Tensor,
    *,
    p: int = 1,
    backend: str = "auto",
    workers: int | None = None,
    potentials: tuple[Tensor, Tensor] | None = None,
    with_potentials: bool = False,
) -> Solution:
    """Match pairs exactly; D = 1 by sorting, otherwise the assignment problem in float64.

    Args:
        x, y: (B, N, D) and (B, M, D).
        p, backend, workers: see :func:`assignment`.
        potentials: ``(f, g)`` of a warm start. They are subtracted from the rows and columns of the cost,
            which shifts the objective by a constant and leaves the optimum where it is, but gives the
            solver less to do (2.6). Square problems only.
        with_potentials: also return optimal dual potentials.
    """
    n, m = x.shape[1], y.shape[1]
    if n == m and x.shape[2] == 1 and backend == "auto":
        index = torch.empty(len(x), n, dtype=torch.long, device=x.device)
        index.scatter_(1, x[..., 0].argsort(1), y[..., 0].argsort(1))
        cost = cost_matrix(x, y, p) if with_potentials else None
    else:
        cost = cost_matrix(x.double(), y.double(), p) if x.device.type != "mps" else cost_matrix(
            x.cpu().double(), y.cpu().double(), p
        )  # fmt: skip
        reduced = cost
        if potentials is not None and n == m:
            f, g = (each.detach().to(cost) for each in potentials)
            reduced = cost - f.unsqueeze(2) - g.unsqueeze(1)
        index = assignment(reduced, backend=backend, workers=workers).to(x.device)
    inverse = torch.full((len(x), m), -1, dtype=torch.long, device=x.device)
    b, i = (index >= 0).nonzero(as_tuple=True)
    inverse[b, index[b, i]] = i
    converged = torch.ones(len(x), dtype=torch.bool, device=x.device)
    f_out = g_out = None
    if with_potentials and n == m:
        assert cost is not None
        _, f_out, g_out = potentials_from_matching(cost, index.to(cost.device), sweeps=n + 1)
        f_out, g_out = f_out.to(x), g_out.to(x)
    return Solution(index, inverse, f=f_out, g=g_out, converged=converged)


def _plan_pot(a: Array, b: Array, cost: Array) -> tuple[Array, Array, Array]:
    import ot

    plan, log = ot.emd(a, b, cost, numItermax=10_000_000, log=True)
    return plan, log["u"], log["v"]


def _plan_highs(a: Array, b: Array, cost: Array) -> tuple[Array, Array, Array]:
    from scipy.optimize import linprog
    from scipy.sparse import eye_array, kron

    n, m = cost.shape
    rows = kron(eye_array(n), np.ones((1, m)))
    columns = kron(np.ones((1, n)), eye_array(m))
    from scipy.sparse import vstack

    equal = vstack([rows, columns]).tocsr()[: n + m - 1]  # the last row follows from the others
    found = linprog(cost.ravel(), A_eq=equal, b_eq=np.concatenate([a, b])[:-1], method="highs")
    if found.x is None:
        raise RuntimeError(f"SciPy's linear program failed: {found.message}")
    duals = np.append(found.eqlin.marginals, 0.0)
    return found.x.reshape(n, m), duals[:n], duals[n:]


def solve_transport(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    p: int = 1,
    backend: str = "auto",
) -> Solution:
    """Return exact optimal transport plans for clouds of different sizes or with weights (2.7).

    Args:
        x, y: (B, N, D) and (B, M, D).
        a, b: weights (B, N) and (B, M) that sum to 1 (uniform by default).
        p: exponent of the cost.
        backend: ``"pot"`` (network simplex, the extra ``pot``) or ``"scipy"`` (its linear program,
            slower); ``"auto"`` takes POT where it is installed and SciPy for small problems.

    Raises:
        ImportError: POT is not installed and the problem is too large for SciPy's linear program.
    """
    _check_backend(backend)
    n, m = x.shape[1], y.shape[1]
    if backend == "auto":
        backend = "pot" if installed("ot") or n * m > _HIGHS_LIMIT else "scipy"
    if backend == "pot":
        require("ot", "pot")
    solve = _plan_pot if backend == "pot" else _plan_highs
    costs = cost_matrix(x.cpu().double(), y.cpu().double(), p).numpy()
    plans, fs, gs = [], [], []
    for k, cost in enumerate(costs):
        wa = np.full(n, 1 / n) if a is None else a[k].detach().cpu().double().numpy()
        wb = np.full(m, 1 / m) if b is None else b[k].detach().cpu().double().numpy()
        plan, f, g = solve(wa / wa.sum(), wb / wb.sum(), cost)
        plans.append(plan)
        fs.append(f)
        gs.append(g)
    if not plans:
        empty = x.new_zeros(0, n, m)
        return Solution(
            plan=empty, f=x.new_zeros(0, n), g=x.new_zeros(0, m),
            converged=torch.ones(0, dtype=torch.bool, device=x.device),
        )  # fmt: skip
    plan_t, f_t, g_t = (torch.from_numpy(np.stack(part)).to(x) for part in (plans, fs, gs))
    converged = torch.ones(len(x), dtype=torch.bool, device=x.device)
    return Solution(plan=plan_t, f=f_t, g=g_t, converged=converged)
