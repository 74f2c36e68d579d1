"""Builders of scenarios: pure functions of (data, arguments, seed)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequel import _check
from sequel.rng import stream
from sequel.scenarios.core import Dataset, Scenario, Task

__all__ = [
    "blurry",
    "class_incremental",
    "data_incremental",
    "domain_incremental",
    "from_datasets",
    "permuted",
    "rotate",
    "rotated",
    "task_incremental",
]

Array = NDArray[Any]


def _groups(
    data: Dataset, n_tasks: int | None, class_order: Any, increments: Any, seed: int | None
) -> list[tuple[int, ...]]:
    n = data.n_classes
    order = list(range(n)) if class_order is None else [int(c) for c in class_order]
    if sorted(order) != list(range(n)):
        raise ValueError(f"class_order must be a permutation of range({n}), got {class_order!r}")
    if class_order is None and seed is not None:
        order = stream(seed, "class-order").permutation(n).tolist()
    if increments is None:
        if n_tasks is None:
            raise ValueError("give n_tasks or increments")
        _check.count("n_tasks", n_tasks)
        if n % n_tasks:
            raise ValueError(
                f"n_tasks={n_tasks} does not divide the {n} classes; give increments=[...]"
            )
        increments = [n // n_tasks] * n_tasks
    if sum(increments) != n or min(increments) < 1:
        raise ValueError(f"increments must be positive and sum to {n}, got {list(increments)}")
    edges = np.cumsum([0, *increments])
    return [tuple(order[a:b]) for a, b in itertools.pairwise(edges)]


def _split(
    data: Any, groups: list[tuple[int, ...]], source: Dataset, relabel: bool
) -> Iterator[Task]:
    for number, classes in enumerate(groups):
        table = None
        if relabel:
            table = np.full(source.n_classes, -1, dtype=np.int64)
            table[list(classes)] = np.arange(len(classes))
        yield Task(
            number,
            source,
            np.flatnonzero(np.isin(source.y_train, classes)),
            np.flatnonzero(np.isin(source.y_test, classes)),
            tuple(range(len(classes))) if relabel else classes,
            f"classes {','.join(map(str, classes))}",
            relabel=table,
        )


def class_incremental(
    data: Any,
    n_tasks: int | None = None,
    *,
    class_order: Sequence[int] | None = None,
    increments: Sequence[int] | None = None,
    seed: int | None = None,
) -> Scenario:
    """Split the classes over tasks; one head over all classes, no task id.

    Args:
        data: anything that :meth:`Dataset.of` takes.
        n_tasks: number of equal groups; must divide the number of classes.
        class_order: a permutation of the classes; None is ascending, or shuffled by ``seed``.
        increments: the sizes of the groups, instead of ``n_tasks``.

    >>> x, y = np.zeros((40, 3)), np.arange(40) % 4
    >>> class_incremental((x, y, x, y), n_tasks=2)[1].classes
    (2, 3)
    """
    source = Dataset.of(data)
    groups = _groups(source, n_tasks, class_order, increments, seed)
    return Scenario(_split(data, groups, source, False), source.n_classes, "class", "class-IL")


def task_incremental(
    data: Any,
    n_tasks: int | None = None,
    *,
    class_order: Sequence[int] | None = None,
    increments: Sequence[int] | None = None,
    seed: int | None = None,
) -> Scenario:
    """Split the classes over tasks, with task ids: logits of other tasks' classes are masked.

    >>> x, y = np.zeros((40, 3)), np.arange(40) % 4
    >>> task_incremental((x, y, x, y), n_tasks=2).mask.astype(int).tolist()
    [[1, 1, 0, 0], [0, 0, 1, 1]]
    """
    source = Dataset.of(data)
    groups = _groups(source, n_tasks, class_order, increments, seed)
    return Scenario(_split(data, groups, source, False), source.n_classes, "task", "task-IL")


def domain_incremental(
    data: Any,
    n_tasks: int | None = None,
    *,
    class_order: Sequence[int] | None = None,
    increments: Sequence[int] | None = None,
    seed: int | None = None,
) -> Scenario:
    """Split the classes over tasks and number them anew in each: same outputs, other inputs.

    >>> x, y = np.zeros((40, 3)), np.arange(40) % 4
    >>> s = domain_incremental((x, y, x, y), n_tasks=2)
    >>> s.n_classes, s[1].train.y.max()
    (2, np.int64(1))
    """
    source = Dataset.of(data)
    groups = _groups(source, n_tasks, class_order, increments, seed)
    if len({len(g) for g in groups}) > 1:
        raise ValueError(f"increments must be equal in a domain-incremental split, got {groups}")
    return Scenario(_split(data, groups, source, True), len(groups[0]), "domain", "domain-IL")


def _whole(
    source: Dataset, transforms: Sequence[Callable[[Array], Array] | None], names: Sequence[str]
) -> Iterator[Task]:
    classes = tuple(range(source.n_classes))
    every = np.arange(len(source.y_train)), np.arange(len(source.y_test))
    for number, (transform, name) in enumerate(zip(transforms, names, strict=True)):
        yield Task(number, source, *every, classes, name, transform)


class _Permute:
    def __init__(self, order: Array) -> None:
        self.order = order

    def __call__(self, x: Array) -> Array:
        return np.ascontiguousarray(x.reshape(len(x), -1)[:, self.order]).reshape(x.shape)


def permuted(data: Any, n_tasks: int, *, seed: int = 0) -> Scenario:
    """Permute the pixels, differently in each task; the first task is the data itself.

    >>> x, y = np.arange(12.0).reshape(4, 3), np.array([0, 1, 0, 1])
    >>> s = permuted((x, y, x, y), n_tasks=3)
    >>> bool((s[0].train.x == x).all()), np.sort(s[2].train.x[0]).tolist()
    (True, [0.0, 1.0, 2.0])
    """
    _check.count("n_tasks", n_tasks)
    source = Dataset.of(data)
    size = int(np.prod(source.x_train.shape[1:]))
    moves: list[Callable[[Array], Array] | None] = [None]
    moves += [_Permute(stream(seed, "permutation", t).permutation(size)) for t in range(1, n_tasks)]
    names = [f"permutation {t}" for t in range(n_tasks)]
    return Scenario(_whole(source, moves, names), source.n_classes, "domain", "permuted")


class _Rotate:
    def __init__(self, degrees: float) -> None:
        self.degrees = degrees

    def __call__(self, x: Array) -> Array:
        return rotate(x, self.degrees)


def rotate(x: Array, degrees: float) -> Array:
    """Rotate images (N, H, W), (N, C, H, W) or flat squares counter-clockwise; bilinear, filled with 0.

    >>> image = np.arange(9.0).reshape(1, 3, 3)
    >>> rotate(image, 90)[0].tolist()
    [[2.0, 5.0, 8.0], [1.0, 4.0, 7.0], [0.0, 3.0, 6.0]]
    """
    if degrees % 360 == 0:
        return x
    shape = x.shape
    if x.ndim == 2:
        side = round(shape[1] ** 0.5)
        if side * side != shape[1]:
            raise ValueError(f"rotate needs images, got vectors of {shape[1]} entries")
        x = x.reshape(-1, side, side)
    h, w = x.shape[-2:]
    angle = np.deg2rad(degrees)
    cos, sin = round(float(np.cos(angle)), 15), round(float(np.sin(angle)), 15)
    rows, cols = np.meshgrid(np.arange(h) - (h - 1) / 2, np.arange(w) - (w - 1) / 2, indexing="ij")
    r = np.round(cos * rows + sin * cols + (h - 1) / 2, 12)
    c = np.round(-sin * rows + cos * cols + (w - 1) / 2, 12)
    r0, c0 = np.floor(r).astype(int), np.floor(c).astype(int)
    out = np.zeros(x.shape, dtype=np.float64)
    for dr in (0, 1):
        for dc in (0, 1):
            weight = np.abs(1 - dr - (r - r0)) * np.abs(1 - dc - (c - c0))
            rr, cc = r0 + dr, c0 + dc
            inside = (rr >= 0) & (rr < h) & (cc >= 0) & (cc < w)
            out += x[..., rr.clip(0, h - 1), cc.clip(0, w - 1)] * (weight * inside)
    if np.issubdtype(x.dtype, np.integer):
        out = np.rint(out)
    return out.astype(x.dtype).reshape(shape)


def rotated(data: Any, n_tasks: int, *, step: float | None = None) -> Scenario:
    """Rotate the images by ``step`` degrees more in each task (None: 180 / n_tasks).

    >>> x, y = np.zeros((4, 1, 3, 3)), np.array([0, 1, 0, 1])
    >>> [t.name for t in rotated((x, y, x, y), n_tasks=3)]
    ['rotation 0', 'rotation 60', 'rotation 120']
    """
    _check.count("n_tasks", n_tasks)
    step = 180 / n_tasks if step is None else step
    source = Dataset.of(data)
    moves = [_Rotate(t * step) if t else None for t in range(n_tasks)]
    names = [f"rotation {t * step:g}" for t in range(n_tasks)]
    return Scenario(_whole(source, moves, names), source.n_classes, "domain", "rotated")


def data_incremental(scenario: Any, batch: int, *, seed: int = 0) -> Scenario:
    """Cut every task of a scenario, or plain data, into experiences of ``batch`` samples, shuffled.

    Tests stay whole.

    >>> x, y = np.zeros((10, 3)), np.arange(10) % 2
    >>> len(data_incremental(permuted((x, y, x, y), 2), batch=4))
    6
    """
    _check.count("batch", batch)
    if not isinstance(scenario, Scenario):
        scenario = from_datasets([scenario])
    out: list[Task] = []
    for task in scenario:
        index = stream(seed, "data-incremental", task.number).permutation(task.train_index)
        for at in range(0, len(index), batch):
            out.append(
                Task(
                    len(out),
                    task.source,
                    index[at : at + batch],
                    task.test_index,
                    task.classes,
                    f"{task.name} [{at // batch}]",
                    task.transform,
                    task.relabel,
                )
            )
    return Scenario(out, scenario.n_classes, scenario.kind, f"{scenario.name}, in data")


def blurry(scenario: Scenario, fraction: float, *, seed: int = 0) -> Scenario:
    """Let a fraction of every task's training samples change places with those of other tasks.

    The tasks must differ by their samples only (a class split), not by a transform. Sizes are kept.

    >>> x, y = np.zeros((40, 3)), np.arange(40) % 4
    >>> s = blurry(class_incremental((x, y, x, y), 2), 0.5)
    >>> sorted(len(t.train_index) for t in s)
    [20, 20]
    """
    _check.within("fraction", fraction, 0.0, 1.0)
    scenario = Scenario.of(scenario)
    if any(t.transform is not None or t.relabel is not None for t in scenario):
        raise ValueError("blurry needs tasks without transforms: class_incremental(...)")
    if scenario.kind == "task":
        raise ValueError("blurry tasks share classes, which a task-incremental mask forbids")
    rng = stream(seed, "blurry")
    kept, moved = [], []
    for task in scenario:
        order = rng.permutation(task.train_index)
        cut = round(fraction * len(order))
        moved.append(order[:cut])
        kept.append(order[cut:])
    pool = rng.permutation(np.concatenate(moved))
    out, at = [], 0
    for task, stay, gone in zip(scenario, kept, moved, strict=True):
        index = np.sort(np.concatenate([stay, pool[at : at + len(gone)]]))
        at += len(gone)
        classes = tuple(sorted(set(task.classes) | set(task.source.y_train[index].tolist())))
        out.append(Task(task.number, task.source, index, task.test_index, classes, task.name))
    return Scenario(out, scenario.n_classes, scenario.kind, "blurry")


def from_datasets(
    parts: Sequence[Any], *, kind: str = "domain", classes: Sequence[Sequence[int]] | None = None
) -> Scenario:
    """Make one task of each (x_train, y_train, x_test, y_test), Dataset or pair of torch datasets.

    >>> x, y = np.zeros((4, 3)), np.array([0, 1, 0, 1])
    >>> from_datasets([(x, y, x, y), (x + 1, y, x + 1, y)])
    Scenario(datasets: 2 tasks, 2 classes, kind='domain')
    """
    sources = [Dataset.of(part) for part in parts]
    if not sources:
        raise ValueError("parts must hold at least one dataset")
    n = max(s.n_classes for s in sources)
    if kind == "task" and classes is None:
        classes = [sorted(set(s.y_train.tolist())) for s in sources]
    tasks = [
        Task(
            number,
            source,
            np.arange(len(source.y_train)),
            np.arange(len(source.y_test)),
            tuple(range(n)) if classes is None else tuple(classes[number]),
            f"dataset {number}",
        )
        for number, source in enumerate(sources)
    ]
    return Scenario(tasks, n, kind, "datasets")
