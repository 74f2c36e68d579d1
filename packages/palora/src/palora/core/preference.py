"""Preferences: validation, and the object through which every adapted layer reads the current one.

A preference lives in a ``ContextVar`` (thread- and task-local) in eager mode. A compiled forward
cannot read a ``ContextVar``, so the same value is mirrored in a thread-local attribute, which
``torch.compile`` turns into a graph input: its value may change without recompiling.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Active",
    "PreferenceLike",
    "PreferenceState",
    "as_preference",
    "checkpoint_context",
    "disable",
    "get_preference",
    "preference",
    "set_preference",
    "state_of",
]

PreferenceLike = Tensor | Sequence[Any] | Mapping[str, Any]
TOLERANCE = 1e-4

_warned_extrapolation = False


def _from_mapping(lam: Mapping[str, Any], tasks: Sequence[str], partial: bool) -> Tensor:
    listed = ", ".join(tasks)
    if unknown := [name for name in lam if name not in tasks]:
        raise KeyError(f"unknown task {unknown[0]!r}; the tasks are: {listed}")
    missing = [name for name in tasks if name not in lam]
    if missing and not partial:
        raise KeyError(
            f"no weight for task {missing[0]!r}; the tasks are: {listed} (partial=True makes it 0)"
        )
    values = [torch.as_tensor(lam.get(name, 0.0)) for name in tasks]
    return torch.stack(torch.broadcast_tensors(*values), dim=-1)


def as_preference(
    lam: PreferenceLike,
    tasks: Sequence[str],
    *,
    normalize: bool = False,
    simplex: bool = True,
    partial: bool = False,
) -> Tensor:
    """Validate λ and return it as a float32 tensor of its own, ``(T,)`` or ``(B, T)``.

    Args:
        lam: a tensor, a sequence or a mapping from task names to weights.
        tasks: the T task names.
        normalize: divide by the sum instead of refusing a sum other than 1.
        simplex: False allows extrapolation: any finite weights (warned once).
        partial: a mapping may leave tasks out; their weight is 0.

    Raises:
        ValueError: wrong length, NaN, negative entries, or a sum that differs from 1 by more than
            1e-4.
        KeyError: an unknown or missing task name.

    Example:
        >>> as_preference({"depth": .25, "seg": .75}, ["seg", "depth"])
        tensor([0.7500, 0.2500])
    """
    if isinstance(lam, Mapping):
        value = _from_mapping(lam, tasks, partial)
    else:
        try:
            value = torch.as_tensor(lam)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"the preference must be numbers, one for each of {len(tasks)} tasks, "
                f"or a dict by task name; got {lam!r}"
            ) from error
    value = _own(value)
    count = len(tasks)
    if value.dim() not in (1, 2) or value.shape[-1] != count or not len(value):
        raise ValueError(
            f"the preference must have shape ({count},) or (batch, {count}) for {count} tasks, "
            f"got {tuple(value.shape)}"
        )
    plain = value.detach()
    finite, negative, empty, worst = _measure(plain)
    if not finite:
        raise ValueError(f"the preference holds NaN or infinite entries: {plain.tolist()}")
    if not simplex:
        if negative or worst > TOLERANCE:
            _warn_extrapolation()
        return value
    if negative:
        raise ValueError(
            f"the preference has negative entries: {plain.tolist()}; simplex=False extrapolates"
        )
    if normalize:
        if empty:
            raise ValueError("the preference sums to 0 and cannot be normalised")
        return _own(value / value.sum(-1, keepdim=True))
    if worst > TOLERANCE:
        raise ValueError(
            f"the preference must sum to 1, its sum is off by {worst:.4g}; "
            "pass normalize=True to divide by the sum"
        )
    return value


def _own(value: Tensor) -> Tensor:
    """A float32 copy that may outlive an inference block and be trained on."""
    if value.requires_grad:
        return value.to(torch.float32)
    with torch.inference_mode(False):
        return value.detach().float().clone()


def _measure(plain: Tensor) -> tuple[bool, bool, bool, float]:
    """Whether all entries are finite, some negative, some row sums to 0; largest |Σλ − 1|."""
    if plain.numel() <= 64:  # a dozen tensor operations would cost more than a small layer
        rows = plain.tolist()
        rows = rows if plain.dim() == 2 else [rows]
        sums = [sum(row) for row in rows]
        finite = all(math.isfinite(v) for row in rows for v in row)
        negative = any(v < 0 for row in rows for v in row)
        return finite, negative, 0.0 in sums, max((abs(s - 1) for s in sums), default=0.0)
    total = plain.sum(-1)
    finite = bool(torch.isfinite(plain).all())
    worst = float((total - 1).abs().max())
    return finite, bool((plain < 0).any()), bool((total == 0).any()), worst


def _warn_extrapolation() -> None:
    global _warned_extrapolation
    if not _warned_extrapolation:
        _warned_extrapolation = True
        warnings.warn("the preference lies off the simplex: extrapolating", stacklevel=4)


class Active:
    """One preference in force: its value and how rows of a layer's input relate to it.

    Attributes:
        value: float32 ``(T,)``, ``(B, T)``, ``(M, T)`` when ``rays`` is set, or None (disabled).
        rays: M when the batch holds M blocks, one per row of ``value``; else 0.
        batch: B, the samples of one such block.
        allow_expand: a layer may see a multiple of B rows.
        joint: batch statistics are taken over all rays together.
        shared_mask: dropout draws one mask for all rays.
        tiled: (storage address, elements, version) of inputs known to be M equal blocks.
    """

    def __init__(
        self,
        value: Tensor | None,
        *,
        rays: int = 0,
        batch: int = 1,
        allow_expand: bool = False,
        joint: bool = False,
        shared_mask: bool = False,
        tiled: tuple[tuple[int, int, Tensor], ...] = (),
    ) -> None:
        """Store the fields; see the class."""
        self.value = value
        self.rays = rays
        self.batch = batch
        self.allow_expand = allow_expand
        self.joint = joint
        self.shared_mask = shared_mask
        self.tiled = tiled
        self._cast: dict[tuple[Any, ...], Tensor] = {}
        self.mixed: dict[int, Any] = {}

    def on(self, like: Tensor) -> Tensor:
        """The value in the device and dtype of ``like``, moved once.

        A value that requires grad may change in place and is moved at every call.
        """
        value = self.value
        assert value is not None
        if torch.compiler.is_compiling() or value.requires_grad:
            return value.to(like.device, like.dtype)
        key = (like.device, like.dtype)
        if key not in self._cast:
            with torch.inference_mode(False):  # it may outlive an inference block and be trained on
                self._cast[key] = value.to(like.device, like.dtype)
        return self._cast[key]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the caches behind."""
        value = self.value
        if value is not None and value.grad_fn is not None:
            value = value.detach()
        return {**self.__dict__, "value": value, "_cast": {}, "mixed": {}, "tiled": ()}


_ACTIVE: ContextVar[Mapping[int, Active] | None] = ContextVar("palora_active", default=None)


class PreferenceState:
    """What all adapted layers of one model share: the tasks and the preference in force."""

    def __init__(self, tasks: Sequence[str], default: Tensor | None = None) -> None:
        """Create the state of one injected model."""
        self.tasks = list(tasks)
        self.sticky: Active | None = None
        self.default = None if default is None else Active(default)
        self.report: Any = None
        self.config: dict[str, Any] = {}
        self.frozen: list[str] = []
        self._local = threading.local()

    def current(self, training: bool) -> Active:
        """The preference in force: context first, then the sticky one, then the default."""
        active: Active | None
        if torch.compiler.is_compiling():
            active = getattr(self._local, "active", None)
        else:
            held = _ACTIVE.get()
            active = None if held is None else held.get(id(self))
        if active is None:
            active = self.sticky
        if active is None and not training:
            active = self.default
        if active is None:
            raise RuntimeError(
                "set a preference: run the model inside `with palora.preference(model, lam):`, or "
                "call palora.set_preference(model, lam); in evaluation mode inject(..., "
                "default='uniform') is used where neither was done"
            )
        return active

    @contextmanager
    def activate(self, active: Active) -> Iterator[None]:
        """Put ``active`` in force for this thread and task."""
        token = _ACTIVE.set({**(_ACTIVE.get() or {}), id(self): active})
        outer = getattr(self._local, "active", None)
        self._local.active = active
        try:
            yield
        finally:
            self._local.active = outer
            _ACTIVE.reset(token)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the thread-local part behind."""
        state = self.__dict__.copy()
        del state["_local"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore with a fresh thread-local part."""
        self.__dict__.update(state)
        self._local = threading.local()


def state_of(model: nn.Module) -> PreferenceState:
    """Return the state shared by the adapted layers of ``model`` (or of the model it wraps).

    Raises:
        RuntimeError: the model is not injected.
    """
    for module in model.modules():
        state = module.__dict__.get("_palora")
        if state is not None:
            found: PreferenceState = state
            return found
    raise RuntimeError("the model is not injected: call palora.inject(model, tasks) first")


@contextmanager
def preference(
    model: nn.Module,
    lam: PreferenceLike,
    *,
    normalize: bool = False,
    simplex: bool = True,
    partial: bool = False,
    allow_expand: bool = False,
) -> Iterator[Tensor]:
    """Run the model at preference λ inside a ``with`` block; nested blocks restore the outer one.

    The preference belongs to the current thread and asyncio task: two threads may run the same
    model at different preferences. (A *compiled* model reads the current thread's preference.)

    Args:
        model: an injected model, also when wrapped by DDP or ``torch.compile``.
        lam: ``(T,)`` one λ for all samples; ``(B, T)`` one λ per sample, the batch being the first
            dimension of every adapted layer's input; a list; or a dict from names to weights. It
            may require grad.
        normalize: divide by the sum instead of raising where it is not 1.
        simplex: False allows weights off the simplex (extrapolation, warned once).
        partial: tasks missing in a dict get weight 0.
        allow_expand: with ``(B, T)``, a layer may see a multiple of B rows (windows, beams); each
            row of λ is then used for that many consecutive rows.

    Yields:
        The validated float32 tensor.

    Raises:
        RuntimeError: the model is not injected.
        ValueError: λ has the wrong length, NaN or negative entries, or does not sum to 1.
        KeyError: an unknown or missing task name.

    Example:
        >>> import palora
        >>> net = palora.inject(nn.Linear(8, 8), ["speed", "quality"], rank=2)
        >>> with palora.preference(net, {"speed": .2, "quality": .8}):
        ...     net(torch.zeros(3, 8)).shape
        torch.Size([3, 8])
    """
    state = state_of(model)
    value = as_preference(lam, state.tasks, normalize=normalize, simplex=simplex, partial=partial)
    with state.activate(Active(value, allow_expand=allow_expand)):
        yield value


def set_preference(
    model: nn.Module,
    lam: PreferenceLike | None,
    *,
    normalize: bool = False,
    simplex: bool = True,
    partial: bool = False,
    allow_expand: bool = False,
) -> None:
    """Set the preference used outside every :func:`preference` block, in all threads.

    Args:
        model: an injected model.
        lam: as in :func:`preference`; None forgets the one set before.
        normalize: see :func:`preference`.
        simplex: see :func:`preference`.
        partial: see :func:`preference`.
        allow_expand: see :func:`preference`.
    """
    state = state_of(model)
    if lam is None:
        state.sticky = None
        return
    value = as_preference(lam, state.tasks, normalize=normalize, simplex=simplex, partial=partial)
    state.sticky = Active(value, allow_expand=allow_expand)


def get_preference(model: nn.Module) -> Tensor | None:
    """Return the preference in force here (context, else sticky, else default), or None."""
    state = state_of(model)
    try:
        return state.current(training=False).value
    except RuntimeError:
        return None


@contextmanager
def disable(model: nn.Module) -> Iterator[None]:
    """Run the base model alone, as if no adapter had been added."""
    with state_of(model).activate(Active(None)):
        yield


class _Restore:
    """A context that puts one preference back in force, as often as it is entered."""

    def __init__(self, state: PreferenceState, active: Active | None) -> None:
        self.state, self.active = state, active
        self.stack: list[Any] = []

    def __enter__(self) -> None:
        if self.active is not None:
            context = self.state.activate(self.active)
            context.__enter__()
            self.stack.append(context)

    def __exit__(self, *error: object) -> None:
        if self.stack:
            self.stack.pop().__exit__(*error)


def checkpoint_context(model: nn.Module) -> Any:
    """Return a ``context_fn`` for ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False)``.

    The preference in force at the forward pass is captured and restored at the recomputation,
    which happens in the backward pass: outside the ``with`` block, and on a GPU in another thread.

    Example:
        >>> import palora
        >>> from torch.utils.checkpoint import checkpoint
        >>> net = palora.inject(nn.Linear(4, 4), 2, rank=1)
        >>> with palora.preference(net, [.3, .7]):
        ...     y = checkpoint(net, torch.ones(1, 4, requires_grad=True), use_reentrant=False,
        ...                    context_fn=palora.checkpoint_context(net))
        >>> y.sum().backward()
    """
    state = state_of(model)

    def contexts() -> tuple[Any, Any]:
        try:
            active: Active | None = state.current(model.training)
        except RuntimeError:
            active = None
        return _Restore(state, None), _Restore(state, active)

    return contexts
