"""Which method answers a call, and how each one is run on pairs without padding."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from deepemd.core import hub
from deepemd.core.bounds import lower_bound, potentials_from_matching
from deepemd.core.decode import STREAMED, decode_logits, decode_streamed
from deepemd.core.distance import cost_matrix, working
from deepemd.core.groups import Group, solve_groups
from deepemd.core.model import DeepEMD
from deepemd.core.output import Solution, matching_cost, plan_cost
from deepemd.solvers._auction import solve_auction
from deepemd.solvers._exact import solve_exact, solve_transport
from deepemd.solvers._simple import solve_approxmatch, solve_chamfer, solve_sliced
from deepemd.solvers._sinkhorn import solve_sinkhorn

METHODS = ("auto", "deepemd", "exact", "auction", "sinkhorn", "chamfer", "sliced", "approxmatch")
UNEQUAL = ("transport", "partial", "error")
WEIGHTED = ("exact", "sinkhorn")
OPTIONS: dict[str, tuple[str, ...]] = {
    "deepemd": (
        "differentiate_weights", "temperature", "sinkhorn_iters", "max_iter", "workers",
    ),
    "exact": ("backend", "workers", "warm_start", "with_potentials"),
    "auction": ("eps", "prices", "scaling", "eps_start", "max_iter", "dense"),
    "sinkhorn": (
        "reg", "relative", "n_iter", "anneal", "scaling", "tol", "value", "debias",
    ),
    "chamfer": ("mean_of_two",),
    "sliced": ("n_proj", "seed", "generator"),
    "approxmatch": ("total",),
}  # fmt: skip
EXACT_LIMIT = 2048
BUNDLED = "tiny"


def check_solver_options(method: str, given: dict[str, Any]) -> None:
    """Raise where the solver does not have one of the options given."""
    for name in given:
        if name not in OPTIONS[method]:
            has = [other for other, names in OPTIONS.items() if name in names]
            hint = f"; it is one of method={' or '.join(map(repr, has))}" if has else ""
            raise TypeError(
                f"method={method!r} has no option {name!r}{hint}; its options are "
                f"{', '.join(OPTIONS[method])}"
            )


def choose(
    x: Tensor, y: Tensor, *, unequal: str, weighted: bool, differ: bool, model: Any
) -> tuple[str, str]:
    """Return the method that ``"auto"`` stands for on these clouds, and the reason."""
    n, m, dim = x.shape[1], y.shape[1], x.shape[2]
    on_cpu = x.device.type == "cpu"
    transport = weighted or (differ and unequal == "transport")
    size = max(n, m)
    if dim == 1 and not differ and not weighted:
        return "exact", "points on a line are matched exactly by sorting"
    if transport:
        if on_cpu and size <= EXACT_LIMIT:
            return "exact", f"weights or different sizes on a CPU, at most {EXACT_LIMIT} points"
        return "sinkhorn", "weights or different sizes, on an accelerator or with many points"
    if on_cpu:
        if size <= EXACT_LIMIT:
            return "exact", (
                f"on a CPU nothing certified is faster than exact, up to about N={EXACT_LIMIT}"
            )
        return "auction", f"on a CPU with more than {EXACT_LIMIT} points; certified"
    covers = isinstance(model, DeepEMD) or dim in hub.from_pretrained(BUNDLED).trained_dims
    if covers and not differ:
        return "deepemd", f"an accelerator, and a checkpoint that covers D={dim}"
    return "auction", f"an accelerator, and no checkpoint that covers D={dim} or these sizes"


def resolve_model(model: DeepEMD | str | None, x: Tensor) -> DeepEMD:
    """Return the network to use: the caller's, one by name, or the bundled one."""
    if isinstance(model, DeepEMD):
        return model
    return hub.cached(model or BUNDLED, str(x.device))


def lift(model: DeepEMD, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Give points a zero for each coordinate that a network of more dimensions expects.

    A planar cloud in space has the same distances. Only for the D that the network was trained on.
    """
    dim = x.shape[2]
    if dim > 16:
        warnings.warn(
            f"clouds of D={dim} coordinates: no checkpoint of this package was trained beyond 3, and the "
            "network's matching may be no better than chance; check rel_gap",
            UserWarning,
            stacklevel=4,
        )
    if dim < model.dim and dim in model.trained_dims:
        pad = (0, model.dim - dim)
        return torch.nn.functional.pad(x, pad), torch.nn.functional.pad(y, pad)
    if dim != model.dim:
        raise ValueError(
            f"the checkpoint reads points of D={', '.join(map(str, model.trained_dims))} coordinates, "
            f"got D={dim}; use method='auction' or 'exact', or train one: deepemd train"
        )
    return x, y


def cost_of(x: Tensor, y: Tensor, found: Solution, p: int, method: str) -> Tensor:
    """Return the differentiable distance (B,) that a solution stands for."""
    if found.value is not None:
        return found.value
    if found.plan is not None:
        return plan_cost(x, y, found.plan, p)
    assert found.index is not None
    if found.inverse is not None and method == "both":
        return (matching_cost(x, y, found.index, p) + matching_cost(y, x, found.inverse, p)) / 2
    if x.shape[1] > y.shape[1] and method == "partial":
        assert found.inverse is not None
        return matching_cost(y, x, found.inverse, p)
    return matching_cost(x, y, found.index, p)


def run_network(
    x: Tensor,
    y: Tensor,
    mask_x: Tensor | None,
    mask_y: Tensor | None,
    *,
    model: DeepEMD | str | None,
    decode: str,
    p: int,
    rtol: float,
    unequal: str,
    chunk_size: int | None,
    normalize: str,
    differentiate_weights: bool = False,
    temperature: float = 1.0,
    **options: Any,
) -> tuple[Solution, Tensor]:
    """Predict and decode. The network runs without gradient unless the weights are differentiated."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if options.get("sinkhorn_iters", 1) < 1:
        raise ValueError(f"sinkhorn_iters must be at least 1, got {options['sinkhorn_iters']}")
    if differentiate_weights and decode not in ("soft", "sinkhorn"):
        raise ValueError(
            "differentiate_weights needs decode='soft' or 'sinkhorn': a matching has none"
        )
    network = resolve_model(model, x)
    lx, ly = lift(network, x, y)
    if decode in STREAMED:
        found = decode_streamed(
            network, lx.detach(), ly.detach(), mask_x, mask_y,
            chunk_size=chunk_size, normalize=normalize,
        )  # fmt: skip
        if network.head.potential is not None and mask_x is mask_y is None and p == 1:
            found = _with_dual_bound(
                network, lx.detach(), ly.detach(), found, normalize, chunk_size
            )
        return found, cost_of(x, y, found, p, decode)
    with torch.set_grad_enabled(differentiate_weights and torch.is_grad_enabled()):
        logits = network(lx, ly, mask_x, mask_y, normalize=normalize)

    def solve(sub_x: Tensor, sub_y: Tensor, group: Group | None) -> tuple[Solution, Tensor]:
        s = logits
        if group is not None:
            rows = group.at_x.unsqueeze(2)
            s = logits[group.items[:, None, None], rows, group.at_y.unsqueeze(1)]
        found = decode_logits(
            s, sub_x.detach(), sub_y.detach(), decode, p=p, rtol=rtol,
            partial=unequal == "partial", temperature=temperature, **options,
        )  # fmt: skip
        distance = cost_of(sub_x, sub_y, found, p, unequal)
        if found.plan is not None:
            found = found.replace(plan=found.plan.detach())
        return found, distance

    return solve_groups(x, y, mask_x, mask_y, solve)


def _with_dual_bound(
    network: DeepEMD, x: Tensor, y: Tensor, found: Solution, normalize: str, chunk_size: int | None
) -> Solution:
    """Attach the bound of a dual head's potentials to a matching that has no bound of its own."""
    if x.shape[1] != y.shape[1]:
        return found
    with torch.no_grad():
        _, g = network.potentials(x, y, normalize=normalize)
    lower, f, g = lower_bound(x, y, g.to(x.dtype), 1, chunk_size)
    return found.replace(lower=lower, f=f, g=g)


def warm_potentials(
    model: DeepEMD | str, x: Tensor, y: Tensor, p: int, normalize: str, sweeps: int = 16
) -> tuple[Tensor, Tensor]:
    """Return potentials from a network: of its dual head, or those that its argmax matching implies."""
    network = resolve_model(model, x)
    lx, ly = lift(network, x, y)
    with torch.no_grad():
        if network.head.potential is not None and p == 1:
            return network.potentials(lx, ly, normalize=normalize)
    index = decode_streamed(network, lx, ly, normalize=normalize).index
    assert index is not None
    _, f, g = potentials_from_matching(cost_matrix(x, y, p), index, sweeps)
    return f, g


def run_classical(
    x: Tensor,
    y: Tensor,
    mask_x: Tensor | None,
    mask_y: Tensor | None,
    *,
    method: str,
    p: int,
    unequal: str,
    a: Tensor | None,
    b: Tensor | None,
    normalize: str,
    warm_start: DeepEMD | str | None = None,
    **options: Any,
) -> tuple[Solution, Tensor]:
    """Run one of the solvers on each group of pairs of equal real size."""
    weighted = a is not None or b is not None

    def solve(sub_x: Tensor, sub_y: Tensor, group: Group | None) -> tuple[Solution, Tensor]:
        dx, dy = sub_x.detach(), sub_y.detach()
        differ = sub_x.shape[1] != sub_y.shape[1]
        wa, wb = a, b
        if group is not None:
            wa = None if a is None else a[group.items.unsqueeze(1), group.at_x]
            wb = None if b is None else b[group.items.unsqueeze(1), group.at_y]
        if method == "exact":
            if weighted or (differ and unequal == "transport"):
                found = solve_transport(dx, dy, wa, wb, p=p, backend=options.get("backend", "auto"))
            else:
                start = None
                if warm_start is not None and not differ:
                    start = warm_potentials(warm_start, dx, dy, p, normalize)
                found = solve_exact(dx, dy, p=p, potentials=start, **options)
        elif method == "auction":
            if differ and unequal == "transport":
                raise ValueError(
                    f"the auction gives a matching, and clouds of {sub_x.shape[1]} and "
                    f"{sub_y.shape[1]} points have none; use unequal='partial', or method='exact' or "
                    "'sinkhorn' for the transport plan"
                )
            own = dict(options)
            if group is not None and own.get("prices") is not None:
                own["prices"] = own["prices"][group.items.unsqueeze(1), group.at_y]
            found = solve_auction(dx, dy, p=p, **own)
        elif method == "sinkhorn":
            return _sinkhorn(sub_x, sub_y, wa, wb, p, **options)
        elif method == "chamfer":
            found = solve_chamfer(sub_x, sub_y, p=p, **options)
        elif method == "sliced":
            found = solve_sliced(sub_x, sub_y, p=p, **options)
        else:
            found = solve_approxmatch(sub_x, sub_y, **options)
        distance = cost_of(sub_x, sub_y, found, p, unequal)
        if method == "exact":
            bound = distance.detach()
            found = found.replace(lower=bound, upper=bound)
        elif found.plan is not None:
            found = found.replace(plan=found.plan.detach())
        if found.converged is None:
            found = found.replace(
                converged=torch.ones(len(sub_x), dtype=torch.bool, device=sub_x.device)
            )
        return found.replace(value=None), distance

    return solve_groups(x, y, mask_x, mask_y, solve)


def _sinkhorn(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    p: int,
    debias: bool = False,
    **options: Any,
) -> tuple[Solution, Tensor]:
    found = solve_sinkhorn(working(x), working(y), p=p, a=a, b=b, **options)
    assert found.plan is not None
    found = found.replace(plan=found.plan.detach())
    distance = cost_of(x, y, found, p, "sinkhorn")
    if debias:
        for cloud, weight in ((x, a), (y, b)):
            own = solve_sinkhorn(cloud, cloud, p=p, a=weight, b=weight, **options)
            distance = distance - cost_of(cloud, cloud, own, p, "sinkhorn") / 2
    return found.replace(value=None), distance
