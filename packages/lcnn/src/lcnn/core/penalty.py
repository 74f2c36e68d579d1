"""What the paper adds to the loss, and the terms it is compared with (Section 4.4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcnn.core.activation import CenteredSoftplus
from lcnn.core.bound import hessian_bound
from lcnn.core.norm import LipschitzNorm

__all__ = [
    "cure_penalty",
    "curvature_surrogate",
    "gradnorm_penalty",
    "jvp_penalty",
    "penalty",
    "per_sample",
]

Form = Literal["sum", "log_bound", "hessian"]
LossFn = Callable[..., Tensor]


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Per-sample cross-entropy, (batch,)."""
    return F.cross_entropy(outputs, y, reduction="none")


def per_sample(loss: Tensor, batch: int) -> Tensor:
    """Return ``loss``, or raise ValueError where it is not one number for each sample."""
    if loss.dim() != 1 or loss.shape[0] != batch:
        raise ValueError(
            f"the loss must have one number per sample, shape ({batch},), got {tuple(loss.shape)}: "
            "pass reduction='none'"
        )
    return loss


def is_compiled(model: object) -> bool:
    """Tell whether ``model``, or a part of it, is the result of ``torch.compile``."""
    parts = model.modules() if isinstance(model, nn.Module) else [model]
    return any(
        "_orig_mod" in getattr(part, "_modules", {})
        or getattr(part, "_compiled_call_impl", None) is not None
        for part in parts
    )


def refuse_compiled(model: object, what: str) -> None:
    """Raise RuntimeError where ``model`` cannot be differentiated twice."""
    if is_compiled(model):
        raise RuntimeError(
            f"{what} needs double backward, which torch.compile does not support on a compiled "
            "module: pass the model itself, and LCNNLoss(compile=True) to compile loss and penalty as one"
        )


def _once(model: nn.Module) -> Iterator[tuple[CenteredSoftplus | None, LipschitzNorm | None]]:
    """Every learnable module, each shared parameter once."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, CenteredSoftplus) and id(module.log_beta) not in seen:
            seen.add(id(module.log_beta))
            if isinstance(module.log_beta, nn.Parameter):
                yield module, None
        if isinstance(module, LipschitzNorm) and id(module.log_lipschitz) not in seen:
            seen.add(id(module.log_lipschitz))
            yield None, module


def _zero(model: nn.Module) -> Tensor:
    first = next(model.parameters(), None)
    if first is None:
        return torch.zeros(())
    # not new_zeros: the zero of a sharded parameter is sharded
    return torch.zeros((), dtype=first.dtype, device=first.device)


def sums(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return (sum of betas, sum of |log Gamma|); a module with one beta per channel counts its mean."""
    betas, gammas = [], []
    for act, norm in _once(model):
        if act is not None:
            betas.append(act.beta.mean())
        if norm is not None:
            gammas.append(norm.log_lipschitz.abs())
    zero = _zero(model)
    return (
        torch.stack(betas).sum() if betas else zero,
        torch.stack(gammas).sum() if gammas else zero,
    )


def _walk(
    module: nn.Module, slope: Tensor, terms: list[Tensor], widths: dict[nn.Module, int]
) -> Tensor:
    """Append log(n_i beta_i prod Gamma_j) of every activation; return the slope after ``module``."""
    if isinstance(module, LipschitzNorm):
        slope = slope + module.log_lipschitz
    if isinstance(module, CenteredSoftplus):
        terms.append(module.beta.max().log() + slope + math.log(widths.get(module, 1)))
        return slope
    branches = getattr(module, "branches", None)
    if branches is not None:
        ends = [_walk(branch, slope, terms, widths) for branch in branches()]
        slope = torch.stack(ends).amax()
        return _walk(module.get_submodule("act"), slope, terms, widths)
    for child in module.children():
        slope = _walk(child, slope, terms, widths)
    return slope


def curvature_surrogate(model: nn.Module, example_input: Tensor | None = None) -> Tensor:
    """Return the paper's data-free sum over activations, sum_i n_i beta_i prod_{j<=i} Gamma_j.

    A surrogate for design and training, no upper limit of anything: norms of products of Jacobians are not
    multiplicative. :func:`hessian_bound` is the provable quantity. Layers are taken in the order in
    which they are registered; the branches of ``lcnn.models``' residual blocks count with the larger slope.

    Args:
        model: a converted model.
        example_input: gives the widths n_i (elements of each activation per sample); 1 without it.

    Raises:
        ValueError: for a model without :class:`CenteredSoftplus`.

    Example:
        >>> round(curvature_surrogate(nn.Sequential(CenteredSoftplus(2.0))).item(), 4)
        2.0
    """
    widths: dict[nn.Module, int] = {}
    if example_input is not None:
        acts = [m for m in model.modules() if isinstance(m, CenteredSoftplus)]

        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            widths[module] = args[0][0].numel()

        handles = [m.register_forward_pre_hook(record) for m in acts]
        try:
            evaluate(model, example_input)
        finally:
            for handle in handles:
                handle.remove()
    return _log_surrogate(model, widths).exp()


def evaluate(model: nn.Module, *inputs: Any) -> Any:
    """Run one forward pass in evaluation mode without gradient, leaving every mode as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            return model(*inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _log_surrogate(model: nn.Module, widths: dict[nn.Module, int]) -> Tensor:
    terms: list[Tensor] = []
    _walk(model, _zero(model), terms, widths)
    if not terms:
        raise ValueError("the model has no CenteredSoftplus: convert it first")
    return torch.logsumexp(torch.stack(terms), 0)


def penalty(
    model: nn.Module, *, beta: float = 1e-2, lipschitz: float = 1e-2, form: Form = "sum"
) -> Tensor:
    """Return the penalty on curvature parameters; no forward pass, a function of parameters alone.

    Args:
        model: a converted model; shared modules count once.
        beta: weight of the betas; 1e-2 in the authors' present code, 1e-3 in their scripts.
        lipschitz: weight of ``|log Gamma|``.
        form: ``"sum"``: ``beta sum_i beta_i + lipschitz sum_i |log Gamma_i|``. ``"log_bound"``: beta times the
            logarithm of :func:`curvature_surrogate`. ``"hessian"``: beta times log(1 + h) with h the
            provable Hessian bound, normalised layers taken at their nominal norm. ``lipschitz`` has no part in
            the last two.

    Raises:
        ValueError: for an unknown form, or a ``"hessian"`` that is not finite.

    Example:
        >>> round(penalty(nn.Sequential(CenteredSoftplus(3.0)), beta=0.1).item(), 4)
        0.3
    """
    if form == "sum":
        betas, gammas = sums(model)
        return beta * betas + lipschitz * gammas
    if form == "log_bound":
        return beta * _log_surrogate(model, {})
    if form == "hessian":
        found = hessian_bound(model, nominal=True)
        if found.unbounded:
            raise ValueError(f"the Hessian is not bounded, because of {', '.join(found.unbounded)}")
        return beta * torch.log1p(found.hessian)
    raise ValueError(f"form must be 'sum', 'log_bound' or 'hessian', got {form!r}")


def input_gradient(loss: Tensor, x: Tensor, *, create_graph: bool) -> Tensor:
    """Return the per-sample gradients (batch, ...) of per-sample losses."""
    if not x.requires_grad:
        raise ValueError(
            "x.requires_grad is False: call x.requires_grad_() before the forward pass"
        )
    per_sample(loss, x.shape[0])
    if not loss.requires_grad:
        raise ValueError("the loss does not depend on x")
    (g,) = torch.autograd.grad(loss.sum(), x, create_graph=create_graph, allow_unused=True)
    if g is None:
        raise ValueError("the loss does not depend on x")
    return g


def gradnorm_penalty(loss_per_sample: Tensor, x: Tensor, *, create_graph: bool = True) -> Tensor:
    """Return mean_b ||grad_x l_b||^2, which does not depend on the batch size (Section 4.4).

    The authors' expression, on the gradient of the batch mean, equals 100/B^2 times this: 6.1e-3 at B = 128.

    Args:
        loss_per_sample: (batch,), computed from ``x``.
        x: (batch, ...), a leaf that requires a gradient.
        create_graph: so that the result can be differentiated.

    Raises:
        ValueError: for a loss that is not one number per sample, or does not depend on ``x``.

    Example:
        >>> x = torch.tensor([[3.0, 4.0]], requires_grad=True)
        >>> gradnorm_penalty(x.square().sum(1) / 2, x).item()
        25.0
    """
    g = input_gradient(loss_per_sample, x, create_graph=create_graph)
    return g.flatten(1).square().sum(1).mean()


def cure_penalty(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    h: float = 1.0,
    loss_fn: LossFn = cross_entropy,
    squared: bool = True,
) -> Tensor:
    """Return mean_b ||grad l(x + z) - grad l(x)||^2 with z = h sign(grad l) / ||sign(grad l)||.

    CURE (Moosavi-Dezfooli et al. 2019), a finite difference of the loss's curvature; z carries no gradient.

    Args:
        model: the network.
        x: (batch, ...).
        y: labels.
        h: length of the step.
        loss_fn: (outputs, y) -> (batch,).
        squared: False for the norm itself, as in CURE's own code.

    Raises:
        RuntimeError: for a compiled model.
        ValueError: where the loss is not one number per sample.

    Example:
        >>> x, y = torch.zeros(2, 3), torch.tensor([0, 1])
        >>> cure_penalty(torch.nn.Linear(3, 2), x, y).item() >= 0
        True
    """
    refuse_compiled(model, "cure_penalty")
    x = x.detach().requires_grad_()
    g = input_gradient(loss_fn(model(x), y), x, create_graph=True)
    return _cure(model, x, y, g, h, loss_fn, squared)


def _cure(
    model: Any, x: Tensor, y: Tensor, g: Tensor, h: float, loss_fn: LossFn, squared: bool
) -> Tensor:
    sign = g.detach().sign().flatten(1)
    z = (h * sign / sign.norm(dim=1, keepdim=True).clamp_min(1e-12)).view_as(x)
    moved = (x.detach() + z).requires_grad_()
    other = input_gradient(loss_fn(model(moved), y), moved, create_graph=True)
    gap = (other - g).flatten(1).square().sum(1)
    # the square root has no slope at 0
    return gap.mean() if squared else (gap + torch.finfo(gap.dtype).tiny).sqrt().mean()


def jvp_penalty(model: nn.Module, x: Tensor, g: Tensor, *, eta: float = 1e-3) -> Tensor:
    """Return mean_b sum_i beta_i ||a_i(x + eta d) - a_i(x)|| with d = g / ||g||.

    A finite-difference proxy of layer slopes; a_i is the input of the i-th activation.

    Args:
        model: a converted model.
        x: (batch, ...).
        g: direction for each sample, as the gradient of its loss; carries no gradient here.
        eta: step.

    Raises:
        ValueError: for a model without :class:`CenteredSoftplus`.

    Example:
        >>> x = torch.randn(2, 3)
        >>> jvp_penalty(nn.Sequential(nn.Linear(3, 4), CenteredSoftplus()), x, x).item() > 0
        True
    """
    acts = [m for m in model.modules() if isinstance(m, CenteredSoftplus)]
    if not acts:
        raise ValueError("the model has no CenteredSoftplus: convert it first")
    records: list[tuple[CenteredSoftplus, Tensor]] = []

    def record(module: nn.Module, args: Sequence[Any]) -> None:
        assert isinstance(module, CenteredSoftplus)
        records.append((module, args[0]))

    direction = g.detach().flatten(1)
    direction = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-12)
    handles = [m.register_forward_pre_hook(record) for m in acts]
    try:
        # one batch of both points: batch statistics, where they are used, are shared
        model(torch.cat([x.detach(), x.detach() + eta * direction.view_as(x)]))
    finally:
        for handle in handles:
            handle.remove()
    total = _zero(model)
    for act, value in records:
        here, there = value.flatten(1).chunk(2)
        gap = (there - here).square().sum(1) + torch.finfo(value.dtype).tiny
        total = total + act.beta.mean() * gap.sqrt().mean()
    return total
