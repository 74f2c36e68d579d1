"""Lookahead-Minmax (Algorithm 1 of the paper): all players of a game step back together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lookahead_minmax.core import tensors
from lookahead_minmax.core.handle import Callbacks, Handle
from lookahead_minmax.core.players import (
    Players,
    check_parameters,
    describe,
    extrapolated,
    modules_of,
    normalize_players,
    select_players,
    stepping,
)
from lookahead_minmax.core.policies import (
    OPTIONS,
    ROLLBACK,
    VERSION,
    BufferPolicy,
    NonfinitePolicy,
    SlowInit,
    StatePolicy,
    check_policies,
    check_saved,
)
from lookahead_minmax.core.schedule import KSampler, Schedule
from lookahead_minmax.core.slow import SlowCopies, backup


class LookaheadMinmax:
    r"""Joint lookahead for the players of a game, around their own `torch.optim` optimizers.

    Call `step()` once at the end of every round, whatever a round is (r discriminator steps and one
    generator step, a simultaneous step, an extragradient step). Every `k` rounds all players go back
    together, :math:`w \leftarrow \tilde w + \alpha (w - \tilde w)` and :math:`\tilde w \leftarrow w`
    (Chavdarova et al. 2021, Algorithm 1), where the slow weights :math:`\tilde w` start as the weights
    before the first base step. Parameters change in place and keep their storage.

    Args:
        players: an optimizer, a sequence (one player each) or a mapping {name: optimizer or several}.
        k: rounds between synchronisations; a sequence nests levels, each a larger
            multiple of the one below; a `KSampler` draws the next period after each
            synchronisation. Default 5, the paper's CIFAR-10 value for LA-AltGAN.
        alpha: step from the slow towards the fast weights, in (0, 1]; one number, one for each level, or
            a mapping with one for each player. Default 0.5, the paper's value. 1 is the base method.
        slow_init: "start" takes the slow weights before the first base step, as in Algorithm 1;
            "first_sync" at the first synchronisation, which then changes nothing (the authors' code, timm).
        state: what happens to the optimizers' state at a synchronisation: "keep" (the paper), "reset",
            or "interpolate" with its value at the last one, by the same alpha.
        modules: the players' modules, a mapping {player: module} or a sequence in the players' order;
            needed for `buffers="interpolate"` only.
        buffers: "keep" leaves BatchNorm statistics to the fast weights (the paper); "interpolate" treats
            the running mean and variance like weights. Counters and the vectors of spectral
            normalisation are never touched. Their slow copies are taken here, at construction, since the
            first forward pass changes them before the first step.
        slow_dtype: type of the slow copies. None is float32 for half-precision weights, since a bfloat16
            copy loses updates below 2^-8, and the weights' own type otherwise.
        slow_device: device of the slow copies (pinned where it is the CPU); None follows the weights.
        foreach: True groups tensors into few kernels, False loops; None groups on accelerators only.
        nonfinite: "ignore" (no check and no wait for the device), "raise", or "rollback": all players
            return to the slow weights and their optimizers' state is reset.

    Raises:
        TypeError: a player is not an optimizer, `k` is not an int, `alpha` is not a number.
        ValueError: a number is out of range, the levels do not fit, there is no parameter, a parameter is
            neither floating nor complex or belongs to two players of different alpha, a player is a
            `Lookahead`, an option is unknown, or `buffers="interpolate"` has no modules.
        KeyError: names in `alpha` or `modules` are not the players' names.

    Example:
        f(x, y) = x y from (1, 0), y moving first: one round, then a joint step back.

        >>> import torch
        >>> x, y = torch.tensor(1.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)
        >>> min_x, max_y = torch.optim.SGD([x], lr=0.5), torch.optim.SGD([y], lr=0.5, maximize=True)
        >>> la = LookaheadMinmax({"x": min_x, "y": max_y}, k=1, alpha=0.5)
        >>> for player in (max_y, min_x):
        ...     player.zero_grad()
        ...     (x * y).backward()
        ...     player.step()
        >>> la.step()
        1
        >>> x.item(), y.item()
        (0.875, 0.25)
    """

    rounds: int
    rollbacks: int

    def __init__(
        self,
        players: Players,
        *,
        k: int | Sequence[int] | KSampler = 5,
        alpha: float | Sequence[float] | Mapping[str, float] = 0.5,
        slow_init: SlowInit = "start",
        state: StatePolicy = "keep",
        modules: Mapping[str, nn.Module] | Sequence[nn.Module] | None = None,
        buffers: BufferPolicy = "keep",
        slow_dtype: torch.dtype | None = None,
        slow_device: torch.device | str | None = None,
        foreach: bool | None = None,
        nonfinite: NonfinitePolicy = "ignore",
    ) -> None:
        self.players = normalize_players(players)
        for optimizer in self._optimizers():
            if getattr(optimizer, "_is_lookahead", False):
                raise ValueError("a player is a Lookahead already: nest with k=[k1, k2] instead")
        check_policies(slow_init, state, buffers, nonfinite)
        if slow_dtype is not None and not slow_dtype.is_floating_point:
            raise ValueError(f"slow_dtype must be a floating type, got {slow_dtype}")
        self.slow_init, self.state = slow_init, state
        self.buffers, self.nonfinite = buffers, nonfinite
        self.rounds = self.rollbacks = 0
        self._schedule = Schedule(k, alpha, self.players)
        check_parameters(self.players, self._schedule.alphas)
        device = None if slow_device is None else torch.device(slow_device)
        self._slow = SlowCopies(self.players, self.levels, slow_dtype, device, foreach)
        if buffers == "interpolate":
            for player, module in modules_of(self.players, modules).items():
                self._slow.adopt_buffers(player, module)
        self._begun = False  # whether the slow copies are those of a run under way
        self._moved = self._inside = False
        self._synced: list[int] | None = (
            None  # the weights' versions after the last synchronisation
        )
        self._clock: str | None = None
        self._callbacks = Callbacks()
        self._register()

    # -- configuration -------------------------------------------------------------------------

    @property
    def levels(self) -> int:
        """Number of nested levels."""
        return self._schedule.levels

    @property
    def k(self) -> int | list[int] | KSampler:
        """Rounds between synchronisations; may be set between rounds, with the same number of levels."""
        return self._schedule.get_k()

    @k.setter
    def k(self, value: int | Sequence[int] | KSampler) -> None:
        self._schedule.set_k(value)

    @property
    def alpha(self) -> float | list[float] | dict[str, float]:
        """Interpolation factor; may be set between rounds."""
        return self._schedule.get_alpha()

    @alpha.setter
    def alpha(self, value: float | Sequence[float] | Mapping[str, float]) -> None:
        before = self._schedule.alphas
        self._schedule.set_alpha(value)
        try:
            check_parameters(self.players, self._schedule.alphas)
        except ValueError:
            self._schedule.alphas = before
            raise

    @property
    def since_sync(self) -> int:
        """Rounds since the last synchronisation of level 1."""
        return self._schedule.since[0]

    def _optimizers(self) -> Iterator[Optimizer]:
        for optimizers in self.players.values():
            yield from optimizers

    # -- hooks on the base optimizers ------------------------------------------------------------

    def _register(self) -> None:
        self._pre_hooks = [
            o.register_step_pre_hook(self._before_base_step) for o in self._optimizers()
        ]
        self._post_hook: Any = None
        if self._clock is not None:
            optimizer = self.players[self._clock][-1]
            self._post_hook = optimizer.register_step_post_hook(self._after_base_step)

    def _before_base_step(self, *_: Any) -> None:
        if self._inside:
            raise RuntimeError("a base optimizer stepped inside slow_weights(): leave it to train")
        if self._begun:
            self._slow.adopt()
        else:  # attach() or a look at the slow weights came earlier; the weights may have changed since
            self._slow.start_anew(buffers=False)
        self._begun = self._moved = True

    def _after_base_step(self, optimizer: Optimizer, *_: Any) -> None:
        if optimizer in stepping:
            stepping[optimizer].append(self._end_round)
        elif optimizer not in extrapolated:
            self._end_round()

    def attach(self, player: str) -> Handle:
        """Let every step of a player's (last) optimizer end the round; the loop needs no `step()`.

        A step that `GradScaler` skips ends no round.

        Returns:
            a handle whose `remove()` detaches.

        Raises:
            KeyError: there is no such player.
            RuntimeError: another player is attached already.
        """
        if player not in self.players:
            raise KeyError(f"no player {player!r}; there are {list(self.players)}")
        if self._clock is not None:
            raise RuntimeError(f"two clocks: player {self._clock!r} ends the rounds already")
        self._slow.adopt()
        self._clock = player
        optimizer = self.players[player][-1]
        self._post_hook = optimizer.register_step_post_hook(self._after_base_step)
        return Handle(self._detach)

    def _detach(self) -> None:
        self._post_hook.remove()
        self._clock = None

    def on_sync(self, callback: Callable[[], object], level: int = 1) -> Handle:
        """Call `callback()` after every synchronisation that reaches `level`.

        `on_sync(ema.update)` makes the EMA of the slow weights.
        """
        self._schedule.check_level(level)
        return self._callbacks.add(callback, level)

    # -- rounds ------------------------------------------------------------------------------------

    def step(self) -> int:
        """End a round; synchronise the levels whose period is over, in ascending order.

        Returns:
            the highest level that was synchronised, 0 for none.

        Raises:
            RuntimeError: inside `slow_weights()`, between the two halves of an `ExtraGradient` round, with
                an attached player (two clocks), or when a parameter changed its shape or type.
            FloatingPointError: a weight is not finite, with `nonfinite="raise"`.
        """
        if self._clock is not None:
            raise RuntimeError(
                f"two clocks: player {self._clock!r} is attached and ends the rounds"
            )
        return self._end_round()

    @torch.no_grad()
    def _end_round(self) -> int:
        if self._inside:
            raise RuntimeError("step() inside slow_weights(): leave it to train")
        if any(optimizer in extrapolated for optimizer in self._optimizers()):
            raise RuntimeError(
                "step() between ExtraGradient.extrapolate() and ExtraGradient.step(): the weights are at "
                "the extrapolated point; finish the round first"
            )
        self._slow.adopt()
        self._begun = self._moved = True
        self.rounds += 1
        self._schedule.tick()
        return self._synchronize_up_to(self._schedule.due())

    @torch.no_grad()
    def sync(self, level: int | None = None) -> None:
        """Step back now, whatever the counters say: levels 1 to `level` (None: all) in ascending order."""
        self._schedule.check_level(self.levels if level is None else level)
        self._slow.adopt()
        self._begun = True
        self._synchronize_up_to(self.levels if level is None else level)

    def _synchronize_up_to(self, reached: int) -> int:
        for index in range(reached):
            if not self._synchronize(index):
                return 0
        self._callbacks.call(reached)
        return reached

    def _synchronize(self, level: int) -> bool:
        self._slow.check()
        if self.nonfinite != "ignore" and (bad := self._slow.first_nonfinite()) is not None:
            if self.nonfinite == "raise":
                raise FloatingPointError(f"{bad.label()} is not finite")
            self._roll_back(bad.label())
            return False
        if self.slow_init == "first_sync" and not self._schedule.started[level]:
            self._slow.take(level)
        self._slow.pull_back(level, self._schedule.alphas[level])
        if level == 0 and self.state == "interpolate":
            self._slow.interpolate_state(self._schedule.alphas[0])
        elif self.state == "reset":
            self._slow.forget_state()
        self._schedule.finish(level)
        self._settle()
        return True

    def _settle(self) -> None:
        self._moved, self._synced = False, self._slow.versions()

    def _roll_back(self, label: str) -> None:
        self._slow.put(0)
        self._slow.forget_state()
        self._schedule.undo_period()
        self._settle()
        self.rollbacks += 1
        if self.rollbacks == 1:
            warnings.warn(ROLLBACK.format(label), stacklevel=5)

    @torch.no_grad()
    def reset(self) -> None:
        """Start anew from the current weights: slow <- fast, all counters 0."""
        self._slow.start_anew()
        self.rounds = self.rollbacks = 0
        self._schedule.reset()
        self._begun = True
        self._settle()

    # -- the slow weights ----------------------------------------------------------------------------

    @contextmanager
    def slow_weights(
        self, players: str | Sequence[str] | None = None, level: int = 1
    ) -> Iterator[None]:
        """Put the slow weights in place inside a `with` block, and the fast ones back after it.

        Right after a synchronisation both are equal and nothing is copied.

        Args:
            players: whose weights (a name, several, None: all).
            level: which slow copy, 1 is the fastest.

        Raises:
            RuntimeError: inside another `slow_weights()`.
            KeyError: there is no such player.
        """
        if self._inside:
            raise RuntimeError("slow_weights() is entered already")
        self._schedule.check_level(level)
        names = select_players(self.players, players)
        with torch.no_grad():
            self._slow.adopt()
            self._slow.check()
            slots = self._slow.of(names)
            moved = self._moved or self._synced != self._slow.versions()
            held = backup(slots) if moved or level > 1 else None
            if held is not None:
                self._slow.put(level - 1, names)
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            if held is not None:
                with torch.no_grad():
                    tensors.copy_all([slot.tensor.detach() for slot in slots], held)

    def slow_parameters(self, player: str | None = None, level: int = 1) -> Iterator[Tensor]:
        """Yield the slow copies of a player's parameters (None: of all) in the optimizers' order."""
        self._schedule.check_level(level)
        names = select_players(self.players, player)
        self._slow.adopt()
        for slot in self._slow.slots:
            if slot.player in names:
                yield slot.slow[level - 1]

    @torch.no_grad()
    def slow_state_dict(self, module: nn.Module, level: int = 1) -> dict[str, Tensor]:
        """Return `module.state_dict()` with the slow weights in place of the fast ones.

        Tensors are detached copies in the weights' type, so that safetensors can write them; what no
        player owns is as it is in the module.
        """
        self._schedule.check_level(level)
        self._slow.adopt()
        return self._slow.module_state_dict(module, level - 1)

    # -- saving --------------------------------------------------------------------------------------

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as plain builtins and tensors.

        The base optimizers are saved by their own `state_dict`. Parameters are keyed by position.
        """
        self._slow.adopt()
        return {
            "version": VERSION,
            **self._schedule.state_dict(),
            "rounds": self.rounds,
            "begun": self._begun,
            "moved": self._moved,
            "rollbacks": self.rollbacks,
            "options": {key: getattr(self, key) for key in OPTIONS},
            "players": self._slow.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Continue a saved run: the next round is bit for bit what it would have been.

        Args:
            state_dict: what `state_dict()` returned; players, parameters and levels must agree.
            strict: also require the same options (`slow_init`, `state`, `buffers`, `nonfinite`).

        Raises:
            ValueError: something does not agree; the message lists it and the object is unchanged.
        """
        check_saved(state_dict)
        self._slow.adopt()
        problems = self._schedule.mismatches(state_dict)
        problems += self._slow.mismatches(state_dict["players"])
        here = {key: getattr(self, key) for key in state_dict["options"]}
        if strict and here != state_dict["options"]:
            problems.append(f"options: saved {state_dict['options']}, here {here}")
        if problems:
            raise ValueError("the saved state does not fit: " + "; ".join(problems))
        self._slow.load_state_dict(state_dict["players"])
        self._schedule.load_state_dict(state_dict)
        self.rounds, self.rollbacks = state_dict["rounds"], state_dict["rollbacks"]
        self._begun, self._moved = state_dict.get("begun", True), state_dict["moved"]
        self._synced = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the hooks, which are registered again on the copies of the optimizers."""
        skip = ("_pre_hooks", "_post_hook", "_callbacks")
        return {key: value for key, value in vars(self).items() if key not in skip}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Register the hooks again; callbacks of `on_sync` are not copied."""
        vars(self).update(state, _callbacks=Callbacks())
        self._register()

    def __repr__(self) -> str:
        """Show the players and the numbers of Algorithm 1."""
        numbers = f"k={self.k}, alpha={self.alpha}, rounds={self.rounds}"
        return f"LookaheadMinmax({describe(self.players)}; {numbers})"
