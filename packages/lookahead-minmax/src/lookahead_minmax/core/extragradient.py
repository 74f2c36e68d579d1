"""Extragradient (Korpelevich 1976) around any torch optimizers, with a choice of the second state."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lookahead_minmax.core import tensors
from lookahead_minmax.core.players import (
    Players,
    extrapolated,
    normalize_players,
    parameters_of,
    state_keepers,
    stepping,
)


class ExtraGradient:
    r"""Look one step ahead, then step from where you were with the gradient found there.

    A round is: gradients at :math:`z_t`, `extrapolate()`, gradients at
    :math:`z_{t+1/2} = z_t - \eta v(z_t)`, `step()`, which makes
    :math:`z_{t+1} = z_t - \eta v(z_{t+1/2})`. Each update is the base optimizer's own, so Adam gives
    ExtraAdam. `round(closure)` does all of it. Both halves may be repeated for one player (a ratio of
    r > 1), and a round is over when every player has stepped.

    Args:
        players: as for `LookaheadMinmax`.
        extrapolate: "all" takes the second gradient at the point where everyone is extrapolated;
            "opponent" takes player i's at its own un-extrapolated weights and the others' extrapolated
            ones (the authors' GAN code), for which its gradient is computed inside `own_weights(i)`. The
            two agree on bilinear games. "opponent" keeps a second copy of the weights.
        state: of the base optimizers across the halves: "shared" advances one state twice a round
            (Gidel et al. 2019), "separate" gives the extrapolation a state of its own (the authors),
            "frozen" lets the extrapolation read the state and leaves it unchanged.

    Raises:
        TypeError: a player is not an optimizer.
        ValueError: an option is unknown or a player owns no parameter.

    Example:
        On f(x, y) = x y, z = x + iy is multiplied by 1 + i eta - eta^2:

        >>> import torch
        >>> x, y = torch.tensor(1.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)
        >>> eg = ExtraGradient(
        ...     [torch.optim.SGD([x], lr=0.5), torch.optim.SGD([y], lr=0.5, maximize=True)]
        ... )
        >>> def closure():
        ...     eg.zero_grad()
        ...     (x * y).backward()
        >>> eg.round(closure)
        >>> x.item(), y.item()
        (0.75, 0.5)
    """

    def __init__(
        self,
        players: Players,
        *,
        extrapolate: Literal["all", "opponent"] = "all",
        state: Literal["shared", "separate", "frozen"] = "shared",
    ) -> None:
        self.players = normalize_players(players)
        if extrapolate not in ("all", "opponent"):
            raise ValueError(f"extrapolate must be 'all' or 'opponent', got {extrapolate!r}")
        if state not in ("shared", "separate", "frozen"):
            raise ValueError(f"state must be 'shared', 'separate' or 'frozen', got {state!r}")
        self.mode, self.state = extrapolate, state
        self._origin: dict[str, list[Tensor]] = {}  # z_t of the players that are extrapolated
        self._ahead: dict[str, list[Tensor]] = {}  # z_{t+1/2} of those that stepped ("opponent")
        self._stepped: set[str] = set()
        # For "separate": the state that is not in use, one for each optimizer.
        self._second: list[Any] = [defaultdict(dict) for _ in self._optimizers()]
        state_keepers.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the attributes of the original."""
        vars(self).update(state)
        state_keepers.add(self)
        for player in self._origin:
            extrapolated.update(self.players[player])

    def forget(self, optimizer: Optimizer) -> None:
        """Drop the extrapolation's own state of an optimizer ("separate")."""
        for index, own in enumerate(self._optimizers()):
            if own is optimizer:
                self._second[index] = defaultdict(dict)

    def _optimizers(self, player: str | None = None) -> list[Optimizer]:
        names = self.players if player is None else [player]
        return [optimizer for name in names for optimizer in self.players[name]]

    def _parameters(self, player: str) -> list[Tensor]:
        return [t.detach() for optimizer in self.players[player] for t in parameters_of(optimizer)]

    def _check(self, player: str | None) -> list[str]:
        if player is not None and player not in self.players:
            raise KeyError(f"no player {player!r}; there are {list(self.players)}")
        return list(self.players) if player is None else [player]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all players."""
        for optimizer in self._optimizers():
            optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def extrapolate(self, player: str | None = None) -> None:
        """Move a player (None: all) from :math:`z_t` to :math:`z_{t+1/2}` with the gradients in `.grad`.

        Repeatable: the weights to return to are taken before the first call of a round.

        Raises:
            KeyError: there is no such player.
            RuntimeError: the player has taken its step of this round already.
        """
        for name in self._check(player):
            if name in self._stepped:
                raise RuntimeError(
                    f"extrapolate() after step() of player {name!r}: the others "
                    f"({sorted(set(self.players) - self._stepped)}) have not finished the round"
                )
            if name not in self._origin:
                self._origin[name] = [tensor.clone() for tensor in self._parameters(name)]
            extrapolated.update(self.players[name])
            self._base_step(name)

    def _base_step(self, player: str) -> None:
        numbers = {id(optimizer): i for i, optimizer in enumerate(self._optimizers())}
        for optimizer in self.players[player]:
            if self.state == "separate":
                self._swap_state(optimizer, numbers[id(optimizer)])
            kept = copy.deepcopy(_values(optimizer)) if self.state == "frozen" else None
            optimizer.step()
            if kept is not None:
                _restore(optimizer, kept)
            if self.state == "separate":
                self._swap_state(optimizer, numbers[id(optimizer)])

    def _swap_state(self, optimizer: Optimizer, number: int) -> None:
        self._second[number], optimizer.state = optimizer.state, self._second[number]

    @torch.no_grad()
    def step(self, player: str | None = None) -> None:
        """Step a player (None: all) from :math:`z_t` with the gradients at :math:`z_{t+1/2}`.

        May be repeated for one player until the others have stepped.

        Raises:
            KeyError: there is no such player.
            RuntimeError: the player was not extrapolated in this round.
        """
        names = self._check(player)
        for name in names:
            if name not in self._origin and name not in self._stepped:
                raise RuntimeError(f"step() of player {name!r} without extrapolate() before it")
        for name in names:
            if name in self._origin:
                if self.mode == "opponent":
                    self._ahead[name] = [tensor.clone() for tensor in self._parameters(name)]
                tensors.copy_all(self._parameters(name), self._origin.pop(name))
            self._stepped.add(name)
        optimizers = [optimizer for name in names for optimizer in self.players[name]]
        extrapolated.difference_update(optimizers)
        # An attached LookaheadMinmax ends the round when the last of these has stepped, not the first.
        endings: list[Callable[[], object]] = []
        stepping.update(dict.fromkeys(optimizers, endings))
        try:
            for optimizer in optimizers:
                optimizer.step()
        finally:
            for optimizer in optimizers:
                stepping.pop(optimizer, None)
        if self._stepped == set(self.players):
            self._stepped.clear()
            self._ahead.clear()
        for end in endings:
            end()

    @contextmanager
    def own_weights(self, player: str) -> Iterator[None]:
        """Put a player back at :math:`z_t` and the others at their extrapolated weights, in a block.

        In the mode "opponent" the player's second gradient is computed inside it. The weights may not be
        changed in the block.

        Raises:
            KeyError: there is no such player.
            RuntimeError: the mode is "all", or nobody is extrapolated.
        """
        self._check(player)
        if self.mode != "opponent":
            raise RuntimeError('own_weights() belongs to extrapolate="opponent"')
        if player not in self._origin and player not in self._stepped:
            raise RuntimeError(f"own_weights({player!r}) without extrapolate() before it")
        replaced: list[tuple[Sequence[Tensor], Sequence[Tensor]]] = []
        with torch.no_grad():
            moves: list[tuple[str, list[Tensor]]] = [
                (n, self._ahead[n]) for n in self._ahead if n != player
            ]
            if player in self._origin:
                moves.append((player, self._origin[player]))
            for name, values in moves:
                live = self._parameters(name)
                replaced.append((live, [tensor.clone() for tensor in live]))
                tensors.copy_all(live, values)
        try:
            yield
        finally:
            with torch.no_grad():
                for weights, kept in replaced:
                    tensors.copy_all(weights, kept)

    def round(self, closure: Callable[[], Any]) -> Any:
        """Do one round.

        Args:
            closure: clears and fills the gradients of all players. It is called twice in the mode "all";
                in the mode "opponent" once, and then once for each player, of which only that player's
                gradients are used.

        Returns:
            what the last call returned.
        """
        with torch.enable_grad():
            result = closure()
        self.extrapolate()
        if self.mode == "all":
            with torch.enable_grad():
                result = closure()
            self.step()
            return result
        gradients: list[tuple[Tensor, Tensor | None]] = []
        for name in self.players:
            with self.own_weights(name), torch.enable_grad():
                result = closure()
            for optimizer in self.players[name]:
                for tensor in parameters_of(optimizer):
                    gradients.append((tensor, None if tensor.grad is None else tensor.grad.clone()))
        for tensor, gradient in gradients:
            tensor.grad = gradient
        self.step()
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the extrapolation's own state ("separate"); the rest is in the base optimizers'.

        Raises:
            RuntimeError: in the middle of a round.
        """
        if self._origin or self._stepped:
            raise RuntimeError("state_dict() in the middle of a round: finish it first")
        second = [
            [state.get(tensor, {}) for tensor in parameters_of(optimizer)]
            for optimizer, state in zip(self._optimizers(), self._second, strict=True)
        ]
        return {"version": 1, "mode": self.mode, "state": self.state, "second": second}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: it was saved with other options or other players.
        """
        here = {"version": 1, "mode": self.mode, "state": self.state}
        saved = {key: state_dict.get(key) for key in here}
        sizes = [len(list(parameters_of(optimizer))) for optimizer in self._optimizers()]
        if saved != here or [len(entry) for entry in state_dict["second"]] != sizes:
            raise ValueError(
                f"the saved state does not fit: saved {saved} with "
                f"{[len(entry) for entry in state_dict['second']]} parameters, here {here} with {sizes}"
            )
        for index, (optimizer, entries) in enumerate(
            zip(self._optimizers(), state_dict["second"], strict=True)
        ):
            self._second[index] = defaultdict(dict)
            for tensor, entry in zip(parameters_of(optimizer), entries, strict=True):
                if entry:
                    self._second[index][tensor] = copy.deepcopy(entry)


def _values(optimizer: Optimizer) -> list[tuple[Tensor, dict[str, Any]]]:
    """Return the optimizer's state by parameter; the parameters themselves are not copied with it."""
    return [(_Same(tensor), state) for tensor, state in optimizer.state.items()]  # type: ignore[misc]


def _restore(optimizer: Optimizer, kept: list[tuple[Any, dict[str, Any]]]) -> None:
    """Put a kept state back; a state that did not exist is removed."""
    optimizer.state.clear()
    for same, state in kept:
        optimizer.state[same.tensor] = state


class _Same:
    """Carries a tensor through `deepcopy` as the same object."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> _Same:
        return self
