"""The solvers as functions of their own; :func:`deepemd.match` checks the input and adds the bounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepemd.core.output import EMDOutput, is_bijection
from deepemd.solvers._exact import assignment

# deepemd.api is imported inside the functions: it stands on this package's algorithms.


def exact(
    x: Tensor, y: Tensor | None = None, *, backend: str = "auto", workers: int | None = None, **options: Any
) -> EMDOutput:  # fmt: skip
    """Match exactly: two clouds, or a matrix of costs.

    Args:
        x: (B, N, D) with ``y``; without it a cost matrix (N, M) or (B, N, M), of any sign.
        y: (B, M, D) or None.
        backend: ``"scipy"`` (``"auto"``), ``"lapx"`` or ``"pot"``.
        workers: processes that share the batch.
        **options: of :func:`deepemd.match`, with ``y`` only.

    >>> exact(torch.tensor([[4.0, 1.0], [2.0, 9.0]])).distance.item()
    1.5
    """
    from deepemd.api import match

    if y is not None:
        return match(x, y, method="exact", backend=backend, workers=workers, **options)
    if options:
        raise TypeError(f"a cost matrix takes no options of clouds, got {sorted(options)}")
    if x.ndim not in (2, 3) or 0 in x.shape[-2:]:
        raise ValueError(f"costs must be (N, M) or (B, N, M), not empty, got {tuple(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError("costs must be finite; use a large number for a forbidden pair")
    cost = x.unsqueeze(0) if x.ndim == 2 else x
    index = assignment(cost.double(), backend=backend, workers=workers)
    size = cost.shape[2]
    inverse = torch.full((len(cost), size), -1, dtype=torch.long, device=cost.device)
    b, i = (index >= 0).nonzero(as_tuple=True)
    inverse[b, index[b, i]] = i
    chosen = cost.gather(2, index.clamp_min(0).unsqueeze(2)).squeeze(2)
    pairs = torch.full((len(cost),), min(cost.shape[1:]), device=cost.device)
    total = torch.where(index >= 0, chosen, torch.zeros_like(chosen)).sum(1) / pairs
    done = torch.ones(len(cost), dtype=torch.bool, device=cost.device)
    bound = total.detach()
    out = EMDOutput(
        total, index, inverse, None, None, bound, bound, is_bijection(index, size, pairs), 0, done,
        "exact",
    )  # fmt: skip
    return out if x.ndim == 3 else out.squeeze()


def auction(
    x: Tensor, y: Tensor, eps: float | None = 1e-3, *, prices: Tensor | None = None,
    scaling: float = 5.0, max_iter: int = 100_000, **options: Any,
) -> EMDOutput:  # fmt: skip
    """Match by auction; the mean cost ends at most ``eps`` times the largest cost above the optimum.

    Args:
        x, y: (B, N, D) and (B, M, D).
        eps: relative to the largest cost of each pair.
        prices: (B, M) starting prices, minus the second potential; scaling then starts from there too.
        scaling: factor of ε from phase to phase.
        max_iter: rounds; ``converged`` is False where they did not suffice.
        **options: of :func:`deepemd.match`.

    >>> x = torch.rand(1, 20, 3)
    >>> out = auction(x, x + 1)
    >>> bool(out.lower <= 3**0.5 + 1e-5), bool(out.distance < 3**0.5 + 0.01)
    (True, True)
    """
    from deepemd.api import match

    return match(
        x,
        y,
        method="auction",
        eps=eps,
        prices=prices,
        scaling=scaling,
        max_iter=max_iter,
        **options,
    )


def sinkhorn(
    x: Tensor, y: Tensor, reg: float = 1e-2, n_iter: int = 1000, *, anneal: bool = True,
    tol: float = 1e-3, **options: Any,
) -> EMDOutput:  # fmt: skip
    """Solve entropic transport; see :func:`deepemd.solvers._sinkhorn.solve_sinkhorn`.

    Args:
        x, y: (B, N, D) and (B, M, D).
        reg: ε over the mean cost of the pair.
        n_iter, anneal, tol: when to stop.
        **options: of :func:`deepemd.match`: ``a``, ``b``, ``debias``, ``return_plan`` and so on.

    >>> x = torch.zeros(1, 1, 2)
    >>> round(sinkhorn(x, x + 1).distance.item(), 4)
    1.4142
    """
    from deepemd.api import match

    return match(x, y, method="sinkhorn", reg=reg, n_iter=n_iter, anneal=anneal, tol=tol, **options)


def chamfer(x: Tensor, y: Tensor, p: int = 1, **options: Any) -> Tensor:
    """Return the Chamfer distance (B,); ``p=2`` takes squares, ``mean_of_two=True`` halves the sum.

    >>> chamfer(torch.zeros(1, 1, 1), torch.ones(1, 1, 1)).item()
    2.0
    """
    from deepemd.api import emd

    return emd(x, y, method="chamfer", p=p, **options)


def sliced(
    x: Tensor, y: Tensor, n_proj: int = 128, generator: torch.Generator | None = None, **options: Any
) -> Tensor:  # fmt: skip
    """Return the sliced distance (B,) over ``n_proj`` random directions.

    >>> sliced(torch.zeros(1, 5, 3), torch.zeros(1, 5, 3)).item()
    0.0
    """
    from deepemd.api import emd

    return emd(x, y, method="sliced", n_proj=n_proj, generator=generator, **options)
