"""Slow copies: what a player's weights were at the last synchronisation, for every level."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lookahead_minmax.core import tensors
from lookahead_minmax.core.players import check_tensor, names_of, parameters_of, state_keepers

# State that is no running mean of gradients and must keep its value: counters, NAdam's product of
# momenta, step sizes of ASGD and Rprop.
NOT_INTERPOLATED = frozenset({"step", "mu_product", "mu", "eta", "step_size"})


@dataclass
class Slot:
    """One live tensor of a player and its slow copies, one for each level.

    A parameter stays the same object for life; a buffer is looked up in its layer, since
    `Module.to` replaces it.
    """

    player: str
    name: str | None
    holder: Tensor | tuple[nn.Module, str]
    owners: list[Optimizer] = field(default_factory=list)
    slow: list[Tensor] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Remember what the tensor looked like."""
        self.shape, self.dtype = self.tensor.shape, self.tensor.dtype

    @property
    def tensor(self) -> Tensor:
        """The live tensor."""
        if isinstance(self.holder, Tensor):
            return self.holder
        layer, key = self.holder
        return layer.get_buffer(key)

    def label(self) -> str:
        """Name the tensor in a message."""
        kind = "parameter" if isinstance(self.holder, Tensor) else "buffer"
        return f"{kind} {self.name or tuple(self.shape)} of player {self.player!r}"


class SlowCopies:
    """The slots of all players, and of the statistics buffers where these follow the weights.

    Args:
        players: names and optimizers.
        levels: number of slow copies of each tensor.
        dtype: of the copies; None is float32 for half-precision weights and the weights' type else.
        device: of the copies; None follows the weights.
        foreach: see `tensors.pull_back`.
    """

    def __init__(
        self,
        players: Mapping[str, list[Optimizer]],
        levels: int,
        dtype: torch.dtype | None,
        device: torch.device | None,
        foreach: bool | None,
    ) -> None:
        self.players = players
        self.levels = levels
        self.dtype = dtype
        self.device = device
        self.foreach = foreach
        self.slots: list[Slot] = []
        self.buffers: list[Slot] = []
        self._known: list[int] = []

    def adopt(self) -> None:
        """Snapshot every tensor that has no slow copy yet, drop those that no player owns any more."""
        known = [id(t) for opts in self.players.values() for o in opts for t in parameters_of(o)]
        if known == self._known:
            return
        owned = set(known)
        self.slots = [slot for slot in self.slots if id(slot.tensor) in owned]
        slots = {id(slot.tensor): slot for slot in self.slots}
        for player, optimizers in self.players.items():
            for optimizer in optimizers:
                for tensor, name in zip(parameters_of(optimizer), names_of(optimizer), strict=True):
                    slot = slots.get(id(tensor))
                    if slot is None:
                        check_tensor(player, tensor)
                        slot = self._slot(player, name, tensor)
                        slots[id(tensor)] = slot
                        self.slots.append(slot)
                    if not any(owner is optimizer for owner in slot.owners):
                        slot.owners.append(optimizer)
        self._known = known

    def start_anew(self, *, buffers: bool = True) -> None:
        """Drop all copies and snapshot every tensor as it is now, with or without the buffers."""
        self.slots.clear()
        self._known = []
        if buffers:
            self.buffers = [self._slot(s.player, s.name, s.holder) for s in self.buffers]
        self.adopt()

    def versions(self) -> list[int]:
        """Return torch's modification counters of the live tensors."""
        return [slot.tensor._version for slot in self.all()]

    def adopt_buffers(self, player: str, module: nn.Module) -> None:
        """Let the running statistics of a module's normalisation layers follow the weights."""
        for name, layer in module.named_modules():
            if isinstance(layer, nn.modules.batchnorm._NormBase):
                for key, buffer in layer.named_buffers(recurse=False):
                    if buffer.is_floating_point():
                        path = f"{name}.{key}".lstrip(".")
                        self.buffers.append(self._slot(player, path, (layer, key)))

    def _slot(self, player: str, name: str | None, holder: Tensor | tuple[nn.Module, str]) -> Slot:
        slot = Slot(player, name, holder)
        slot.slow = [self._copy(slot.tensor) for _ in range(self.levels)]
        return slot

    def _copy(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype or (torch.float32 if tensor.dtype in tensors.HALF else tensor.dtype)
        if tensor.is_complex():
            dtype = tensor.dtype
        source = tensor.detach()
        if self.device is None or self.device == tensor.device:
            return torch.empty_like(source, dtype=dtype).copy_(source)
        pin = self.device.type == "cpu" and tensor.device.type == "cuda"
        empty = torch.empty(source.shape, dtype=dtype, device=self.device, pin_memory=pin)
        return empty.copy_(source)

    def all(self) -> Iterator[Slot]:
        """Yield the slots of parameters, then those of buffers."""
        yield from self.slots
        yield from self.buffers

    def of(self, players: Iterable[str] | None) -> list[Slot]:
        """Return the slots of some players (None: of all)."""
        wanted = set(self.players if players is None else players)
        return [slot for slot in self.all() if slot.player in wanted]

    def check(self) -> None:
        """Refuse tensors whose shape or type changed; let the copies follow a change of device.

        Raises:
            RuntimeError: a shape or type is not that of the snapshot.
        """
        for slot in self.all():
            if slot.tensor.shape != slot.shape or slot.tensor.dtype != slot.dtype:
                raise RuntimeError(
                    f"{slot.label()} was {tuple(slot.shape)}, {slot.dtype} when its slow copy was "
                    f"made and is {tuple(slot.tensor.shape)}, {slot.tensor.dtype} now: call reset()"
                )
            if self.device is None and slot.slow[0].device != slot.tensor.device:
                slot.slow = [slow.to(slot.tensor.device) for slow in slot.slow]

    def pull_back(self, level: int, alphas: Mapping[str, float]) -> None:
        """Synchronise one level (0-based) of every slot; the levels below take its value."""
        for player, alpha in alphas.items():
            slots = self.of([player])
            fast = [slot.tensor.detach() for slot in slots]
            tensors.pull_back(fast, [s.slow[level] for s in slots], alpha, self.foreach)
        for lower in range(level):
            tensors.copy_all(
                [slot.slow[lower] for slot in self.all()], [slot.slow[level] for slot in self.all()]
            )

    def take(self, level: int | None = None) -> None:
        """Set the slow copies of a level (None: of all) to the live values."""
        for slot in self.all():
            for index in range(self.levels) if level is None else [level]:
                tensors.copy_all([slot.slow[index]], [slot.tensor.detach()])

    def put(self, level: int, players: Iterable[str] | None = None) -> None:
        """Set the live values of some players to their slow copies of a level."""
        for slot in self.of(players):
            tensors.copy_all([slot.tensor.detach()], [slot.slow[level]])

    def forget_state(self) -> None:
        """Drop the base optimizers' state, so that they start anew."""
        for slot in self.slots:
            for owner in slot.owners:
                owner.state.pop(slot.tensor, None)
        for optimizer in (o for optimizers in self.players.values() for o in optimizers):
            for keeper in list(state_keepers):
                keeper.forget(optimizer)

    def interpolate_state(self, alphas: Mapping[str, float]) -> None:
        """Interpolate every floating tensor of the base optimizers' state with its last value.

        A state that did not exist at the last synchronisation counts as zero, which is what torch's
        optimizers start from. Step counters and the like are left alone (`NOT_INTERPOLATED`).
        """
        for slot in self.slots:
            for number, owner in enumerate(slot.owners):
                for key, value in owner.state.get(slot.tensor, {}).items():
                    if (
                        key in NOT_INTERPOLATED
                        or not isinstance(value, Tensor)
                        or not (value.is_floating_point() or value.is_complex())
                    ):
                        continue
                    name = f"{number}.{key}"
                    if name not in slot.state:
                        slot.state[name] = torch.zeros_like(value)
                    slow = [slot.state[name]]
                    tensors.pull_back([value], slow, alphas[slot.player], self.foreach)

    def first_nonfinite(self) -> Slot | None:
        """Return a slot whose live tensor has an infinite or NaN element."""
        return next((s for s in self.all() if not tensors.all_finite(s.tensor.detach())), None)

    def module_state_dict(self, module: nn.Module, level: int) -> dict[str, Tensor]:
        """Return `module.state_dict()` with the slow copies of a level (0-based) in it."""
        slow = {id(slot.tensor): slot.slow[level] for slot in self.all()}
        live: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        live.update(module.named_buffers(remove_duplicate=False))
        result = {}
        for name, value in module.state_dict().items():
            if not isinstance(value, Tensor):  # what a layer's get_extra_state returned
                result[name] = value
                continue
            source = slow.get(id(live.get(name)), value)
            result[name] = source.to(value.device, value.dtype, copy=True).contiguous()
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return {player: names, shapes, slow copies, state}, in the order of the parameters."""
        result: dict[str, Any] = {}
        for player in self.players:
            slots = [slot for slot in self.slots if slot.player == player]
            buffers = [slot for slot in self.buffers if slot.player == player]
            result[player] = {
                "names": [slot.name for slot in slots],
                "shapes": [list(slot.shape) for slot in slots],
                "slow": [list(slot.slow) for slot in slots],
                "state": [dict(slot.state) for slot in slots],
                "buffer_shapes": [list(slot.shape) for slot in buffers],
                "buffers": [list(slot.slow) for slot in buffers],
            }
        return result

    def mismatches(self, saved: Mapping[str, Any]) -> list[str]:
        """Say in what a saved `state_dict` does not fit these players."""
        if set(saved) != set(self.players):
            return [f"players: saved {sorted(saved)}, here {sorted(self.players)}"]
        found = []
        for player, entry in saved.items():
            for key, slots in (("", self.slots), ("buffer_", self.buffers)):
                here = [list(slot.shape) for slot in slots if slot.player == player]
                if entry[f"{key}shapes"] != here:
                    found.append(
                        f"{key}shapes of {player!r}: saved {entry[f'{key}shapes']}, here {here}"
                    )
        return found

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over saved slow copies; `mismatches` must have found nothing."""
        for player, entry in saved.items():
            slots = [slot for slot in self.slots if slot.player == player]
            buffers = [slot for slot in self.buffers if slot.player == player]
            pairs = [
                *zip(slots, entry["slow"], strict=True),
                *zip(buffers, entry["buffers"], strict=True),
            ]
            for slot, copies in pairs:
                tensors.copy_all(slot.slow, copies)
            for slot, state in zip(slots, entry["state"], strict=True):
                device = slot.tensor.device
                slot.state = {key: value.to(device, copy=True) for key, value in state.items()}


def backup(slots: Sequence[Slot]) -> list[Tensor]:
    """Return copies of the live tensors."""
    return [slot.tensor.detach().clone() for slot in slots]
