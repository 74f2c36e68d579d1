"""Task vectors as lazy linear combinations: sums and scalings of (fine-tuned - base), read on access."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .cells import CELL, Sums, magnitude_sum
from .depth import DepthMap
from .errors import KeyMismatchError, ShapeMismatchError
from .schedule import NUMBER, Outside, check_finite, scales
from .sources import FLOATS, Source, TensorSource, check_dtype, open_source

Mask = Mapping[str, Tensor]


@dataclass(frozen=True)
class _Term:
    """One `coefficient * factors * masks * (finetuned - base)`."""

    base: TensorSource
    finetuned: TensorSource
    coefficient: float = 1.0
    factors: tuple[Mapping[str, float], ...] = ()
    masks: tuple[Mask, ...] = ()

    def value(self, name: str) -> Tensor:
        info = self.base.tensors[name]
        base = self.base.read(self.base.aliases.get(name, name), 0, info.numel)
        tuned = self.finetuned.read(self.finetuned.aliases.get(name, name), 0, info.numel)
        wide = torch.float64 in (base.dtype, tuned.dtype)
        dtype = torch.float64 if wide else torch.float32
        delta = torch.sub(tuned.to(dtype), base.to(dtype)).view(info.shape)
        factor = self.coefficient * math.prod(table[name] for table in self.factors)
        if factor != 1:
            delta.mul_(factor)
        for mask in self.masks:
            delta.mul_(mask[name])
        return delta


class TaskVector(Mapping[str, Tensor]):
    """The update of a fine-tuned model, `tau = theta - theta_0`, by parameter name.

    It holds the two sources, not their difference: a tensor is read and subtracted when it is asked for,
    in float32 (float64 if an input is). Integer tensors have no entry.

    Args:
        base: pre-trained weights: state dict, module or path.
        finetuned: fine-tuned weights.

    Raises:
        KeyMismatchError: different tensors.
        ShapeMismatchError: different shapes.
        UnsupportedDtypeError: quantised tensors, float8.

    Example:
        >>> base, tuned = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([2.0, 0.0])}
        >>> tau = TaskVector(base, tuned)
        >>> (-2 * tau)["w"], tau.norm(1)
        (tensor([-2.,  4.]), 3.0)
    """

    def __init__(self, base: Source, finetuned: Source) -> None:
        first, second = open_source(base, "base"), open_source(finetuned, "fine-tuned model")
        for source in (first, second):
            for name, info in source.tensors.items():
                check_dtype(name, info, source.label, dtype_given=False)
        for name in set(first.tensors) ^ set(second.tensors):
            raise KeyMismatchError(f"{name!r} is in one of {first.label} and {second.label} only")
        for name, info in first.tensors.items():
            if second.tensors[name].shape != info.shape:
                raise ShapeMismatchError(
                    f"{name!r} has shape {info.shape} in {first.label} and "
                    f"{second.tensors[name].shape} in {second.label}"
                )
        self._terms: tuple[_Term, ...] = (_Term(first, second),)

    @classmethod
    def _of(cls, terms: Iterable[_Term]) -> TaskVector:
        vector = cls.__new__(cls)
        vector._terms = tuple(terms)
        return vector

    def __getitem__(self, name: str) -> Tensor:
        """Compute the update of one tensor."""
        values = [term.value(name) for term in self._terms]
        for value in values[1:]:
            values[0] = values[0] + value
        return values[0]

    def _ties(self) -> dict[str, str]:
        """Names of tensors that base and models tie to another one: one parameter, counted once."""
        sources = [source for term in self._terms for source in (term.base, term.finetuned)]
        first, *others = [source.aliases for source in sources]
        return {a: b for a, b in first.items() if all(more.get(a) == b for more in others)}

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of floating-point tensors; of tied ones over the first."""
        tensors, ties = self._terms[0].base.tensors, self._ties()
        return (n for n, info in tensors.items() if info.dtype in FLOATS and n not in ties)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        """Show the sources."""
        parts = [f"{t.coefficient:g} * ({t.finetuned.label} - {t.base.label})" for t in self._terms]
        return f"TaskVector({' + '.join(parts)})"

    def _each(self, change: Callable[[_Term], _Term]) -> TaskVector:
        return self._of(change(term) for term in self._terms)

    def __add__(self, other: TaskVector | int) -> TaskVector:
        """Add another task vector with the same parameters."""
        if isinstance(other, int) and other == 0:  # the start value of sum([...])
            return self
        if not isinstance(other, TaskVector):
            return NotImplemented
        if set(self) != set(other):
            raise KeyMismatchError("the task vectors have different parameters")
        return self._of(self._terms + other._terms)

    __radd__ = __add__

    def __sub__(self, other: TaskVector) -> TaskVector:
        """Subtract another task vector."""
        return self + (-other)

    def __neg__(self) -> TaskVector:
        """Return the negated update (task negation)."""
        return self * -1

    def __mul__(self, factor: float) -> TaskVector:
        """Multiply by a number."""
        if isinstance(factor, bool) or not isinstance(factor, NUMBER):
            return NotImplemented
        check_finite(factor=factor)
        factor = float(factor)
        return self._each(lambda term: replace(term, coefficient=term.coefficient * factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> TaskVector:
        """Divide by a number."""
        if isinstance(divisor, bool) or not isinstance(divisor, NUMBER):
            return NotImplemented
        return self * (1 / float(divisor))

    __array_ufunc__ = None  # a NumPy number on the left leaves the product to __rmul__

    # Mappings compare by content, which would read both checkpoints
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def dot(self, other: Mapping[str, Tensor]) -> float:
        """Return the inner product with another task vector, summed in float64."""
        total = [float((self[n].double() * other[n].double()).sum()) for n in self]
        return math.fsum(total)

    def norm(self, p: int = 2) -> float:
        """Return the p-norm over all parameters, p 1 or 2, summed in float64 in a fixed order."""
        if p not in {1, 2}:
            raise ValueError(f"p must be 1 or 2, got {p!r}")
        sums = Sums(1)
        for name in self:
            for part in torch.split(self[name].view(-1), CELL):
                sums.add(name, magnitude_sum(part, p, torch.empty_like(part)))
        return float(sums.totals()[0] ** (1 / p))

    def lines(
        self,
        alpha: float,
        beta: float,
        *,
        depth: DepthMap | str = "auto",
        schedule: str = "linear",
        outside: Outside = "alpha",
        towers: str = "separate",
    ) -> TaskVector:
        """Return the update with LiNeS factors (Eq. 1); see `scales`."""
        names = list(self)
        factors = scales(
            names,
            alpha,
            beta,
            depth=depth,
            schedule=schedule,
            outside=outside,
            towers=towers,
            sizes={name: self._terms[0].base.tensors[name].numel for name in names},
        )
        return self._each(lambda term: replace(term, factors=(*term.factors, factors)))

    def mask(self, mask: Mask) -> TaskVector:
        """Return the update with masked entries only.

        Args:
            mask: a boolean (or 0/1) tensor for every parameter.
        """
        missing = [name for name in self if name not in mask]
        if missing:
            raise KeyMismatchError(f"the mask lacks {missing[:10]}")
        return self._each(lambda term: replace(term, masks=(*term.masks, mask)))

    def apply(self, base: Source, scale: float = 1.0) -> dict[str, Tensor]:
        """Return base + scale * tau, rounded once to the dtype of the base; variances stay at least 0.

        Args:
            base: the weights to add the update to; tensors without an update are copied.
            scale: number that multiplies the update.
        """
        check_finite(scale=scale)
        reader = open_source(base, "base")
        missing = [name for name in self if name not in reader.tensors]
        if missing:
            raise KeyMismatchError(f"{reader.label} lacks {missing[:10]}")
        names, result = set(self), {}
        for name, info in reader.tensors.items():
            weights = reader.read(name, 0, info.numel).view(info.shape).clone()
            if name in names and scale != 0:
                delta = self[name]
                total = weights.to(torch.promote_types(delta.dtype, weights.dtype)) + scale * delta
                weights = torch.where(delta == 0, weights, total.to(info.dtype))
                if name.endswith("running_var"):
                    weights.clamp_min_(0)
            result[name] = weights
        for alias, name in self._ties().items():
            if alias in result and name in result:
                result[alias] = result[name]
        return result

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the update to a safetensors file (through a temporary name)."""
        from safetensors.torch import save_file

        target = Path(path)
        partial = target.with_name(f".{target.name}.tmp")
        save_file({name: self[name].contiguous() for name in self}, partial)
        os.replace(partial, target)
