"""Players of a game: names, their optimizers, and the parameters that they own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

OptimizerOrSequence: TypeAlias = Optimizer | Sequence[Optimizer]
Players: TypeAlias = OptimizerOrSequence | Mapping[str, OptimizerOrSequence]

# Optimizers that an ExtraGradient has moved to the extrapolated point and not yet brought back.
extrapolated: WeakSet[Optimizer] = WeakSet()

# Optimizers that an ExtraGradient steps together just now, with the calls that wait for the last of them.
stepping: WeakKeyDictionary[Optimizer, list[Callable[[], object]]] = WeakKeyDictionary()


class StateKeeper(Protocol):
    """Holds state of an optimizer outside of `Optimizer.state`."""

    def forget(self, optimizer: Optimizer) -> None:
        """Drop what is held of this optimizer."""
        ...


# Every `Optimistic` and `ExtraGradient`, told when the state of an optimizer is reset.
state_keepers: WeakSet[StateKeeper] = WeakSet()


def normalize_players(players: Players) -> dict[str, list[Optimizer]]:
    """Return the players as {name: optimizers}; players without a name are called "0", "1", ...

    Args:
        players: an optimizer, a sequence of them (one player each), or a mapping from names to an
            optimizer or several.

    Raises:
        TypeError: something is not a `torch.optim.Optimizer`.
        ValueError: there is no player, or a player owns no parameter.
    """
    named: Mapping[str, OptimizerOrSequence]
    if isinstance(players, Optimizer):
        named = {"0": players}
    elif isinstance(players, Mapping):
        named = players
    elif isinstance(players, (list, tuple)):
        named = {str(index): player for index, player in enumerate(players)}
    else:
        raise TypeError(
            "players must be a torch.optim.Optimizer, a sequence or a mapping of them, "
            f"got {type(players).__name__}"
        )
    if not named:
        raise ValueError("players is empty: give at least one optimizer")
    result: dict[str, list[Optimizer]] = {}
    for name, value in named.items():
        if not isinstance(name, str):
            raise TypeError(f"players: names must be strings, got {name!r}")
        optimizers: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer):
                what = (
                    optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
                )
                raise TypeError(
                    f"players[{name!r}] must be a torch.optim.Optimizer or a sequence of them, "
                    f"got {'the class ' if isinstance(optimizer, type) else ''}{what}"
                )
        if not any(True for optimizer in optimizers for _ in parameters_of(optimizer)):
            raise ValueError(f"players[{name!r}] owns no parameter")
        result[name] = optimizers
    return result


def describe(players: Mapping[str, list[Optimizer]]) -> str:
    """Return "name: optimizer's class" for every player."""
    return ", ".join(
        f"{name}: {'+'.join(type(optimizer).__name__ for optimizer in optimizers)}"
        for name, optimizers in players.items()
    )


def parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield an optimizer's parameters in the order of its groups."""
    for group in optimizer.param_groups:
        yield from group["params"]


def names_of(optimizer: Optimizer) -> Iterator[str | None]:
    """Yield the parameters' names where the optimizer was built from named parameters, else None."""
    for group in optimizer.param_groups:
        yield from group.get("param_names") or [None] * len(group["params"])


def check_tensor(player: str, tensor: Tensor) -> None:
    """Check that a parameter can be interpolated.

    Raises:
        ValueError: it is neither floating nor complex, or is sparse.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(
            f"player {player!r} has a parameter of {tensor.dtype}: lookahead interpolates, "
            "which needs floating or complex numbers"
        )
    if tensor.layout is not torch.strided:
        raise ValueError(
            f"player {player!r} has a sparse parameter ({tensor.layout}): lookahead needs dense "
            "ones (their gradients may be sparse)"
        )


def check_parameters(
    players: Mapping[str, list[Optimizer]], alphas: Sequence[Mapping[str, float]]
) -> None:
    """Check that every parameter can be interpolated, by one factor.

    Args:
        players: {name: optimizers}.
        alphas: {name: factor} for every level.

    Raises:
        ValueError: a parameter is neither floating nor complex, is sparse, or has owners of different
            alpha.
    """
    owner: dict[int, str] = {}
    for player, optimizers in players.items():
        for tensor in (t for optimizer in optimizers for t in parameters_of(optimizer)):
            check_tensor(player, tensor)
            other = owner.setdefault(id(tensor), player)
            if any(row[other] != row[player] for row in alphas):
                raise ValueError(
                    f"players {other!r} and {player!r} share a parameter and have different alpha"
                )


def modules_of(
    players: Mapping[str, list[Optimizer]],
    modules: Mapping[str, nn.Module] | Sequence[nn.Module] | None,
) -> dict[str, nn.Module]:
    """Return {player: module} for modules given by name or in the players' order.

    Raises:
        ValueError: there is no module, or a sequence has not one for each player.
        KeyError: a name is no player's.
    """
    if not modules:
        raise ValueError('buffers="interpolate" needs modules={player: module}')
    if not isinstance(modules, Mapping):
        if len(modules) != len(players):
            raise ValueError(
                f"modules has {len(modules)} entries, there are {len(players)} players"
            )
        return dict(zip(players, modules, strict=True))
    for player in modules:
        if player not in players:
            raise KeyError(f"modules: no player {player!r}; there are {list(players)}")
    return dict(modules)


def select_players(
    players: Mapping[str, list[Optimizer]], chosen: str | Sequence[str] | None
) -> list[str]:
    """Return the names of the chosen players: one, several, or all for None.

    Raises:
        KeyError: a name is no player's.
    """
    if chosen is None:
        return list(players)
    names = [chosen] if isinstance(chosen, str) else list(chosen)
    for name in names:
        if name not in players:
            raise KeyError(f"no player {name!r}; there are {list(players)}")
    return names
