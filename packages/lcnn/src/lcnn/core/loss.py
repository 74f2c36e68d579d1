"""LCNNLoss: the whole objective as one criterion, and the optimizer's groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcnn.core.activation import CenteredSoftplus
from lcnn.core.norm import LipschitzNorm
from lcnn.core.penalty import (
    Form,
    LossFn,
    _cure,
    cross_entropy,
    input_gradient,
    jvp_penalty,
    penalty,
    per_sample,
    refuse_compiled,
    sums,
)

__all__ = ["LCNNLoss", "Penalty", "param_groups"]


@dataclass
class Penalty:
    """The parts of one loss, detached scalars; ``total`` is what was differentiated."""

    loss: Tensor
    beta: Tensor
    lipschitz: Tensor
    gradnorm: Tensor
    cure: Tensor
    jvp: Tensor
    total: Tensor


def param_groups(
    model: nn.Module, weight_decay: float = 5e-4, *, base: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Return three groups for the optimizer: weights, betas, Gammas, the latter two without decay.

    Args:
        model: a converted model.
        weight_decay: of the weights alone. Default 5e-4, as in the published runs.
        base: further options that every group gets.

    Example:
        >>> groups = param_groups(nn.Sequential(nn.Linear(2, 2), CenteredSoftplus()))
        >>> [len(g["params"]) for g in groups], [g["weight_decay"] for g in groups]
        ([2, 1, 0], [0.0005, 0.0, 0.0])
    """
    betas = _unique(m.log_beta for m in model.modules() if isinstance(m, CenteredSoftplus))
    gammas = _unique(m.log_lipschitz for m in model.modules() if isinstance(m, LipschitzNorm))
    special = {id(p) for p in [*betas, *gammas]}
    rest = [p for p in model.parameters() if id(p) not in special]
    return [
        {**(base or {}), "params": group, "weight_decay": decay, "name": name}
        for name, group, decay in (
            ("weights", rest, weight_decay),
            ("log_beta", betas, 0.0),
            ("log_lipschitz", gammas, 0.0),
        )
    ]


def _unique(parameters: Iterable[Tensor]) -> list[Tensor]:
    return list({id(p): p for p in parameters if isinstance(p, nn.Parameter)}.values())


def _weight(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    return float(value)


class LCNNLoss(nn.Module):
    """The objective of Section 4.4: mean loss plus penalties, called with a batch.

    ``L = mean_b l_b + beta sum_i beta_i + lipschitz sum_i |log Gamma_i| + gradnorm mean_b ||grad_x l_b||^2``
    and, for comparison, ``cure`` and ``jvp`` terms. The last three differentiate twice; autocast is off
    for them unless ``allow_low_precision``. The model is held, not owned: its parameters are not this module's.

    Args:
        model: the network, converted or not.
        loss_fn: ``"cross_entropy"`` or a function (outputs, y) -> (batch,).
        beta: weight of the betas.
        lipschitz: weight of ``|log Gamma|``.
        form: of the parameters' penalty, see :func:`penalty`.
        gradnorm: weight of the gradient-norm term; 6.1e-3 is the paper's at batch size 128.
        cure: weight of :func:`cure_penalty`; 6.1e-5 in the authors' code at batch size 128.
        cure_step: its h.
        cure_squared: False for the norm itself.
        jvp: weight of :func:`jvp_penalty`.
        compile: compile loss and penalties as one function (``torch.func`` inside), for ``cure == jvp == 0``;
            a string names the backend.
        allow_low_precision: keep autocast on for the terms that differentiate twice.

    Raises:
        RuntimeError: for a compiled model where a term differentiates twice.
        ValueError: for a negative weight, or a loss that is not one number per sample.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 8), CenteredSoftplus(), nn.Linear(8, 2))
        >>> criterion = LCNNLoss(model, beta=1e-2, gradnorm=6.1e-3)
        >>> criterion(torch.randn(4, 2), torch.tensor([0, 1, 0, 1])).backward()
        >>> round(criterion.terms["beta"].item(), 4)  # weighted: 1e-2 * 5
        0.05
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: str | LossFn = "cross_entropy",
        *,
        beta: float = 1e-2,
        lipschitz: float = 1e-2,
        form: Form = "sum",
        gradnorm: float = 0.0,
        cure: float = 0.0,
        cure_step: float = 1.0,
        cure_squared: bool = True,
        jvp: float = 0.0,
        compile: bool | str = False,
        allow_low_precision: bool = False,
    ) -> None:
        """Check and keep the arguments; the class says what they are."""
        super().__init__()
        if isinstance(loss_fn, str) and loss_fn != "cross_entropy":
            raise ValueError(f"loss_fn must be 'cross_entropy' or a function, got {loss_fn!r}")
        self.loss_fn: LossFn = cross_entropy if isinstance(loss_fn, str) else loss_fn
        self._held = (model,)
        self.beta, self.lipschitz = _weight("beta", beta), _weight("lipschitz", lipschitz)
        self.form: Form = form
        self.gradnorm, self.cure = _weight("gradnorm", gradnorm), _weight("cure", cure)
        self.cure_step, self.cure_squared = cure_step, cure_squared
        self.jvp = _weight("jvp", jvp)
        self.allow_low_precision = allow_low_precision
        self.last: Penalty | None = None
        self._run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = self._eager
        self._refuse()
        if compile:
            if self.cure or self.jvp:
                raise ValueError("compile=True supports the gradnorm term only, not cure or jvp")
            backend = compile if isinstance(compile, str) else "inductor"
            self._run = torch.compile(self._functional, backend=backend)

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self._held[0]

    def _refuse(self) -> None:
        if self.gradnorm or self.cure or self.jvp:
            refuse_compiled(self.model, "LCNNLoss with gradnorm, cure or jvp")

    @property
    def terms(self) -> dict[str, Tensor]:
        """The weighted parts of the last call and their ``total``, detached, on their device."""
        return {} if self.last is None else dict(vars(self.last))

    def _eager(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss = per_sample(self.loss_fn(self.model(x), y), x.shape[0])
        return loss, loss.new_zeros(())

    def _functional(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Per-sample losses and mean squared gradient, with the gradient inside ``torch.func``.

        ``torch.func`` refuses to write to what it did not get as an argument: running statistics and the
        vectors of the power iteration, so the buffers are arguments, and are updated in place all the same.
        """
        if not self.gradnorm:
            loss = self.loss_fn(self.model(x), y)
            return loss, loss.new_zeros(())

        def total(inputs: Tensor, buffers: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            outputs = torch.func.functional_call(self.model, buffers, (inputs,))
            loss = self.loss_fn(outputs, y)
            return loss.sum(), loss

        buffers = dict(self.model.named_buffers())
        g, loss = torch.func.grad(total, has_aux=True)(x, buffers)
        return loss, g.flatten(1).square().sum(1).mean()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the objective on inputs ``x`` (batch, ...) and targets ``y``, a scalar."""
        if x.shape[0] == 0:
            raise ValueError("x is an empty batch")
        self._refuse()  # again: a model can be compiled after the criterion was made
        twice = bool(self.gradnorm or self.cure or self.jvp)
        low = self.allow_low_precision or not twice
        with torch.autocast(
            x.device.type, enabled=torch.is_autocast_enabled(x.device.type) if low else False
        ):
            eager = self._run == self._eager
            if twice:
                x = x.detach()
                x = x.requires_grad_() if eager else x
            loss, squared = self._run(x, y)
            per_sample(loss, x.shape[0])
            zero = loss.new_zeros(())
            parts = {"loss": loss.mean(), "gradnorm": self.gradnorm * squared}
            if twice and eager:
                g = input_gradient(loss, x, create_graph=True)
                parts["gradnorm"] = self.gradnorm * g.flatten(1).square().sum(1).mean()
                if self.cure:
                    gap = _cure(
                        self.model, x, y, g, self.cure_step, self.loss_fn, self.cure_squared
                    )
                    parts["cure"] = self.cure * gap
                if self.jvp:
                    parts["jvp"] = self.jvp * jvp_penalty(self.model, x, g)
        if self.form == "sum":
            betas, gammas = sums(self.model)
            parts |= {"beta": self.beta * betas, "lipschitz": self.lipschitz * gammas}
        else:
            parts["beta"] = penalty(self.model, beta=self.beta, form=self.form)
        total = torch.stack([p.to(parts["loss"].dtype) for p in parts.values()]).sum()
        kept = {
            k: parts.get(k, zero).detach() for k in Penalty.__dataclass_fields__ if k != "total"
        }
        self.last = Penalty(**kept, total=total.detach())
        return total
