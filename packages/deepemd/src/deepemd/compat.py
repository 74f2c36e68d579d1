"""Drop-in shims with the names, arguments and conventions of the field's other EMD modules.

========================  =====================================================  ==================
module                    what it returns                                        over our ``emd``
========================  =====================================================  ==================
PyTorchEMD                sum over points of the 'approxmatch' cost, per pair    N (if it were exact)
PointFlow, SetVAE         the same over N                                        1
MSN ``emdModule``         squared distance of every point, matched by auction    ``sqrt().mean(1)`` is 1
geomloss ``SamplesLoss``  entropic cost, ``|x-y|^p / p``, debiased by default    1 (p=1, blur -> 0)
========================  =====================================================  ==================
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepemd.api import emd, match
from deepemd.core.distance import gather_points, working
from deepemd.core.methods import cost_of
from deepemd.solvers._sinkhorn import solve_sinkhorn


def earth_mover_distance(
    xyz1: Tensor, xyz2: Tensor, transpose: bool = True, *, method: str = "approxmatch"
) -> Tensor:
    """PyTorchEMD's function: the **sum** of matched distances per pair.

    Args:
        xyz1, xyz2: (B, 3, N) with ``transpose``, else (B, N, 3); any D and N here.
        transpose: its default.
        method: ``"approxmatch"`` gives its numbers; ``"exact"`` or any other gives N times our ``emd``.

    >>> x = torch.rand(1, 10, 3)
    >>> bool(earth_mover_distance(x, x + 1, transpose=False, method="exact") - 10 * 3**0.5 < 1e-4)
    True
    """
    if xyz1.ndim == 2:
        xyz1 = xyz1.unsqueeze(0)
    if xyz2.ndim == 2:
        xyz2 = xyz2.unsqueeze(0)
    if transpose:
        xyz1, xyz2 = xyz1.transpose(1, 2), xyz2.transpose(1, 2)
    value = emd(xyz1, xyz2, method=method)
    return value if method == "approxmatch" else value * xyz1.shape[1]


class emdModule(nn.Module):
    """MSN's module: ``dist, assignment = emdModule()(x1, x2, eps, iters)``.

    ``dist`` (B, N) holds **squared** distances, ``assignment`` (B, N) int32 the partners: users take
    ``dist.sqrt().mean(1)``. Here the assignment is one-to-one, any N and D will do, and both clouds
    receive gradients. ``eps`` is absolute, in the units of the coordinates, as there.
    """

    def forward(self, x1: Tensor, x2: Tensor, eps: float, iters: int) -> tuple[Tensor, Tensor]:
        """Match (B, N, D) with (B, N, D)."""
        both = torch.cat([x1, x2], 1).detach()
        size = float((both.amax(1) - both.amin(1)).norm(dim=-1).amax()) if both.numel() else 1.0
        out = match(x1, x2, method="auction", eps=max(eps / max(size, 1e-30), 1e-7), max_iter=iters)
        assert out.index is not None
        dist = (working(x1) - gather_points(working(x2), out.index)).square().sum(-1)
        return dist, out.index.int()


class SamplesLoss(nn.Module):
    """geomloss's ``SamplesLoss("sinkhorn")``: ε = blur^p, cost ``|x-y|^p / p``, debiased by default.

    Args:
        loss: only ``"sinkhorn"``.
        p: 1 or 2.
        blur: length scale of the regularisation.
        debias: subtract the two self terms.
        scaling: of the annealing; closer to 1 is slower and more accurate.
        n_iter, tol: of the final sweeps, which geomloss does not have: it stops with the annealing.

    For the EMD itself use ``p=1, debias=False`` and a small ``blur``.
    """

    def __init__(
        self, loss: str = "sinkhorn", p: int = 2, blur: float = 0.05, debias: bool = True,
        scaling: float = 0.5, n_iter: int = 500, tol: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        if loss != "sinkhorn":
            raise ValueError(f"loss must be 'sinkhorn', got {loss!r}; see method= of deepemd.emd")
        if p not in (1, 2):
            raise ValueError(f"p must be 1 or 2, got {p!r}")
        self.p, self.blur, self.debias = p, blur, debias
        self.scaling, self.n_iter, self.tol = scaling, n_iter, tol

    def forward(self, *args: Tensor) -> Tensor:
        """Take ``(x, y)`` or ``(a, x, b, y)``; clouds (N, D) or (B, N, D). Returns a scalar or (B,)."""
        if len(args) == 2:
            (x, y), a, b = args, None, None
        elif len(args) == 4:
            a, x, b, y = args
        else:
            raise ValueError(f"give (x, y) or (a, x, b, y), got {len(args)} tensors")
        batched = x.ndim == 3
        if not batched:
            x, y = x.unsqueeze(0), y.unsqueeze(0)
            a, b = (None if w is None else w.unsqueeze(0) for w in (a, b))
        value = self._one(x, y, a, b)
        if self.debias:
            value = value - (self._one(x, x, a, a) + self._one(y, y, b, b)) / 2
        return value if batched else value[0]

    def _one(self, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        found = solve_sinkhorn(
            working(x), working(y), p=self.p, a=a, b=b, reg=self.p * self.blur**self.p,
            relative=False, n_iter=self.n_iter, scaling=self.scaling, tol=self.tol, value="entropic",
        )  # fmt: skip
        return cost_of(x, y, found, self.p, "sinkhorn") / self.p
