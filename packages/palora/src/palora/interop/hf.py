"""Hugging Face ``Trainer`` with the objective over rays and the adapters' learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from palora.core.loss import step_loss
from palora.core.optim import param_groups
from palora.core.preference import checkpoint_context
from palora.core.schedule import Schedule

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError('palora.interop.hf needs transformers: pip install "palora[hf]"') from error

__all__ = ["PaloraTrainer", "enable_gradient_checkpointing"]


def enable_gradient_checkpointing(model: Any) -> None:
    """Turn on a Hugging Face model's gradient checkpointing so that λ survives recomputation."""
    options = {"use_reentrant": False, "context_fn": checkpoint_context(model)}
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5 renamed it
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


class PaloraTrainer(Trainer):  # type: ignore[misc]
    """A ``Trainer`` of an injected model.

    Args:
        palora_losses: ``palora_losses(outputs, inputs)`` returns the T scalar losses of one ray.
        palora_schedule: the preferences; called with the share of training done.
        palora_chunk: rays in one pass; see :func:`palora.step_loss`.
        *args: of ``Trainer``.
        **kw: of ``Trainer``.
    """

    def __init__(
        self,
        *args: Any,
        palora_losses: Callable[[Any, Any], Any],
        palora_schedule: Schedule,
        palora_chunk: int | None = None,
        **kw: Any,
    ) -> None:
        """Store the objective and set up the Trainer."""
        self.palora_losses = palora_losses
        self.palora_schedule = palora_schedule
        self.palora_chunk = palora_chunk
        super().__init__(*args, **kw)

    def create_optimizer(self, *args: Any, **kw: Any) -> Any:
        """Make the optimiser with the adapters at T times the learning rate."""
        if getattr(self, "optimizer", None) is None:
            groups = param_groups(
                self.model, self.args.learning_rate, weight_decay=self.args.weight_decay
            )
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            options.pop("lr", None)
            self.optimizer = cls(groups, **options)
        return self.optimizer

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kw: Any) -> Any:
        """Return the sum over this step's rays of the weighted losses."""
        step = self.state.global_step
        progress = min((step + 1) / max(self.state.max_steps, 1), 1.0)
        rays = self.palora_schedule(progress, step)
        out = step_loss(model, self.palora_losses, dict(inputs), rays, chunk=self.palora_chunk)
        loss: Tensor = out.loss
        # the Trainer divides by the accumulation steps itself, in training_step
        return (loss, {"losses": out.losses}) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kw: Any
    ) -> tuple[Tensor, None, None]:
        """Evaluate the objective at the even grid of preferences."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None
