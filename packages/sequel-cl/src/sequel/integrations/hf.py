"""A callback for Hugging Face's ``Trainer``: a penalty of :mod:`sequel.torch` around its optimizer step."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sequel.integrations.steps import Forward, Steps
from sequel.torch.plugins import Penalty

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("the callback needs transformers: pip install sequel-cl[hf]") from error

__all__ = ["PenaltyCallback", "forward_rows", "rows"]

FILE = "sequel_penalty.safetensors"


def rows(loader: Iterable[Any], names: tuple[str, ...] = ()) -> Iterator[tuple[Tensor, Tensor]]:
    """Turn ``{"input_ids": ..., "attention_mask": ..., "labels": ...}`` batches into (x, y).

    x (B, inputs, ...) stacks the inputs, which must have one shape, in the order of ``names`` (default: that of the
    batch); see :func:`forward_rows`.
    """
    for batch in loader:
        chosen = names or tuple(key for key in batch if key != "labels")
        yield torch.stack([batch[key] for key in chosen], 1), batch["labels"]


def forward_rows(names: tuple[str, ...]) -> Forward:
    """Return ``forward(model, x)`` that hands the stacked inputs of :func:`rows` to a model by name."""

    def forward(model: nn.Module, x: Tensor) -> Any:
        return model(**{name: x[:, i] for i, name in enumerate(names)})

    return forward


class PenaltyCallback(TrainerCallback):  # type: ignore[misc]
    """Train a classifier with EWC, MAS or SI in Hugging Face's ``Trainer``; one ``train()`` is one task.

    The penalty's gradient is added after the Trainer has clipped, before the step (transformers' hook
    ``on_pre_optimizer_step``). At the end of ``train()`` the importance is measured; its buffers are written into
    each checkpoint folder as ``sequel_penalty.safetensors``.

    Args:
        penalty: ``sequel.torch.EWC(model)`` of the Trainer's model, whose output has ``.logits`` (B, C).
        apply: ``"grad"``, or ``"prox"`` after the step with the first group's learning rate.
        inputs: the model's inputs, tensors of one shape.
        consolidate: False leaves that to you.
        loader, forward: (x, y) batches on which EWC and MAS measure, and ``forward(model, x) -> logits``; by default
            the Trainer's training loader through :func:`rows` and :func:`forward_rows`.
    """

    def __init__(
        self,
        penalty: Penalty,
        *,
        apply: str = "grad",
        inputs: tuple[str, ...] = ("input_ids", "attention_mask"),
        consolidate: bool = True,
        loader: Iterable[Any] | None = None,
        forward: Forward | None = None,
    ) -> None:
        self.steps = Steps(penalty, apply=apply)
        self.inputs, self.consolidate = inputs, consolidate
        self.loader, self.forward = loader, forward

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any = None, **kwargs: Any
    ) -> None:
        """Bring the penalty to the model's device."""
        if args.fp16 and not args.max_grad_norm:
            raise ValueError(
                "max_grad_norm must be > 0 with fp16: the Trainer divides by the loss scale where it clips, and "
                "the penalty's gradient must come after it"
            )
        self.steps.penalty.to(next(model.parameters()).device)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Add the penalty's gradient."""
        self.steps.before(optimizer)

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Take the proximal step, and SI's path."""
        self.steps.after(skipped=bool(getattr(optimizer, "step_was_skipped", False)))

    def on_train_end(
        self, args: Any, state: Any, control: Any, *, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Measure the importance of the finished task's parameters."""
        if not self.consolidate:
            return
        if self.loader is not None:
            self.steps.consolidate(self.loader, self.forward)
        else:
            forward = self.forward or forward_rows(self.inputs)
            self.steps.consolidate(rows(train_dataloader, self.inputs), forward)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the penalty's buffers into the checkpoint's folder."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            save_file(
                {k: v.contiguous() for k, v in self.steps.penalty.state_dict().items()},
                folder / FILE,
            )

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Restore the buffers from a checkpoint's folder; the Trainer does not do it by itself."""
        self.steps.penalty.load_state_dict(load_file(Path(folder) / FILE))
