"""A Lightning callback that ends a round after every training batch of a manually optimised module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from lookahead_minmax.core.minmax import LookaheadMinmax

try:
    from pytorch_lightning import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        'the callback needs Lightning: pip install "lookahead-minmax[lightning]"'
    ) from error


class LookaheadMinmaxCallback(Callback):
    """Joint lookahead around the optimizers that a module configures.

    Use it with manual optimisation, where `training_step` plays one round of the game. It evaluates
    with the slow weights, and its state is saved in Lightning's checkpoints.

    Args:
        names: of the players, in the order of the module's optimizers; "0", "1", ... by default.
        evaluate_slow: put the slow weights in place during validation.
        **options: of `LookaheadMinmax`.
    """

    def __init__(
        self, names: Sequence[str] | None = None, *, evaluate_slow: bool = False, **options: Any
    ) -> None:
        self.names, self.evaluate_slow, self.options = names, evaluate_slow, options
        self.lookahead: LookaheadMinmax | None = None
        self._loaded: dict[str, Any] | None = None
        self._context: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap the trainer's optimizers.

        Raises:
            ValueError: the module optimises automatically, or the names are not as many as the optimizers.
        """
        if pl_module.automatic_optimization:
            raise ValueError("lookahead counts rounds: set automatic_optimization = False")
        optimizers: list[Optimizer] = list(trainer.optimizers)
        names = [str(i) for i in range(len(optimizers))] if self.names is None else self.names
        if len(names) != len(optimizers):
            raise ValueError(f"{len(names)} names for {len(optimizers)} optimizers")
        self.lookahead = LookaheadMinmax(dict(zip(names, optimizers, strict=True)), **self.options)
        if self._loaded is not None:
            self.lookahead.load_state_dict(self._loaded)

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """End the round."""
        assert self.lookahead is not None
        self.lookahead.step()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the slow weights in place, if asked to."""
        if self.evaluate_slow and self.lookahead is not None:
            self._context = self.lookahead.slow_weights()
            self._context.__enter__()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the fast weights back."""
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = None

    def state_dict(self) -> dict[str, Any]:
        """Return the lookahead's state for the checkpoint."""
        return {} if self.lookahead is None else self.lookahead.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep the state until the optimizers exist."""
        self._loaded = dict(state_dict) or None
