"""EWC, SI, MAS and A-GEM as objects beside any model and any loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sequel import _check
from sequel.algorithms.ewc import EWC as EWCDefinition
from sequel.algorithms.mas import MAS as MASDefinition
from sequel.algorithms.quadratic import merge
from sequel.algorithms.si import SI as SIDefinition
from sequel.fisher import fisher_diagonal
from sequel.functional import agem_project, prox_step, quad_penalty
from sequel.ops.torch import TorchOps

__all__ = ["AGEM", "EWC", "MAS", "SI", "Penalty"]

Select = Callable[[str, nn.Parameter], bool]
OPS = TorchOps()


class _Tree(nn.Module):
    """Buffers under dotted names, so that a state dict reads ``omega.encoder.1.weight``."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            at: nn.Module = self
            *parents, last = name.split(".")
            for key in parents:
                if key not in at._modules:
                    at.add_module(key, nn.Module())
                at = at.get_submodule(key)
            at.register_buffer(last, value.detach().clone())

    def get(self) -> dict[str, Tensor]:
        """Return the buffers by name."""
        return dict(self.named_buffers())

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Replace the buffers."""
        for name, value in values.items():
            parent, _, last = name.rpartition(".")
            setattr(self.get_submodule(parent), last, value.detach().clone())


class Penalty(nn.Module):
    """(lam/2) Σ omega (θ - anchor)² on a model's parameters; the base of EWC, SI and MAS.

    An nn.Module with buffers ``omega.<name>`` and ``anchor.<name>``, at least float32: it moves with ``.to()`` and
    rides in any state dict; a state saved before the model has grown can be loaded after it. The model itself is not a part of it.

    Args:
        model: any module.
        lam: weight, >= 0.
        params: which parameters, by name and value (default: all that require gradients), e.g.
            ``lambda n, p: p.requires_grad and "norm" not in n``, or LoRA's only.

    A parameter that has grown since (rows of a classifier) is matched by its leading rows; new entries have
    omega = 0.
    """

    def __init__(self, model: nn.Module, lam: float = 1.0, params: Select | None = None) -> None:
        super().__init__()
        _check.at_least("lam", lam, 0.0)
        self.lam = lam
        self._model = (model,)
        names = [
            n for n, p in model.named_parameters()
            if (p.requires_grad if params is None else params(n, p))
        ]  # fmt: skip
        if not names:
            raise ValueError("params selects no parameter of the model")
        self.names = names
        current = self.current()
        self.omega = _Tree(OPS.wide(OPS.zeros_like(current)))
        self.anchor = _Tree(OPS.wide(current))
        object.__setattr__(model, "_sequel_penalty", True)

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        for part in (m for m in self.children() if isinstance(m, _Tree)):
            for name, value in part.get().items():
                saved = state.get(f"{prefix}{self._part(part)}.{name}")
                if saved is not None and saved.shape != value.shape:
                    part.put({name: value.new_zeros(saved.shape)})
        super()._load_from_state_dict(state, prefix, *args)

    def _part(self, part: nn.Module) -> str:
        return next(name for name, child in self.named_children() if child is part)

    def extra_repr(self) -> str:
        """Show lam and the number of parameters."""
        return f"lam={self.lam}, {len(self.names)} parameters"

    def current(self) -> dict[str, Tensor]:
        """Return the model's selected parameters."""
        every = dict(self._model[0].named_parameters())
        return {n: every[n] for n in self.names}

    def _fitted(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        params, omega, anchor = self.current(), self.omega.get(), self.anchor.get()
        for name, p in params.items():
            if p.shape != omega[name].shape:
                have = omega[name].shape
                if len(have) != p.dim() or any(a < b for a, b in zip(p.shape, have, strict=True)):
                    raise ValueError(
                        f"parameter {name} has shape {tuple(p.shape)}, its importance {tuple(have)}: "
                        "parameters may grow, not shrink"
                    )
                cut = tuple(slice(0, n) for n in omega[name].shape)
                wide, base = (
                    omega[name].new_zeros(p.shape),
                    p.detach().to(omega[name].dtype, copy=True),
                )
                wide[cut], base[cut] = omega[name], anchor[name]
                self.omega.put({name: wide})
                self.anchor.put({name: base})
                omega[name], anchor[name] = wide, base
        return params, omega, anchor

    def penalty(self) -> Tensor:
        """Return the penalty, to add to a loss."""
        out: Tensor = quad_penalty(*self._fitted(), self.lam)
        return out

    @torch.no_grad()
    def add_grad_(self) -> None:
        """Add lam omega (θ - anchor) to ``.grad``: between backward and step, without a graph."""
        params, omega, anchor = self._fitted()
        for p in params.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        OPS.accumulate(
            {n: p.grad for n, p in params.items()}, omega, OPS.sub(params, anchor), self.lam
        )

    @torch.no_grad()
    def prox_(self, lr: float) -> None:
        """Apply the penalty implicitly after a step with learning rate ``lr``; stable for every lam."""
        _check.above("lr", lr, 0.0)
        params, omega, anchor = self._fitted()
        for n, p in params.items():
            p.copy_(prox_step(p, omega[n], anchor[n], lr * self.lam))

    def _select(self) -> Select:
        chosen = set(self.names)
        return lambda n, p: n in chosen

    def _state(self) -> dict[str, Any]:
        _, omega, anchor = self._fitted()
        return {"omega": omega, "anchor": anchor}

    def _store(self, state: Mapping[str, Any]) -> None:
        self.omega.put(state["omega"])
        self.anchor.put(state["anchor"])


class EWC(Penalty):
    """EWC for a loop of your own; see :class:`sequel.EWC` for mode, gamma and fisher.

    >>> model = nn.Linear(2, 2)
    >>> ewc = EWC(model, lam=5.0)
    >>> ewc.consolidate([(torch.randn(8, 2), torch.arange(8) % 2)])
    >>> ewc.penalty().item()
    0.0
    """

    def __init__(
        self,
        model: nn.Module,
        lam: float = 1.0,
        *,
        mode: str = "separate",
        gamma: float = 1.0,
        fisher: str = "empirical",
        params: Select | None = None,
    ) -> None:
        EWCDefinition(lam, mode=mode, gamma=gamma, fisher=fisher)  # checks
        super().__init__(model, lam, params)
        self.mode, self.gamma, self.fisher = mode, gamma, fisher

    def consolidate(
        self, loader: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
    ) -> None:
        """Measure the Fisher information on a finished task's data and anchor the parameters.

        With torch.distributed initialised, the ranks' samples count together.
        """
        found = fisher_diagonal(
            self._model[0], loader, self.fisher, params=self._select(), forward=forward
        )
        state, now = self._state(), OPS.wide(OPS.copy(self.current()))
        if self.mode == "separate":
            state = merge(OPS, state, found, now)
        else:
            keep = self.gamma if self.mode == "online" else 0.0
            omega = {n: keep * state["omega"][n] + found[n] for n in found}
            state = {"omega": omega, "anchor": now}
        self._store(state)


class MAS(Penalty):
    """MAS for a loop of your own; see :class:`sequel.MAS`.

    >>> model = nn.Linear(2, 2)
    >>> mas = MAS(model)
    >>> mas.consolidate([(torch.randn(8, 2), torch.zeros(8))])
    >>> mas.penalty().item()
    0.0
    """

    def __init__(
        self,
        model: nn.Module,
        lam: float = 1.0,
        *,
        accumulate: str = "sum",
        alpha: float = 0.5,
        params: Select | None = None,
    ) -> None:
        MASDefinition(lam, accumulate=accumulate, alpha=alpha)  # checks
        super().__init__(model, lam, params)
        self.accumulate, self.alpha = accumulate, alpha

    def consolidate(
        self, loader: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
    ) -> None:
        """Measure the outputs' sensitivity on a finished task's data; labels are ignored."""
        found = fisher_diagonal(
            self._model[0], loader, "output", params=self._select(), forward=forward
        )
        state = self._state()
        keep, add = (1.0, 1.0) if self.accumulate == "sum" else (self.alpha, 1 - self.alpha)
        omega = {n: keep * state["omega"][n] + add * found[n] for n in found}
        self._store({"omega": omega, "anchor": OPS.wide(self.current())})


class SI(Penalty):
    """SI for a loop of your own: ``before_step()`` after backward, ``after_step()`` after the step.

    >>> model = nn.Linear(2, 1)
    >>> si, opt = SI(model), torch.optim.SGD(model.parameters(), 0.1)
    >>> for _ in range(3):
    ...     opt.zero_grad()
    ...     model(torch.ones(4, 2)).pow(2).mean().backward()
    ...     si.before_step()  # keeps θ and the task's gradient
    ...     si.add_grad_()
    ...     opt.step()
    ...     si.after_step()
    >>> si.consolidate()
    >>> bool(si.omega.get()["weight"].min() >= 0)
    True
    """

    def __init__(
        self,
        model: nn.Module,
        lam: float = 1.0,
        *,
        xi: float = 0.1,
        clip_omega: float | None = None,
        params: Select | None = None,
    ) -> None:
        SIDefinition(lam, xi=xi, clip_omega=clip_omega)  # checks
        super().__init__(model, lam, params)
        self.xi, self.clip_omega = xi, clip_omega
        self.path = _Tree(OPS.wide(OPS.zeros_like(self.current())))
        self._old: dict[str, Tensor] = {}
        self._grad: dict[str, Tensor] = {}

    def _fitted(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        params, omega, anchor = super()._fitted()
        for name, path in self.path.get().items():
            if path.shape != params[name].shape:
                wide = path.new_zeros(params[name].shape)
                wide[tuple(slice(0, n) for n in path.shape)] = path
                self.path.put({name: wide})
        return params, omega, anchor

    @torch.no_grad()
    def before_step(self) -> None:
        """Remember the parameters and the task's gradient."""
        params = self._fitted()[0]
        self._old = OPS.copy(params)
        self._grad = {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in params.items()
        }

    @torch.no_grad()
    def after_step(self) -> None:
        """Add -g (θ_new - θ_old) to the path integral."""
        if not self._old:
            raise RuntimeError("after_step() needs before_step() between backward and step")
        moved = OPS.sub(self.current(), self._old)
        self.path.put(OPS.addcmul(self.path.get(), self._grad, moved, -1.0))
        self._old = {}

    @torch.no_grad()
    def consolidate(self) -> None:
        """Turn the path integral into importance and anchor the parameters."""
        params, omega, anchor = self._fitted()
        path = self.path.get()
        new = {
            n: omega[n] + path[n].clamp(min=0) / ((p - anchor[n]) ** 2 + self.xi)
            for n, p in params.items()
        }
        if self.clip_omega is not None:
            new = {n: w.clamp(max=self.clip_omega) for n, w in new.items()}
        self._store({"omega": new, "anchor": OPS.wide(params)})
        self.path.put({n: torch.zeros_like(p) for n, p in path.items()})


class AGEM:
    """A-GEM for a loop of your own: ``project_(replay_loss)`` between backward and step.

    >>> model = nn.Linear(2, 2)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> AGEM(model).project_(lambda: -model(torch.ones(1, 2)).sum())
    >>> bool(model.weight.grad.abs().max() < 1e-6)  # the two gradients were opposite
    True
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def project_(self, replay_loss: Callable[[], Tensor]) -> None:
        """Project the gradients in ``.grad`` with the gradient of the memory's loss.

        With torch.distributed initialised, the ranks' memory gradients are averaged, as those of the batch are.
        """
        params = [p for p in self.model.parameters() if p.requires_grad and p.grad is not None]
        found = torch.autograd.grad(
            replay_loss(), params, allow_unused=True, materialize_grads=True
        )
        r = torch.cat([f.flatten() for f in found])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(r)
            r /= torch.distributed.get_world_size()
        g = torch.cat([p.grad.flatten() for p in params if p.grad is not None])
        new, at = agem_project(g, r), 0
        for p in params:
            p.grad = new[at : at + p.numel()].reshape(p.shape)
            at += p.numel()
