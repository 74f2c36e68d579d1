"""What a foreign loop must do around its optimizer's step to train with a penalty of :mod:`sequel.torch`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from sequel import _check
from sequel.torch import SI
from sequel.torch.plugins import Penalty

__all__ = ["Steps"]

Forward = Callable[[nn.Module, Any], Any]


class Steps:
    """A penalty's calls before and after each step of an optimizer, and at a task's end.

    Args:
        penalty: ``sequel.torch.EWC``, ``MAS`` or ``SI`` of the model in training.
        apply: ``"grad"`` adds the penalty's gradient before the step, ``"prox"`` moves the parameters after it.

    >>> import torch, sequel
    >>> model = nn.Linear(2, 2)
    >>> steps, opt = Steps(sequel.torch.SI(model)), torch.optim.SGD(model.parameters(), 0.1)
    >>> model(torch.ones(4, 2)).pow(2).mean().backward()
    >>> steps.before(opt)
    >>> opt.step()
    >>> steps.after()
    >>> bool(steps.penalty.path.get()["weight"].abs().sum() > 0)
    True
    """

    def __init__(self, penalty: Penalty, *, apply: str = "grad") -> None:
        if not isinstance(penalty, Penalty):
            raise TypeError(
                f"penalty must be sequel.torch.EWC, MAS or SI, got {type(penalty).__name__}"
            )
        _check.one_of("apply", apply, ("grad", "prox"))
        self.penalty, self.apply = penalty, apply
        self._rate: float | None = None  # of the step that is under way

    def holds(self, optimizer: Any) -> bool:
        """Tell whether an optimizer trains the penalty's parameters; ValueError where it has only some."""
        mine = {id(p) for p in self.penalty.current().values()}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if mine & held and mine - held:
            raise ValueError(
                f"the optimizer holds {len(mine & held)} of the penalty's {len(mine)} parameters: "
                "make one penalty per optimizer, with params="
            )
        return bool(mine & held)

    def before(self, optimizer: Any, *, finite: bool = True) -> None:
        """Between backward and step. ``finite=False``: a loss scaler will skip this step."""
        self.after()
        if not finite or not self.holds(optimizer):
            return
        self._rate = float(optimizer.param_groups[0]["lr"])
        if isinstance(self.penalty, SI):
            self.penalty.before_step()
        if self.apply == "grad":
            self.penalty.add_grad_()

    def after(self, *, skipped: bool = False) -> None:
        """After the step, if one is under way; ``skipped``: a loss scaler has left the parameters alone."""
        rate, self._rate = self._rate, None
        if rate is None or skipped:
            return
        if self.apply == "prox" and self.penalty.lam > 0 and rate > 0:
            self.penalty.prox_(rate)
        if isinstance(self.penalty, SI):
            self.penalty.after_step()

    def consolidate(self, loader: Iterable[Any] | None, forward: Forward | None) -> None:
        """At a task's end: measure the importance of its parameters."""
        self.after()
        if isinstance(self.penalty, SI):
            self.penalty.consolidate()
        elif loader is None:
            raise ValueError("loader must be given: there are no training data to measure on")
        else:
            self.penalty.consolidate(loader, forward)  # type: ignore[operator]
