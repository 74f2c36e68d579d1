"""A Lightning callback: a penalty of :mod:`sequel.torch` in a ``Trainer``'s automatic or manual optimisation."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from typing import Any

import torch

from sequel.integrations.steps import Forward, Steps
from sequel.torch.plugins import Penalty

__all__ = ["PenaltyCallback"]


def _library() -> Any:
    """Return ``lightning.pytorch`` or ``pytorch_lightning``, whichever the caller uses."""
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ImportError("the callback needs Lightning: pip install sequel-cl[lightning]")


class PenaltyCallback(_library().Callback):  # type: ignore[misc]
    """Train with EWC, MAS or SI in Lightning; one ``fit`` is one task.

    The penalty's gradient is added after backward (and after the loss scaler's division), before Lightning clips and
    steps. At the end of ``fit`` the importance is measured. The penalty's buffers are a part of Lightning's checkpoints.

    Args:
        penalty: ``sequel.torch.EWC(module)``, of the LightningModule or of a network within it.
        apply: ``"grad"``, or ``"prox"`` after the step with the first group's learning rate.
        consolidate: False leaves that to you, e.g. where one task takes several fits.
        loader: yields the (x, y) batches on which EWC and MAS measure; None is the trainer's training loader.
        forward: ``forward(model, x) -> logits``, where the penalty's model is not called on x alone.
    """

    def __init__(
        self,
        penalty: Penalty,
        *,
        apply: str = "grad",
        consolidate: bool = True,
        loader: Iterable[Any] | None = None,
        forward: Forward | None = None,
    ) -> None:
        self.steps = Steps(penalty, apply=apply)
        self.consolidate, self.loader, self.forward = consolidate, loader, forward

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Bring the penalty to the module's device."""
        self.steps.penalty.to(pl_module.device)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Add the penalty's gradient."""
        finite = True
        if getattr(trainer.precision_plugin, "scaler", None) is not None:  # fp16
            params = self.steps.penalty.current().values()
            finite = all(bool(torch.isfinite(p.grad).all()) for p in params if p.grad is not None)
        self.steps.before(optimizer, finite=finite)

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Take the proximal step, and SI's path."""
        self.steps.after()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure the importance of the finished task's parameters."""
        if self.consolidate:
            loader = trainer.train_dataloader if self.loader is None else self.loader
            self.steps.consolidate(loader, self.forward)

    def state_dict(self) -> dict[str, Any]:
        """Return the penalty's buffers."""
        found: dict[str, Any] = self.steps.penalty.state_dict()
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the penalty's buffers."""
        self.steps.penalty.load_state_dict(state_dict)
