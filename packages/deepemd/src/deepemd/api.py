"""The functions that do nine tenths of the work: ``emd_loss``, ``emd``, ``match``, ``pairwise_emd``."""

from __future__ import annotations

import inspect
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from deepemd.core.checks import Clouds, check_clouds, check_prices, check_weights
from deepemd.core.decode import DECODERS
from deepemd.core.distance import working
from deepemd.core.errors import NotConvergedError
from deepemd.core.methods import (
    METHODS,
    OPTIONS,
    UNEQUAL,
    WEIGHTED,
    check_solver_options,
    choose,
    run_classical,
    run_network,
)  # fmt: skip
from deepemd.core.model import DeepEMD
from deepemd.core.normalize import MODES, unit_of
from deepemd.core.output import EMDOutput, Solution, is_bijection, sparse_plan

REDUCTIONS = ("mean", "sum", "none")


def _real(mask: Tensor | None, cloud: Tensor) -> Tensor:
    if mask is None:
        return torch.full((len(cloud),), cloud.shape[1], device=cloud.device)
    return mask.sum(1)


def match(
    x: Tensor,
    y: Tensor,
    *,
    method: str = "auto",
    p: int = 1,
    root: bool = False,
    mask_x: Tensor | None = None,
    mask_y: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    model: DeepEMD | str | None = None,
    decode: str = "refine",
    rtol: float = 1e-2,
    unequal: str = "transport",
    chunk_size: int | None = None,
    normalize: str = "pair",
    return_plan: bool = False,
    strict: bool = False,
    check_finite: bool = True,
    **solver_kw: Any,
) -> EMDOutput:
    """Match two point clouds, and say how good the matching is.

    ``EMD(X, Y) = min_φ (1/N) Σ_i ||x_i - y_φ(i)||^p`` over the bijections φ.

    Args:
        x, y: (B, N, D) and (B, M, D), or (N, D) and (M, D), floating point, in any units. Half precision
            is computed in float32, float64 stays.
        method: ``"auto"`` (:func:`explain` says which it stands for), ``"deepemd"`` (the network),
            ``"exact"``, ``"auction"``, ``"sinkhorn"``, ``"chamfer"``, ``"sliced"`` or ``"approxmatch"``.
        p: 1 for Euclidean distances, 2 for their squares.
        root: take the square root of the mean for ``p=2``.
        mask_x, mask_y: (B, N) and (B, M) bool, True for real points. Padding values do not matter.
        a, b: (B, N) and (B, M) weights that sum to 1, for ``"exact"`` and ``"sinkhorn"``.
        model: a :class:`~deepemd.DeepEMD`, a checkpoint's name or folder; default the bundled one.
        decode: how the network's attention becomes a matching: ``"argmax"`` (the paper), ``"both"``,
            ``"soft"``, ``"sinkhorn"``, ``"round"``, or ``"refine"``: a bijection, improved until it is
            certified to ``rtol``.
        rtol: the relative gap that ``"refine"`` certifies.
        unequal: for N != M, ``"transport"`` (exact plans of uniform weights), ``"partial"`` (min(N, M)
            pairs, the rest ignored) or ``"error"``.
        chunk_size: rows of the attention matrix, or of the Chamfer distances, at a time.
        normalize: of the pair before the network: ``"pair"``, ``"rms"`` or ``"none"``.
        return_plan: fill ``plan``: sparse for a matching, dense for a transport plan.
        strict: raise where the solver did not meet its certificate.
        check_finite: check every coordinate once per call.
        **solver_kw: options of the solver: ``backend``, ``workers``, ``warm_start``, ``with_potentials``
            (exact), ``eps``, ``prices``, ``scaling``, ``max_iter`` (auction), ``reg``, ``n_iter``,
            ``anneal``, ``tol``, ``debias`` (sinkhorn), ``mean_of_two`` (chamfer), ``n_proj``, ``seed``,
            ``generator`` (sliced), ``total`` (approxmatch), ``differentiate_weights``,
            ``temperature``, ``max_iter``, ``workers`` (deepemd).

    Returns:
        An :class:`~deepemd.EMDOutput`; without a batch dimension where the input had none.

    Raises:
        TypeError: not tensors, integer coordinates, an option that the solver does not have.
        ValueError: shapes, devices, empty clouds, values that are not finite, weights that do not sum
            to 1, N != M with ``unequal="error"``.
        NotImplementedError: weights for a method without them, the network included.
        NotConvergedError: with ``strict``.

    >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [3.0]])
    >>> out = match(x, y)
    >>> out.distance.item(), out.index.tolist(), out.method
    (1.5, [0, 1], 'exact')
    """
    _check_options(method, p, unequal, normalize, decode, rtol, chunk_size)
    p = int(p)
    clouds = check_clouds(x, y, mask_x, mask_y, check_finite=check_finite)
    weight_a = check_weights("a", a, clouds.x, clouds.mask_x)
    weight_b = check_weights("b", b, clouds.y, clouds.mask_y)
    kind = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    clouds = clouds._replace(x=_clean(clouds.x, clouds.mask_x), y=_clean(clouds.y, clouds.mask_y))
    n, m = _real(clouds.mask_x, clouds.x), _real(clouds.mask_y, clouds.y)
    differ = clouds.x.shape[1] != clouds.y.shape[1] or clouds.mask_x is not None or (
        clouds.mask_y is not None
    )  # fmt: skip
    differ = differ and not torch.equal(n, m)
    if differ and unequal == "error":
        raise ValueError(
            f"x and y have {n.tolist()[:4]} and {m.tolist()[:4]} points; unequal='transport' or "
            "'partial' allows that"
        )
    weighted = weight_a is not None or weight_b is not None
    if method == "auto":
        method, _ = choose(
            clouds.x, clouds.y, unequal=unequal, weighted=weighted, differ=differ, model=model
        )
    if weighted and method not in WEIGHTED:
        raise NotImplementedError(
            f"method={method!r} has no weights of points; use one of {', '.join(WEIGHTED)}"
        )
    if differ and unequal == "partial" and method == "sinkhorn":
        raise ValueError("sinkhorn has no partial matching; use method='exact' or 'auction'")
    check_solver_options(method, solver_kw)
    unit = torch.ones_like(clouds.x[:, :1, :1])
    absolute = method == "approxmatch" or not solver_kw.get("relative", True)
    if not (absolute or (method == "deepemd" and normalize == "none")):
        unit = unit_of(clouds.x, clouds.y)
        clouds = clouds._replace(x=clouds.x / unit, y=clouds.y / unit)
    if solver_kw.get("prices") is not None:
        prices = check_prices(solver_kw["prices"], clouds.y)
        solver_kw["prices"] = prices / unit[..., 0] ** p
    if method == "chamfer":
        solver_kw.setdefault("chunk_size", chunk_size)
    if method == "auction" and "eps" not in solver_kw:
        solver_kw.setdefault("rtol", rtol)
        solver_kw["eps"] = None
    if method == "deepemd":
        found, distance = run_network(
            *clouds[:4], model=model, decode=decode, p=p, rtol=rtol, unequal=unequal,
            chunk_size=chunk_size, normalize=normalize, **solver_kw,
        )  # fmt: skip
    else:
        found, distance = run_classical(
            *clouds[:4], method=method, p=p, unequal=unequal, a=weight_a, b=weight_b,
            normalize=normalize, **solver_kw,
        )  # fmt: skip
    out = _output(clouds, found, distance, method, return_plan)
    if root and p == 2:
        out = _rooted(out)
    out = _scaled(out, unit.view(-1), 1 if root else p, p)
    out = replace(out, distance=out.distance.to(kind))
    if strict and not bool(out.converged.all()):
        gap = out.rel_gap
        told = "" if gap is None else f" (largest relative gap {float(gap.max()):.2g})"
        raise NotConvergedError(
            f"{method} did not converge for {int((~out.converged).sum())} of {len(out.converged)} "
            f"pairs{told}; raise max_iter or n_iter, or loosen rtol, eps or tol"
        )
    return out if clouds.batched else out.squeeze()


def _check_options(
    method: str,
    p: int,
    unequal: str,
    normalize: str,
    decode: str,
    rtol: float,
    chunk_size: int | None,
) -> None:
    for name, value, allowed in (
        ("method", method, METHODS), ("unequal", unequal, UNEQUAL), ("normalize", normalize, MODES),
        ("decode", decode, DECODERS),
    ):  # fmt: skip
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p!r}")
    if not rtol > 0:
        raise ValueError(f"rtol must be positive, got {rtol}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


def _clean(cloud: Tensor, mask: Tensor | None) -> Tensor:
    """Raise half precision and set padding to 0, so that no value of it, NaN included, can leak."""
    cloud = working(cloud)
    if mask is None:
        return cloud
    return torch.where(mask.unsqueeze(-1), cloud, torch.zeros_like(cloud))


def _output(
    clouds: Clouds, found: Solution, distance: Tensor, method: str, return_plan: bool
) -> EMDOutput:
    size = clouds.y.shape[1]
    index = found.index
    false = torch.zeros(len(clouds.x), dtype=torch.bool, device=clouds.x.device)
    bijective = false
    if index is not None:
        most = torch.minimum(_real(clouds.mask_x, clouds.x), _real(clouds.mask_y, clouds.y))
        bijective = is_bijection(index, size, most)
    plan = None
    if return_plan:
        plan = found.plan
        if plan is None and index is not None:
            plan = sparse_plan(index, size, distance.dtype)
    potentials = None if found.f is None or found.g is None else (found.f, found.g)
    assert found.converged is not None
    return EMDOutput(
        distance, index, found.inverse, plan, potentials, found.lower, found.upper, bijective,
        found.iterations, found.converged, method,
    )  # fmt: skip


def _root(value: Tensor) -> Tensor:
    """Square root with derivative 0 at 0."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1.0).sqrt(), 0.0)


def _rooted(out: EMDOutput) -> EMDOutput:
    lower = None if out.lower is None else _root(out.lower)
    upper = None if out.upper is None else _root(out.upper)
    return replace(out, distance=_root(out.distance), lower=lower, upper=upper)


def _scaled(out: EMDOutput, unit: Tensor, times: int, p: int) -> EMDOutput:
    """Take an output back to the units of the input; one factor at a time, as its square may overflow."""

    def scale(value: Tensor, times: int) -> Tensor:
        for _ in range(times):
            value = value * unit.to(value.dtype).view(-1, *[1] * (value.ndim - 1))
        return value

    return replace(
        out,
        distance=scale(out.distance, times),
        lower=None if out.lower is None else scale(out.lower, times),
        upper=None if out.upper is None else scale(out.upper, times),
        potentials=None if out.potentials is None else (
            scale(out.potentials[0], p), scale(out.potentials[1], p)
        ),
    )  # fmt: skip


def emd(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """Return the Earth Mover's Distance of each pair: the mean Euclidean distance of matched points.

    Args:
        x, y: (B, N, D) and (B, M, D), or (N, D) and (M, D).
        **options: those of :func:`match`: ``method``, ``p``, ``root``, masks, weights, ``model``,
            ``decode``, ``rtol``, ``unequal`` and so on.

    Returns:
        (B,), or a scalar for two single clouds; at least float32, differentiable in both.

    >>> x = torch.rand(2, 50, 3)
    >>> bool(torch.allclose(emd(x, x + 1), torch.full((2,), 3**0.5)))
    True
    """
    return match(x, y, **options).distance


def emd_loss(x: Tensor, y: Tensor, *, reduction: str = "mean", **options: Any) -> Tensor:
    """Return the EMD as a training loss, differentiable in both clouds.

    The matching is held constant in the backward pass (envelope theorem):
    ``dEMD/dx_i = u_i / N`` with the unit vector ``u_i`` from the partner of ``x_i``, 0 where they coincide.

    Args:
        x, y: (B, N, D) and (B, M, D), prediction and target, either may require gradients.
        reduction: over the batch: ``"mean"``, ``"sum"`` or ``"none"``.
        **options: those of :func:`match`.

    >>> x = torch.zeros(1, 4, 3, requires_grad=True)
    >>> emd_loss(x, torch.zeros(1, 4, 3)).backward()
    >>> x.grad.abs().max().item()
    0.0
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    distance = emd(x, y, **options)
    if reduction == "none":
        return distance
    return distance.mean() if reduction == "mean" else distance.sum()


class EMDLoss(nn.Module):
    """:func:`emd_loss` as a module; a network given as ``model`` becomes a frozen submodule.

    >>> round(EMDLoss(method="exact")(torch.zeros(1, 2, 3), torch.ones(1, 2, 3)).item(), 4)
    1.7321
    """

    def __init__(
        self, *, model: DeepEMD | str | None = None, reduction: str = "mean", **options: Any
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        known = {*inspect.signature(match).parameters, *chain(*OPTIONS.values())} - {"solver_kw"}
        if unknown := sorted(set(options) - known):
            raise TypeError(f"no option {unknown[0]!r}; match() lists those that there are")
        if model is not None:
            options.setdefault("method", "deepemd")
        self.model = model
        if isinstance(model, DeepEMD):
            model.requires_grad_(bool(options.get("differentiate_weights", False)))
            model.eval()
        self.reduction, self.options = reduction, options

    def extra_repr(self) -> str:
        """Name the options."""
        return ", ".join(
            f"{k}={v!r}" for k, v in {"reduction": self.reduction, **self.options}.items()
        )

    def forward(
        self, x: Tensor, y: Tensor, mask_x: Tensor | None = None, mask_y: Tensor | None = None
    ) -> Tensor:
        """Return the loss of (B, N, D) against (B, M, D)."""
        return emd_loss(
            x, y, reduction=self.reduction, mask_x=mask_x, mask_y=mask_y, model=self.model,
            **self.options,
        )  # fmt: skip


def pairwise_emd(
    x: Tensor, y: Tensor, *, tile: int = 64, mask_x: Tensor | None = None,
    mask_y: Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """Return the EMD between every cloud of one set and every cloud of another.

    It is what coverage, MMD and 1-NN accuracy of generated sets are made from.

    Args:
        x: (P, N, D).
        y: (Q, M, D).
        tile: pairs at a time.
        mask_x, mask_y: (P, N) and (Q, M).
        **options: those of :func:`match`, weights excepted.

    Returns:
        (P, Q).

    >>> clouds = torch.rand(3, 10, 2)
    >>> pairwise_emd(clouds, clouds).diagonal()
    tensor([0., 0., 0.])
    """
    given: tuple[tuple[str, Any], ...] = (("x", x), ("y", y))
    for name, cloud in given:
        if isinstance(cloud, Tensor) and cloud.ndim != 3:
            raise ValueError(f"{name} must be a set of clouds (P, N, D), got {tuple(cloud.shape)}")
    pairs = torch.cartesian_prod(
        torch.arange(len(x), device=x.device), torch.arange(len(y), device=x.device)
    )
    parts = [x.new_zeros(0, dtype=torch.promote_types(x.dtype, torch.float32))]
    for start in range(0, len(pairs), tile):
        i, j = pairs[start : start + tile].unbind(1)
        masks = {
            "mask_x": None if mask_x is None else mask_x[i],
            "mask_y": None if mask_y is None else mask_y[j],
        }
        parts.append(emd(x[i], y[j], **masks, **options))
    return torch.cat(parts).view(len(x), len(y))


def explain(x: Tensor, y: Tensor, **options: Any) -> str:
    """Print which method ``"auto"`` stands for on these clouds, and why; return its name.

    >>> explain(torch.rand(64, 3), torch.rand(64, 3))
    exact: on a CPU nothing certified is faster than exact, up to about N=2048
    'exact'
    """
    clouds = check_clouds(x, y, options.get("mask_x"), options.get("mask_y"))
    differ = not torch.equal(_real(clouds.mask_x, clouds.x), _real(clouds.mask_y, clouds.y))
    method, why = choose(
        clouds.x, clouds.y, unequal=options.get("unequal", "transport"), differ=differ,
        weighted=options.get("a") is not None or options.get("b") is not None,
        model=options.get("model"),
    )  # fmt: skip
    print(f"{method}: {why}")
    return method
