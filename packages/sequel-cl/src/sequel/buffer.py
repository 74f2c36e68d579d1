"""Replay memory: which item goes into which slot (on the host), and arrays that hold the items."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sequel import _check
from sequel.functional import herding, last_wins, slots_from_uniforms
from sequel.rng import draws_at, stream

__all__ = ["ReplayBuffer", "Slots"]

ONLINE = ("reservoir", "ring", "class_balanced", "gdumb")


class Slots:
    """Decides the slots of incoming items and the rows of a draw; holds counts, no items.

    Policies: ``reservoir`` (uniform over the stream, vectorised, O(1) per item), ``ring`` (the last
    items, per class if ``n_classes`` is given), ``class_balanced`` (Chrysakis & Moens 2020: reservoir
    within classes that have been the largest), ``gdumb`` (greedy balancing) and ``manual``, filled by
    :meth:`fill`. All draws are counter-based: item i's slot depends on ``seed`` and i alone.
    """

    def __init__(
        self, capacity: int, policy: str = "reservoir", seed: int = 0, n_classes: int | None = None
    ) -> None:
        _check.count("capacity", capacity)
        _check.one_of("policy", policy, (*ONLINE, "manual"))
        self.capacity, self.policy, self.seed, self.n_classes = capacity, policy, seed, n_classes
        self.seen = 0
        self.label = np.full(capacity, -1, dtype=np.int64)
        self.task = np.full(capacity, -1, dtype=np.int64)
        self.count: dict[int, int] = {}
        self.full: set[int] = set()
        self._rows: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        if self.policy == "reservoir":
            return min(self.seen, self.capacity)
        return len(self.rows)

    @property
    def rows(self) -> NDArray[np.int64]:
        """The filled rows, ascending."""
        if self.policy == "reservoir":
            return np.arange(len(self))
        if self._rows is None:
            self._rows = np.flatnonzero(self.label >= 0)
        return self._rows

    def add(self, y: NDArray[Any], task: int = 0) -> NDArray[np.int64]:
        """Return the slot of each item of a batch with labels y; ``capacity`` means: not stored."""
        y = np.asarray(y).astype(np.int64).reshape(-1)
        n = len(y)
        u = draws_at(self.seed, self.policy, self.seen, n)
        if self.policy == "reservoir":
            slots = slots_from_uniforms(u, self.seen, self.capacity)
        elif self.policy == "ring" and self.n_classes is None:
            slots = last_wins((self.seen + np.arange(n)) % self.capacity, self.capacity)
        elif self.policy == "manual":
            raise RuntimeError("policy 'manual' is filled by fill(rows, ...), not by add()")
        else:
            chosen = []
            for label, draw in zip(y.tolist(), u.tolist(), strict=True):
                slot = self._one(label, draw)
                if slot < self.capacity:
                    self.label[slot] = label
                    self._rows = None
                chosen.append(slot)
            slots = last_wins(np.array(chosen, dtype=np.int64), self.capacity)
        self.seen += n
        kept = slots < self.capacity
        self.label[slots[kept]] = y[kept]
        self.task[slots[kept]] = task
        if self.policy != "reservoir":
            self._rows = None
        return slots

    def _one(self, label: int, u: float) -> int:
        before = self.count.get(label, 0)
        self.count[label] = before + 1
        if self.policy == "ring":
            assert self.n_classes is not None
            share = max(self.capacity // self.n_classes, 1)
            if label >= self.n_classes:
                raise ValueError(f"y must lie in [0, {self.n_classes}), got {label}")
            inside = (label + 1) * share <= self.capacity
            return label * share + before % share if inside else self.capacity
        free = np.flatnonzero(self.label < 0)
        if len(free):
            return int(free[0])
        held = np.bincount(self.label)
        largest = int(held.argmax())
        mine = int(held[label]) if label < len(held) else 0
        if self.policy == "gdumb":
            if mine >= int(held[largest]):
                return self.capacity
            rows = np.flatnonzero(self.label == largest)
            return int(rows[int(u * len(rows))])
        self.full.update(np.flatnonzero(held == held[largest]).tolist())
        if label not in self.full:
            rows = np.flatnonzero(self.label == largest)
            return int(rows[int(u * len(rows))])
        if u * (before + 1) >= mine:
            return self.capacity
        rows = np.flatnonzero(self.label == label)
        return int(rows[min(int(u * (before + 1)), len(rows) - 1)])

    def fill(self, rows: NDArray[np.int64], y: NDArray[Any], task: int) -> None:
        """Record that ``rows`` now hold items with labels y of a task."""
        self.label[rows], self.task[rows] = y, task
        self.seen += len(rows)
        self._rows = None

    def clear(self, rows: NDArray[np.int64]) -> None:
        """Mark rows as free."""
        self.label[rows] = self.task[rows] = -1
        self._rows = None

    def sample(self, n: int, rng: np.random.Generator, balanced: bool = False) -> NDArray[np.int64]:
        """Draw min(n, len) rows without replacement; ``balanced`` draws classes evenly."""
        rows = self.rows
        if len(rows) == 0:
            raise RuntimeError("cannot sample from an empty buffer: add() items first")
        n = min(n, len(rows))
        if balanced:
            shuffled = rows[rng.permutation(len(rows))]
            labels = self.label[shuffled]
            rank = np.zeros(len(rows), dtype=np.int64)
            for label in np.unique(labels):
                where = labels == label
                rank[where] = np.arange(int(where.sum()))
            return shuffled[np.argsort(rank, kind="stable")[:n]]
        return rows[rng.choice(len(rows), size=n, replace=False)]

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return the counts and the labels and tasks of the slots, as arrays."""
        keys = np.array(sorted(self.count), dtype=np.int64)
        return {
            "seen": np.array(self.seen, dtype=np.int64),
            "label": self.label.copy(),
            "task": self.task.copy(),
            "count_label": keys,
            "count": np.array([self.count[k] for k in keys.tolist()], dtype=np.int64),
            "full": np.array(sorted(self.full), dtype=np.int64),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if len(state["label"]) != self.capacity:
            raise ValueError(
                f"state is of a buffer of capacity {len(state['label'])}, this has {self.capacity}"
            )
        self.seen = int(state["seen"])
        self.label = np.array(state["label"], dtype=np.int64)
        self.task = np.array(state["task"], dtype=np.int64)
        keys = np.asarray(state["count_label"]).tolist()
        self.count = dict(zip(keys, np.asarray(state["count"]).tolist(), strict=True))
        self.full = set(np.asarray(state["full"]).tolist())
        self._rows = None


class ReplayBuffer:
    """A replay memory for any loop: ``add(x=..., y=...)``, ``sample(n)``.

    Args:
        capacity: number of items, >= 1.
        policy: ``"reservoir"``, ``"ring"``, ``"class_balanced"``, ``"gdumb"`` or ``"herding"`` (each call
            of ``add`` brings whole classes and their ``features``; every class keeps an equal share).
        fields: one item of every field, e.g. ``{"x": torch.zeros(4), "y": 0}``; None takes the first ``add``'s.
        device: where the items live (``storage="device"``).
        storage: ``"ram"`` (host), ``"device"``, or ``"mmap"`` (NumPy memory maps in ``path``).
        seed: of the counter-based draws.
        n_classes: makes ``"ring"`` one ring per class.

    The first ``add``, or ``fields``, fixes names, shapes and dtypes (uint8 stays uint8). Raises
    ValueError where they change, RuntimeError when an empty buffer is sampled. The policies that need
    labels take them from the field ``y``.

    >>> buffer = ReplayBuffer(100, seed=0)
    >>> for step in range(50):
    ...     slots = buffer.add(x=torch.rand(10, 4), y=torch.arange(10))
    >>> len(buffer), buffer.sample(32)["x"].shape
    (100, torch.Size([32, 4]))
    """

    def __init__(
        self,
        capacity: int,
        policy: str = "reservoir",
        *,
        fields: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        storage: str = "ram",
        path: str | os.PathLike[str] | None = None,
        seed: int = 0,
        n_classes: int | None = None,
    ) -> None:
        _check.one_of("storage", storage, ("ram", "device", "mmap"))
        _check.one_of("policy", policy, (*ONLINE, "herding"))
        self.policy, self.seed, self.storage = policy, seed, storage
        self.device = torch.device(device if storage == "device" else "cpu")
        self.slots = Slots(capacity, "manual" if policy == "herding" else policy, seed, n_classes)
        self.path = path
        self.fields: dict[str, Tensor] = {
            name: self._allocate(name, torch.as_tensor(item)[None])
            for name, item in (fields or {}).items()
        }
        self.draws = 0
        self._rank = np.zeros(capacity, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def capacity(self) -> int:
        """The number of items that fit."""
        return self.slots.capacity

    def _allocate(self, name: str, like: Tensor) -> Tensor:
        shape = (self.capacity, *like.shape[1:])
        if self.storage != "mmap":
            return torch.zeros(shape, dtype=like.dtype, device=self.device)
        if like.dtype == torch.bfloat16:
            raise ValueError(f"field {name!r} is bfloat16, which a NumPy memory map cannot hold")
        folder = Path(tempfile.mkdtemp(prefix="sequel-") if self.path is None else self.path)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder
        dtype = np.dtype(str(like.dtype).removeprefix("torch."))
        file = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype=dtype, shape=shape)
        return torch.from_numpy(file)

    def add(self, *, features: Any = None, **batch: Any) -> NDArray[np.int64]:
        """Offer a batch to the buffer; returns the slot of each item (``capacity``: not stored)."""
        rows = {name: torch.as_tensor(value).detach() for name, value in batch.items()}
        if not rows:
            raise ValueError("add() needs at least one field, e.g. x=...")
        lengths = {name: len(value) for name, value in rows.items()}
        n = next(iter(lengths.values()))
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the fields of add() have different lengths: {lengths}")
        if self.fields and set(rows) != set(self.fields):
            raise ValueError(
                f"add() got fields {sorted(rows)}, the buffer has {sorted(self.fields)}"
            )
        by_class = self.slots.n_classes is not None or self.policy not in ("ring", "reservoir")
        if self.policy != "reservoir" and by_class and "y" not in rows:
            raise ValueError(f"policy {self.policy!r} needs the labels: add(..., y=...)")
        if self.policy == "herding" and features is None:
            raise ValueError("policy 'herding' needs features=..., one row per item")
        for name, value in rows.items():
            if name not in self.fields:
                self.fields[name] = self._allocate(name, value)
            have = self.fields[name]
            if value.shape[1:] != have.shape[1:] or value.dtype != have.dtype:
                raise ValueError(
                    f"field {name!r} has shape {tuple(value.shape[1:])} and dtype {value.dtype}, the "
                    f"buffer holds {tuple(have.shape[1:])} and {have.dtype}"
                )
        labels = np.asarray(rows["y"].cpu()) if "y" in rows else np.zeros(n, dtype=np.int64)
        slots = self._herd(labels, features) if self.policy == "herding" else self.slots.add(labels)
        kept = torch.from_numpy(np.flatnonzero(slots < self.capacity))
        where = torch.from_numpy(slots)[kept].to(self.device)
        for name, value in rows.items():
            self.fields[name][where] = value[kept.to(value.device)].to(self.device)
        return slots

    def _herd(self, labels: NDArray[Any], features: Any) -> NDArray[np.int64]:
        features = np.asarray(torch.as_tensor(features).detach().cpu())
        slots = np.full(len(labels), self.capacity, dtype=np.int64)
        new = np.unique(labels)
        held = self.slots.label
        old = np.setdiff1d(np.unique(held[held >= 0]), new)
        share = max(self.capacity // (len(old) + len(new)), 1)
        drop = (held >= 0) & ((self._rank >= share) | np.isin(held, new))
        self.slots.clear(np.flatnonzero(drop))
        free = np.flatnonzero(self.slots.label < 0).tolist()
        for label in new.tolist():
            mine = np.flatnonzero(labels == label)
            for rank, item in enumerate(herding(features[mine], share).tolist()):
                if not free:
                    break
                slot = free.pop(0)
                slots[mine[item]], self._rank[slot] = slot, rank
                self.slots.fill(np.array([slot]), np.array([label]), 0)
        return slots

    def sample(self, n: int, *, balanced: bool = False) -> dict[str, Tensor]:
        """Return a batch of min(n, len) items, without replacement, as a dict of fields."""
        _check.count("n", n)
        index = self.slots.sample(n, stream(self.seed, "sample", self.draws), balanced)
        self.draws += 1
        where = torch.from_numpy(index).to(self.device)
        return {name: value[where] for name, value in self.fields.items()}

    def expected_inclusion(self) -> float:
        """Return the probability that an item of the stream is in memory (exact for the reservoir)."""
        return min(1.0, self.capacity / max(self.slots.seen, 1))

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and counts; no pickled objects."""
        out: dict[str, Any] = {f"fields.{k}": v.clone() for k, v in self.fields.items()}
        out |= {f"slots.{k}": torch.from_numpy(v) for k, v in self.slots.state_dict().items()}
        out["rank"] = torch.from_numpy(self._rank.copy())
        out["draws"] = torch.tensor(self.draws)
        return out

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        inside = {k[6:]: v.numpy() for k, v in state.items() if k.startswith("slots.")}
        self.slots.load_state_dict(inside)
        for key, value in state.items():
            if key.startswith("fields."):
                name = key[7:]
                if name not in self.fields:
                    self.fields[name] = self._allocate(name, value)
                self.fields[name].copy_(value)
        self._rank = state["rank"].numpy().copy()
        self.draws = int(state["draws"])
