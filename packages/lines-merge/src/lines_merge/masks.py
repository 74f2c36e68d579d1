"""TALL masks (Wang et al. 2024): which weights a task relies on, one bit for each, and their consensus."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cells import Cell
from .engine import Engine
from .merges import Merge, Trim, make_merge
from .schedule import NUMBER
from .sources import Source, label_models, open_source
from .ties import Ties, tall_mask

Bits = NDArray[np.uint8]

LAMBDA_GRID = (0.2, 0.3, 0.4, 0.5, 0.6)
"""The paper's candidates for the threshold of TALL masks, from which validation chooses."""


class PackedMasks:
    """Boolean masks of several tasks, one bit for each parameter and task.

    Attributes:
        tasks: keys of the tasks.
        lambdas: threshold of each task's mask.
    """

    def __init__(
        self,
        bits: Mapping[str, Bits],
        shapes: Mapping[str, Sequence[int]],
        tasks: Sequence[str],
        lambdas: Mapping[str, float] | None = None,
    ) -> None:
        self._bits = dict(bits)
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.tasks = list(tasks)
        self.lambdas = dict(lambdas or {})

    def __len__(self) -> int:
        """Return the number of tasks."""
        return len(self.tasks)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the tasks."""
        return iter(self.tasks)

    @property
    def nbytes(self) -> int:
        """Size of the packed bits."""
        return sum(bits.nbytes for bits in self._bits.values())

    def _rows(self, name: str) -> Bits:
        numel = int(np.prod(self._shapes[name], dtype=np.int64))
        return np.unpackbits(self._bits[name], axis=1, count=numel)

    def __getitem__(self, task: str | int) -> dict[str, Tensor]:
        """Return one task's mask: a boolean tensor for every parameter."""
        row = self.tasks.index(task) if isinstance(task, str) else range(len(self.tasks))[task]
        return {
            name: torch.from_numpy(self._rows(name)[row].astype(bool)).view(self._shapes[name])
            for name in self._bits
        }

    def counts(self) -> dict[str, Tensor]:
        """Return how many tasks rely on each parameter: 0 is catastrophic, 1 is selfish."""
        return {
            name: torch.from_numpy(self._rows(name).sum(axis=0, dtype=np.int16)).view(shape)
            for name, shape in self._shapes.items()
        }

    def consensus(self, k: int = 2) -> dict[str, Tensor]:
        """Return m = 1[c >= k], a boolean tensor for every parameter.

        Args:
            k: number of tasks that must rely on a parameter; 0 keeps all, more than the tasks none.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 0:
            raise ValueError(f"k must be an integer of at least 0, got {k!r}")
        return {name: count >= k for name, count in self.counts().items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the packed bits to a safetensors file (through a temporary name)."""
        import json

        from safetensors.numpy import save_file

        metadata = {
            "shapes": json.dumps(self._shapes),
            "tasks": json.dumps(self.tasks),
            "lambdas": json.dumps(self.lambdas),
        }
        target = Path(path)
        partial = target.with_name(f".{target.name}.tmp")
        save_file(self._bits, partial, metadata)
        os.replace(partial, target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PackedMasks:
        """Read what `save` wrote."""
        import json

        from safetensors import safe_open

        with safe_open(path, framework="numpy") as file:
            metadata = {key: json.loads(text) for key, text in file.metadata().items()}
            bits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return cls(bits, metadata["shapes"], metadata["tasks"], metadata["lambdas"])


def tall_masks(
    base: Source,
    models: Sequence[Source] | Mapping[str, Source],
    lambdas: float | Sequence[float] | Mapping[str, float] | None = None,
    *,
    method: str | Merge = "task_arithmetic",
    evaluate: Callable[[str, dict[str, Tensor]], float] | None = None,
    **method_arguments: Any,
) -> PackedMasks:
    r"""Return each task's mask :math:`m_t = 1[|\tau_t| > \lambda_t |\tau_{MTL} - \tau_t|]`.

    Args:
        base: pre-trained weights.
        models: fine-tuned weights, one for each task.
        lambdas: one threshold, a mapping from task to threshold, or candidates among which `evaluate`
            chooses for each task; None is `LAMBDA_GRID` with `evaluate`, else its middle, 0.4.
        method: merge that gives the unscaled :math:`\tau_{MTL}`.
        evaluate: called with a task's key and the weights :math:`\theta_0 + m_t \tau_{MTL}`, returns a validation
            accuracy; the first of equal candidates wins.
        **method_arguments: of the method.

    Raises:
        ValueError: candidates without `evaluate`; a threshold that is negative or not finite.
        KeyError: a mapping that lacks a task.

    Example:
        >>> base = {"w": torch.zeros(3)}
        >>> models = [{"w": torch.tensor([1.0, 0.0, 2.0])}, {"w": torch.tensor([1.0, 0.5, 0.0])}]
        >>> tall_masks(base, models, 0.4)["0"]["w"]
        tensor([ True, False,  True])
    """
    keys, sources = label_models(models)
    readers = {
        key: open_source(source, f"model {key}") for key, source in zip(keys, sources, strict=True)
    }
    engine = Engine(open_source(base, "base"), readers)
    merge = make_merge(method, **method_arguments)
    merge.prepare(engine)
    if isinstance(merge, Ties):
        merge.settle(engine)
    if lambdas is None:
        lambdas = LAMBDA_GRID if evaluate is not None else 0.4
    if isinstance(lambdas, NUMBER):
        chosen = dict.fromkeys(keys, check_lambda(lambdas))
    elif isinstance(lambdas, Mapping):
        chosen = {key: check_lambda(lambdas[key]) for key in keys}
    elif evaluate is None:
        raise ValueError(
            "several lambdas are candidates for evaluate= to choose from; without it pass one number "
            "or a mapping from task to number"
        )
    else:
        chosen = _choose(engine, merge, [check_lambda(value) for value in lambdas], evaluate)
    return _masks(engine, merge, chosen)


def check_lambda(value: float) -> float:
    """Return a threshold, or raise ValueError unless it is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, NUMBER) or not 0 <= value < math.inf:
        raise ValueError(f"lambdas must be finite numbers of at least 0, got {value!r}")
    return float(value)


def magnitude_masks(
    base: Source,
    models: Sequence[Source] | Mapping[str, Source],
    density: float = 0.2,
    *,
    scope: str = "global",
    compat: str | None = None,
) -> PackedMasks:
    r"""Return each task's mask of the largest entries of :math:`|\tau_t|` (magnitude masking).

    As with `tall_masks`, :math:`\theta_0 + m_t \tau_{MTL}` is what task t is evaluated with.

    Args:
        base: pre-trained weights.
        models: fine-tuned weights, one for each task.
        density: fraction of entries that is kept, in (0, 1]; everything is, where fewer have an update.
        scope: "global" ranks all parameters together, "tensor" each tensor on its own.
        compat: see `merge` with method "magnitude".

    Raises:
        ValueError: density outside (0, 1]; an unknown word.

    Example:
        >>> base = {"w": torch.zeros(4)}
        >>> models = [{"w": torch.tensor([0.5, -3.0, 2.0, 1.0])}]
        >>> magnitude_masks(base, models, 0.5)["0"]["w"]
        tensor([False,  True,  True, False])
    """
    keys, sources = label_models(models)
    readers = {
        key: open_source(source, f"model {key}") for key, source in zip(keys, sources, strict=True)
    }
    engine = Engine(open_source(base, "base"), readers)
    trim = Trim(density, scope, compat)
    trim.prepare(engine)

    def keep(cell: Cell) -> list[Tensor]:
        if not trim.cuts:
            return [torch.ones_like(row, dtype=torch.bool) for row in cell.deltas]
        table = trim.cuts[cell.name]
        return [
            cut.mask(cell.name, cell.start, row)
            for cut, row in zip(table, cell.deltas, strict=True)
        ]

    return _pack(engine, keep, {})


def _masks(engine: Engine, merge: Merge, lambdas: Mapping[str, float]) -> PackedMasks:
    def rely(cell: Cell) -> list[Tensor]:
        own = [row.clone() for row in cell.deltas]
        merged = merge(cell.base, cell.deltas, cell)
        return [
            tall_mask(delta, merged, lambdas[key], torch.empty_like(delta))
            for key, delta in zip(engine.keys, own, strict=True)
        ]

    return _pack(engine, rely, lambdas)


def _pack(
    engine: Engine, choose: Callable[[Cell], list[Tensor]], lambdas: Mapping[str, float]
) -> PackedMasks:
    """Pack the masks that `choose` gives for every cell, one for each task."""
    entries = engine.merged()
    rows = len(engine.keys)
    bits = {e.name: np.zeros((rows, (e.info.numel + 7) // 8), dtype=np.uint8) for e in entries}

    def fill(cell: Cell) -> None:
        first = cell.start // 8  # cells start at multiples of 8
        for index, mask in enumerate(choose(cell)):
            packed = np.packbits(mask.numpy())
            bits[cell.name][index, first : first + len(packed)] = packed

    engine.scan(fill)
    shapes = {entry.name: entry.info.shape for entry in entries}
    return PackedMasks(bits, shapes, engine.keys, lambdas)


def _choose(
    engine: Engine,
    merge: Merge,
    candidates: Sequence[float],
    evaluate: Callable[[str, dict[str, Tensor]], float],
) -> dict[str, float]:
    """Pick each task's threshold by the accuracy of its masked merge."""
    weights = {
        name: engine.base.read(name, 0, info.numel).view(info.shape)
        for name, info in engine.base.tensors.items()
    }
    merged = {
        entry.name: torch.empty(entry.info.numel, dtype=engine.compute_dtype(entry))
        for entry in engine.merged()
    }

    def collect(cell: Cell) -> None:
        part = merge(cell.base, cell.deltas, cell)
        merged[cell.name][cell.start : cell.start + cell.size] = part

    engine.scan(collect)
    best: dict[str, tuple[float, float]] = {}
    for candidate in candidates:
        masks = _masks(engine, merge, dict.fromkeys(engine.keys, candidate))
        for key in engine.keys:
            edited = dict(weights)
            for name, mask in masks[key].items():
                update = merged[name].view(mask.shape) * mask
                edited[name] = (weights[name].to(update.dtype) + update).to(weights[name].dtype)
            for alias, name in engine.aliases.items():
                edited[alias] = edited[name]
            score = evaluate(key, edited)
            if key not in best or score > best[key][0]:
                best[key] = (score, candidate)
    return {key: value for key, (_, value) in best.items()}
