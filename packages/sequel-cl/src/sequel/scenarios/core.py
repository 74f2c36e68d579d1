"""Data, tasks, and scenarios: ordered streams of tasks.

A task's arrays are made when they are asked for and kept until the next task, so that a permuted or rotated
stream costs the memory of one task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequel import _check

__all__ = ["Data", "Dataset", "Scenario", "Task"]

Array = NDArray[Any]


def labels(name: str, y: Any, n: int | None = None) -> Array:
    """Return integer labels (N,) in [0, n); TypeError or ValueError where they are not that."""
    y = np.asarray(y)
    if not np.issubdtype(y.dtype, np.integer):
        raise TypeError(f"{name} must be integer labels, got dtype {y.dtype}")
    if y.ndim != 1:
        raise ValueError(f"{name} must be one label per sample, got shape {y.shape}")
    if len(y) and (int(y.min()) < 0 or (n is not None and int(y.max()) >= n)):
        raise ValueError(f"{name} must lie in [0, {n if n is not None else 'n_classes'}), got "
                         f"{int(y.min())} to {int(y.max())}")  # fmt: skip
    out: Array = y.astype(np.int64)
    return out


@dataclass(frozen=True)
class Data:
    """Samples x (N, ...), labels y (N,) and the task t (N,) of each."""

    x: Array
    y: Array
    t: Array

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"x and y differ in length: {len(self.x)} and {len(self.y)}")

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Array) -> Data:
        return Data(self.x[index], self.y[index], self.t[index])

    @staticmethod
    def concat(parts: Sequence[Data]) -> Data:
        """Concatenate."""
        return Data(*(np.concatenate([getattr(p, k) for p in parts]) for k in ("x", "y", "t")))


@dataclass(frozen=True)
class Dataset:
    """Training and test arrays, and how uint8 inputs are normalised: (x / 255 - mean) / std.

    >>> x, y = np.zeros((4, 3)), np.array([0, 1, 0, 1])
    >>> Dataset(x, y, x, y).n_classes
    2
    """

    x_train: Array
    y_train: Array
    x_test: Array
    y_test: Array
    mean: Any = None
    std: Any = None

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            x, y = np.asarray(getattr(self, f"x_{part}")), getattr(self, f"y_{part}")
            if len(x) != len(y):
                raise ValueError(f"x_{part} and y_{part} differ in length: {len(x)} and {len(y)}")
            object.__setattr__(self, f"x_{part}", x)
            object.__setattr__(self, f"y_{part}", labels(f"y_{part}", y))
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise ValueError(
                f"x_train and x_test differ in shape: {self.x_train.shape[1:]} and "
                f"{self.x_test.shape[1:]}"
            )

    @property
    def n_classes(self) -> int:
        """One more than the largest label."""
        return int(max(self.y_train.max(initial=-1), self.y_test.max(initial=-1))) + 1

    @staticmethod
    def of(data: Any) -> Dataset:
        """Take a Dataset, (x, y), (x_train, y_train, x_test, y_test) or a pair of torch datasets.

        Where no test set is given, every fifth sample is held out.
        """
        if isinstance(data, Dataset):
            return data
        parts = tuple(data) if isinstance(data, (tuple, list)) else (data,)
        if len(parts) == 4:
            return Dataset(*(np.asarray(p) for p in parts))
        if len(parts) == 2 and not _is_array(parts[0]):
            return Dataset(*_unroll(parts[0]), *_unroll(parts[1]))
        x, y = (
            _unroll(parts[0]) if len(parts) == 1 else (np.asarray(parts[0]), np.asarray(parts[1]))
        )
        if len(x) != len(y):
            raise ValueError(f"x and y differ in length: {len(x)} and {len(y)}")
        test = np.arange(len(x)) % 5 == 4
        return Dataset(x[~test], y[~test], x[test], y[test])


def _is_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, list)) or hasattr(value, "numpy")


def _unroll(dataset: Any) -> tuple[Array, Array]:
    rows = [dataset[i] for i in range(len(dataset))]
    return np.stack([np.asarray(r[0]) for r in rows]), np.stack([np.asarray(r[1]) for r in rows])


@dataclass(frozen=True)
class Task:
    """One task: its data, its classes and a name. ``transform`` acts on whole arrays of inputs."""

    number: int
    source: Dataset
    train_index: Array
    test_index: Array
    classes: tuple[int, ...]
    name: str
    transform: Callable[[Array], Array] | None = None
    relabel: Array | None = None
    mask_id: int = -1
    _cache: dict[str, Data] = field(default_factory=dict, repr=False, compare=False)

    def _make(self, part: str) -> Data:
        index = self.train_index if part == "train" else self.test_index
        x = getattr(self.source, f"x_{part}")[index]
        y = getattr(self.source, f"y_{part}")[index]
        if self.relabel is not None:
            y = self.relabel[y]
        x = x if self.transform is None else self.transform(x)
        mine = self.number if self.mask_id < 0 else self.mask_id
        return Data(x, y, np.full(len(y), mine, dtype=np.int64))

    @property
    def train(self) -> Data:
        """The training data, transformed."""
        if "train" not in self._cache:
            self._cache["train"] = self._make("train")
        return self._cache["train"]

    @property
    def test(self) -> Data:
        """The test data, transformed."""
        return self._make("test")

    def forget(self) -> None:
        """Release the cached training arrays."""
        self._cache.clear()


class Scenario(Sequence[Task]):
    """An ordered stream of tasks.

    Args:
        tasks: the tasks, none of them empty.
        n_classes: width of the model's output.
        kind: ``"class"`` (one head, no task id), ``"domain"`` (same classes, other inputs) or ``"task"``
            (task ids given: logits outside the task's classes are masked).
    """

    def __init__(self, tasks: Iterable[Task], n_classes: int, kind: str, name: str = "") -> None:
        _check.one_of("kind", kind, ("class", "domain", "task"))
        self.tasks = list(tasks)
        self.n_classes, self.kind, self.name = n_classes, kind, name or kind
        if not self.tasks:
            raise ValueError("a scenario needs at least one task")
        for task in self.tasks:
            for part, index in (("train", task.train_index), ("test", task.test_index)):
                if len(index) == 0:
                    raise ValueError(f"task {task.number} ({task.name}) has an empty {part} set")
                y = np.unique(getattr(task.source, f"y_{part}")[index])
                y = y if task.relabel is None else task.relabel[y]
                if wrong := sorted(set(y.tolist()) - set(task.classes)):
                    raise ValueError(
                        f"task {task.number} ({task.name}) has {part} labels {wrong} outside its classes "
                        f"{task.classes}"
                    )
            if not 0 <= min(task.classes) <= max(task.classes) < n_classes:
                raise ValueError(
                    f"task {task.number} ({task.name}) has classes {task.classes} outside [0, {n_classes})"
                )

    @staticmethod
    def of(tasks: Iterable[Task]) -> Scenario:
        """Take a scenario, or tasks of one head over all their classes."""
        if isinstance(tasks, Scenario):
            return tasks
        listed = list(tasks)
        if not listed or not all(isinstance(task, Task) for task in listed):
            raise TypeError(
                "scenario must be a Scenario or tasks, not data: make one, e.g. "
                "sequel.scenarios.class_incremental(data, n_tasks=5)"
            )
        return Scenario(listed, max(max(t.classes) for t in listed) + 1, "class", "custom")

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: Any) -> Any:
        return self.tasks[index]

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __repr__(self) -> str:
        return f"Scenario({self.name}: {len(self)} tasks, {self.n_classes} classes, kind={self.kind!r})"

    @property
    def mask(self) -> Array | None:
        """The (T, C) table of allowed classes, or None where no task ids are given."""
        if self.kind != "task":
            return None
        table = np.zeros((len(self), self.n_classes), dtype=bool)
        for task in self.tasks:
            table[task.number if task.mask_id < 0 else task.mask_id, list(task.classes)] = True
        return table

    def fingerprint(self) -> str:
        """Return the sha256 of the kind, of every task's order and labels and of its first inputs."""
        digest = hashlib.sha256(f"{self.kind}/{self.n_classes}/{len(self)}".encode())
        for source in {id(t.source): t.source for t in self.tasks}.values():
            for part in (source.x_train, source.y_train, source.x_test, source.y_test):
                digest.update(np.ascontiguousarray(part).tobytes())
        for task in self.tasks:
            digest.update(np.asarray(task.train_index, dtype="<i8").tobytes())
            digest.update(np.asarray(task.test_index, dtype="<i8").tobytes())
            sample = task.source.x_train[task.train_index[:8]]
            shown = sample if task.transform is None else task.transform(sample)
            digest.update(np.ascontiguousarray(shown).tobytes())
            digest.update(repr(task.classes).encode())
            if task.relabel is not None:
                digest.update(task.relabel.tobytes())
        return digest.hexdigest()
