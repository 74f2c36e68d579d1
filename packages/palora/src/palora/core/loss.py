r"""From T losses to one: scalarisations, regularisers, and the training objective over M rays.

.. math:: L = \sum_{m=1}^M \sum_{t=1}^T λ_t^{(m)} L_t(θ(λ^{(m)}))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from palora.core.balance import FullBalance, GradBalance, LossBalance, Precomputed
from palora.core.inject import adapted_layers
from palora.core.preference import state_of
from palora.core.rays import as_rays, multi

__all__ = [
    "StepOutput",
    "cosine_diversity",
    "multiforward_regularizer",
    "scalarize",
    "step_loss",
]

Kind = Literal["linear", "tchebycheff", "smooth-tchebycheff"]


def scalarize(
    losses: Tensor,
    lam: Tensor,
    kind: Kind = "linear",
    *,
    reference: Tensor | Sequence[float] | None = None,
    smoothing: float = 0.1,
) -> Tensor:
    r"""Reduce the last dimension of ``losses (..., T)`` to one value by the preference.

    Args:
        losses: ``(..., T)``.
        lam: λ, broadcastable to it.
        kind: ``"linear"`` :math:`\sum_t λ_t L_t`; ``"tchebycheff"`` :math:`\max_t λ_t(L_t−z_t)`,
            which reaches non-convex parts of a front; ``"smooth-tchebycheff"``
            :math:`μ \log\sum_t \exp(λ_t(L_t−z_t)/μ)`.
        reference: z, the ideal point; None: 0.
        smoothing: μ > 0.

    Raises:
        ValueError: the last dimensions differ, an unknown kind, or μ ≤ 0.

    Example:
        >>> scalarize(torch.tensor([1., 3.]), torch.tensor([.25, .75]))
        tensor(2.5000)
    """
    if losses.shape[-1:] != lam.shape[-1:]:
        raise ValueError(
            f"losses have {tuple(losses.shape[-1:])} tasks, the preference {tuple(lam.shape[-1:])}"
        )
    lam = lam.to(losses.device, losses.dtype)
    if kind == "linear":
        return (lam * losses).sum(-1)
    ideal = 0.0 if reference is None else torch.as_tensor(reference).to(losses)
    weighed = lam * (losses - ideal)
    if kind == "tchebycheff":
        return weighed.amax(-1)
    if kind != "smooth-tchebycheff":
        raise ValueError(f"kind must be linear, tchebycheff or smooth-tchebycheff; got {kind!r}")
    if smoothing <= 0:
        raise ValueError(f"smoothing must be positive, got {smoothing}")
    return smoothing * torch.logsumexp(weighed / smoothing, -1)


def multiforward_regularizer(
    losses: Tensor, rays: Tensor, sign: Literal["monotone", "reference"] = "monotone"
) -> Tensor:
    r"""Penalise rays whose losses are in the wrong order (PaMaL's multi-forward regulariser).

    For each task the M losses are ordered by decreasing λ_k. ``"monotone"`` is
    :math:`\sum_k \log(\frac{1}{M−1} \sum_i \exp(\mathrm{relu}(ℓ_i−ℓ_{i+1})))`, zero for a valid
    front: less weight, more loss; among rays of equal λ_k every order is valid. ``"reference"`` is the released formula, with the opposite sign
    inside relu and T−1 for M−1; it penalises the *right* order.

    Args:
        losses: ``(M, T)``.
        rays: ``(M, T)``.
        sign: which of the two.

    Example:
        >>> front = torch.tensor([[1., 3.], [2., 2.], [3., 1.]])
        >>> multiforward_regularizer(front, torch.tensor([[1., 0.], [.5, .5], [0., 1.]]))
        tensor(0.)
    """
    count, tasks = losses.shape
    if count < 2:
        raise ValueError(f"the multi-forward regulariser compares rays: it needs 2, got {count}")
    rays = rays.to(losses.device)
    if sign == "monotone":  # among equal λ_k the smaller loss first: no step of theirs counts
        first = losses.detach().argsort(dim=0, stable=True)
        losses, rays = losses.gather(0, first), rays.gather(0, first)
    order = rays.argsort(dim=0, descending=True, stable=True)
    sorted_losses = losses.gather(0, order)
    step = sorted_losses[:-1] - sorted_losses[1:]
    if sign == "reference":
        return ((-step).relu().exp().sum(0) / (tasks - 1)).log().sum()
    if sign != "monotone":
        raise ValueError(f"sign must be 'monotone' or 'reference', got {sign!r}")
    return (step.relu().exp().sum(0) / (count - 1)).log().sum()


def cosine_diversity(model: nn.Module) -> Tensor:
    """Mean over layers and pairs of tasks of (cos(A_i, A_j) + cos(B_i, B_j))/2; cos of zero is 0.

    Add it, times a coefficient, to the loss in order to drive the adapters apart.
    """
    terms = []
    for _, layer in adapted_layers(model):
        for stack in (layer.palora_A, layer.palora_B):
            flat = stack.flatten(1)
            # clamp under the root: the gradient at B = 0 is zero, not NaN
            norm = flat.pow(2).sum(1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny).sqrt()
            unit = flat / norm
            gram = unit @ unit.t()
            tasks = len(gram)
            terms.append((gram.sum() - gram.diagonal().sum()) / (tasks * (tasks - 1)))
    return torch.stack([t.to(terms[0]) for t in terms]).mean()


@dataclass
class StepOutput:
    """What one training step computed.

    Attributes:
        loss: the scalar to call ``backward()`` on (detached when step_loss did that itself).
        losses: ``(M, T)`` losses of each ray, detached.
        weights: ``(M, T)`` weights that multiplied them: λ times the balancing, detached.
    """

    loss: Tensor
    losses: Tensor
    weights: Tensor


Balance = LossBalance | GradBalance | FullBalance


def step_loss(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    batch: Any,
    rays: Any,
    *,
    balance: Balance | Literal["ls"] | None = None,
    reduction: Literal["sum", "mean"] = "sum",
    chunk: int | None = None,
    backward: bool = False,
    norm: Literal["per-ray", "joint"] = "per-ray",
    shared_mask: bool = False,
    scalarization: Kind = "linear",
    reference: Tensor | Sequence[float] | None = None,
    smoothing: float = 0.1,
    multiforward: float = 0.0,
    multiforward_sign: Literal["monotone", "reference"] = "monotone",
    batch_args: Sequence[int | str] | None = None,
) -> StepOutput:
    r"""Run one batch at M preferences and return the training loss.

    Args:
        model: an injected model.
        loss_fn: ``loss_fn(output, *targets)`` returns the T scalar losses of one ray, as a
            sequence, a tensor ``(T,)`` or a dict by task name.
        batch: ``(inputs, *targets)``; inputs may be a tensor, a tuple (positional arguments) or a
            dict (keyword arguments). A dict as the whole batch goes to the model as keywords, and
            ``loss_fn(output, batch)``.
        rays: ``(M, T)`` preferences, as from :class:`palora.Schedule`.
        balance: None or ``"ls"`` for the plain weighted sum; or a :class:`LossBalance`,
            :class:`GradBalance` or :class:`FullBalance`.
        reduction: over rays; the paper sums.
        chunk: rays in one pass; None: all (gradient balancing always runs ray by ray).
        backward: backpropagate here, chunk after chunk: memory of ``chunk`` rays only.
        norm: see :func:`palora.multi`.
        shared_mask: see :func:`palora.multi`.
        scalarization: see :func:`scalarize`.
        reference: see :func:`scalarize`.
        smoothing: see :func:`scalarize`.
        multiforward: coefficient of :func:`multiforward_regularizer`.
        multiforward_sign: its sign.
        batch_args: see :func:`palora.multi`.

    Raises:
        ValueError: not T losses, losses that are not scalars, or options that exclude each other.

    Example:
        >>> import palora
        >>> net = palora.inject(nn.Linear(4, 2), 2, rank=1)
        >>> def losses(y, target): return [(y[:, 0] - target).abs().mean(), y[:, 1].pow(2).mean()]
        >>> out = step_loss(net, losses, (torch.ones(8, 4), torch.zeros(8)), [[.5, .5], [.1, .9]])
        >>> out.loss.backward(), tuple(out.losses.shape)
        (None, (2, 2))
    """
    state = state_of(model)
    values = as_rays(rays, state)
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    if balance == "ls":
        balance = None
    if balance is not None and not isinstance(balance, LossBalance | GradBalance | FullBalance):
        raise ValueError(
            f"balance must be None, 'ls', LossBalance, GradBalance or FullBalance; got {balance!r}"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    by_gradient = isinstance(balance, GradBalance | FullBalance)
    if by_gradient and scalarization != "linear":
        raise ValueError("gradient balancing is defined for scalarization='linear'")
    if by_gradient and values.requires_grad:
        raise ValueError("gradient balancing weighs by fixed preferences: detach the rays")
    if multiforward and (by_gradient or (backward and chunk is not None and chunk < len(values))):
        raise ValueError(
            "the multi-forward regulariser compares all rays of a step: it does not go with "
            "gradient balancing, nor with backward=True in chunks"
        )
    factor = 1 / len(values) if reduction == "mean" else 1.0
    size = 1 if by_gradient else (chunk or len(values))
    total: Tensor | None = None
    all_losses, all_weights = [], []
    collected: dict[int, tuple[Tensor, Tensor | None]] = {}
    for part in values.split(size):
        options: dict[str, Any] = {
            "norm": norm,
            "shared_mask": shared_mask,
            "batch_args": batch_args,
        }
        scalars = _ray_losses(model, loss_fn, batch, part, state.tasks, options)
        vectors = [torch.stack(row) for row in scalars]
        if by_gradient:
            assert isinstance(balance, GradBalance | FullBalance)
            piece, weights = _by_gradient(model, balance, scalars[0], part[0], factor, collected)
        else:
            scale = [balance(v) if isinstance(balance, LossBalance) else None for v in vectors]
            kept = [v if w is None else v * w for v, w in zip(vectors, scale, strict=True)]
            piece = (
                factor
                * torch.stack(
                    [
                        scalarize(v, lam, scalarization, reference=reference, smoothing=smoothing)
                        for v, lam in zip(kept, part, strict=True)
                    ]
                ).sum()
            )
            weights = torch.stack(
                [
                    lam.to(v) if w is None else lam.to(v) * w
                    for v, lam, w in zip(vectors, part, scale, strict=True)
                ]
            )
            if multiforward and size >= len(values):
                piece = piece + multiforward * multiforward_regularizer(
                    torch.stack(vectors), part.detach(), multiforward_sign
                )
            if backward:
                piece.backward()
                piece = piece.detach()
        total = piece if total is None else total + piece
        all_losses += vectors
        all_weights.append(weights.detach())
    assert total is not None
    stacked = torch.stack(all_losses)
    if multiforward and size < len(values):
        total = total + multiforward * multiforward_regularizer(
            stacked, values.detach(), multiforward_sign
        )
    if by_gradient:
        total = _deliver(total, collected, backward)
    return StepOutput(total, stacked.detach(), torch.cat(all_weights))


def _ray_losses(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    batch: Any,
    rays: Tensor,
    tasks: Sequence[str],
    options: dict[str, Any],
) -> list[list[Tensor]]:
    """The T losses of each ray, in one pass."""
    args, kw, targets = split_batch(batch)
    single = 1 if len(rays) == 1 else None
    outputs = multi(model, rays, *args, chunk=single, **options, **kw)
    found = []
    for m in range(len(rays)):
        one = tree_map(lambda leaf, m=m: leaf[m] if isinstance(leaf, Tensor) else leaf, outputs)
        found.append(as_losses(loss_fn(one, *targets), tasks))
    return found


def split_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...]]:
    """The model's arguments and keywords, and the targets, of one batch."""
    if isinstance(batch, Mapping):
        return (), dict(batch), (batch,)
    if isinstance(batch, Tensor) or not isinstance(batch, Sequence) or not len(batch):
        raise ValueError(f"batch must be (inputs, *targets) or a dict, got {type(batch).__name__}")
    inputs, *targets = batch
    if isinstance(inputs, Mapping):
        return (), dict(inputs), tuple(targets)
    args = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    return args, {}, tuple(targets)


def as_losses(found: Any, tasks: Sequence[str]) -> list[Tensor]:
    """Check what a loss function returned: one scalar per task.

    Raises:
        ValueError: not T losses, or not scalars.
        KeyError: a dict without some task, or with an unknown one.
    """
    if isinstance(found, Mapping):
        if set(found) != set(tasks):
            raise KeyError(f"losses are named {list(found)}; the tasks are: {', '.join(tasks)}")
        found = [found[name] for name in tasks]
    if isinstance(found, Tensor):
        if found.dim() != 1:
            raise ValueError(
                f"loss_fn must return {len(tasks)} scalar losses, got a tensor of shape "
                f"{tuple(found.shape)}"
            )
        found = list(found.unbind())
    found = list(found)
    if len(found) != len(tasks):
        raise ValueError(f"loss_fn must return {len(tasks)} losses, one per task; got {len(found)}")
    found = [torch.as_tensor(x) for x in found]
    shapes = [tuple(x.shape) for x in found]
    if any(shape != () for shape in shapes):
        raise ValueError(f"losses must be scalars, got shapes {shapes}; reduce them over the batch")
    scalars: list[Tensor] = found
    return scalars


def _by_gradient(
    model: nn.Module,
    balance: GradBalance | FullBalance,
    scalars: list[Tensor],
    lam: Tensor,
    factor: float,
    collected: dict[int, tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor]:
    """Add one ray's combined gradient to ``collected``; return its loss and weights."""
    losses = torch.stack(scalars).detach()
    own, grad = torch.ones_like(losses), balance
    if isinstance(balance, FullBalance):
        own, grad = balance.loss(losses), balance.grad
        scalars = [w * x for w, x in zip(own.unbind(), scalars, strict=True)]
        losses = losses * own
    assert isinstance(grad, GradBalance)
    parameters, rows, weights = grad.gradients(model, scalars)
    lam = lam.to(losses)
    share = (lam * weights * factor).unbind()
    for i, parameter in enumerate(parameters):
        held = collected.get(id(parameter), (parameter, None))[1]
        for weight, row in zip(share, rows, strict=True):
            gradient = row[i]
            if gradient is not None:
                term = weight.to(gradient) * gradient
                held = term if held is None else held + term
        collected[id(parameter)] = (parameter, held)
    value = factor * (lam * weights * losses).sum()
    return value, (lam * weights * own)[None]


def _deliver(
    value: Tensor, collected: dict[int, tuple[Tensor, Tensor | None]], backward: bool
) -> Tensor:
    """Put the combined gradients behind a scalar whose ``backward()`` hands them out."""
    parameters = [p for p, _ in collected.values()]
    out: Tensor = Precomputed.apply(  # type: ignore[no-untyped-call]
        value, [g for _, g in collected.values()], *parameters
    )
    if backward:
        out.backward()
        return out.detach()
    return out
