"""TensorBoard and Weights & Biases, imported when they are made."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from sequel.loggers.base import Logger

if TYPE_CHECKING:
    from sequel.learner import Learner

__all__ = ["TensorBoardLogger", "WandbLogger"]


class TensorBoardLogger(Logger):
    """Write TensorBoard event files; needs ``pip install sequel-cl[tensorboard]``."""

    def __init__(self, folder: str | os.PathLike[str], writer: Any = None) -> None:
        super().__init__(folder)
        if writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "TensorBoardLogger needs tensorboard: pip install sequel-cl[tensorboard]"
                ) from error
            writer = SummaryWriter(str(folder))
        self.writer = writer

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add scalars."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def on_after_teardown(self, learner: Learner, **info: Any) -> None:
        """Close the writer."""
        self.writer.close()


class WandbLogger(Logger):
    """Log to Weights & Biases; ``mode="offline"`` (default) needs no network or account.

    ``run`` takes a run of your own; else ``wandb.init`` makes one in ``folder``.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, mode: Any = "offline", run: Any = None, **init: Any
    ) -> None:
        super().__init__(folder)
        if run is None:
            try:
                import wandb
            except ImportError as error:
                raise ImportError(
                    "WandbLogger needs wandb: pip install sequel-cl[wandb]"
                ) from error
            run = wandb.init(dir=str(folder), mode=mode, **init)
        self.run = run

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log the values."""
        self.run.log(values, step=step)

    def on_after_teardown(self, learner: Learner, **info: Any) -> None:
        """Finish the run."""
        self.run.finish()
