"""What joins the blocks of a densified model: dynamic subclasses, and the run of the current forward."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpoint_block

from denseformer.core.run import DepthRun, check_stream, outside_backward
from denseformer.models.recompute import recomputing

ATTRIBUTES = ("_dense", "_dense_positions", "_dense_opens")
"""What a block of a densified model holds: the link, its places in the stack, whether X_0 enters there."""

_RUNS: ContextVar[dict[int, DepthRun] | None] = ContextVar("denseformer_runs", default=None)


class Link:
    """Shared by the blocks of one stack: where the averages are, and which forward pass is under way.

    The run is found through a context variable, so that threads and nested calls keep apart; while
    torch.compile traces, which cannot follow one, it is an attribute of the link.
    """

    def __init__(self, owner: nn.Module, blocks: list[nn.Module], checkpoint: bool | str) -> None:
        self.owner = owner
        self.blocks = blocks
        self.given = self.checkpoint = checkpoint
        self.own_checkpoint = checkpoint is True  # else the library checkpoints its blocks itself
        self.opener: nn.Module | None = None  # takes X_0, where the first block's arguments do not
        self.name: str | None = None
        self.undo: list[tuple[nn.Module, str, Any]] = []
        self.on_output: Callable[[Tensor, Tensor], None] | None = None
        self.traced: DepthRun | None = None

    @property
    def depth(self) -> int:
        """Number of block calls in a forward pass."""
        return len(self.blocks)

    @property
    def swapped(self) -> list[nn.Module]:
        """The modules whose class is a subclass of itself, each once."""
        openers = [] if self.opener is None else [self.opener]
        return list(dict.fromkeys([*self.blocks, *openers]))

    def attach(self) -> None:
        """Let every block's call be followed by its average."""
        for block in self.swapped:
            at = tuple(n for n, b in enumerate(self.blocks, 1) if b is block)
            values = (self, at, block is self.opener)
            block.__dict__.update(zip(ATTRIBUTES, values, strict=True))
            block.__class__ = dense_class(DenseBlock, type(block))

    def detach(self) -> None:
        """Give the blocks their own classes back."""
        for block in self.swapped:
            block.__class__ = original(block)
            for attribute in ATTRIBUTES:
                del block.__dict__[attribute]

    def recompute_blocks(self, enable: bool = True) -> None:
        """Recompute block by block, with the averages outside, or as :func:`densify` was told."""
        self.checkpoint = True if enable else ("mix" if self.given == "mix" else False)
        self.own_checkpoint = enable

    def current(self) -> DepthRun | None:
        """Return the run under way, if any."""
        if torch.compiler.is_compiling():
            return self.traced
        return (_RUNS.get() or {}).get(id(self), self.traced)

    def set(self, run: DepthRun | None) -> None:
        """Make ``run`` the one under way; ``None`` ends it."""
        if torch.compiler.is_compiling():
            self.traced = run
            return
        self.traced = None
        runs = {k: v for k, v in (_RUNS.get() or {}).items() if k != id(self)}
        if run is not None:
            runs[id(self)] = run
        _RUNS.set(runs)

    def open(self, x0: Tensor) -> DepthRun:
        """Start a pass from the embedding, abandoning one that was left unfinished."""
        save = bool(self.checkpoint) and torch.is_grad_enabled()
        run = cast(Any, self.owner).dwa.begin(x0, recompute=save)
        assert isinstance(run, DepthRun)
        self.set(run)
        return run


def enter(link: Link, positions: tuple[int, ...], args: Any, kwargs: Any) -> DepthRun:
    """Return the run in which a block at one of ``positions`` is the next; start it at block 1."""
    run = link.current()
    if run is not None and run.depth + 1 in positions:
        return run
    if 1 in positions and link.opener is None:
        values = [*args, *kwargs.values()]
        x0 = next((v for v in values if isinstance(v, Tensor)), None)
        return link.open(check_stream(x0, "the first block's input"))
    at = ", ".join(map(str, positions))
    done = "no forward pass is under way" if run is None else f"{run.depth} blocks were done"
    raise RuntimeError(
        f"block {at} of {link.depth} was called out of order ({done}). The blocks of a densified model run "
        "in sequence, all of them: a block that is left out must be declared with skip_block(model, x), and a "
        "library's checkpointing may cover one block, not several"
    )


class DenseBlock:
    """Mixed into a block's class: its call is followed by the average, hooks and checkpoints included."""

    _dense: Link
    _dense_positions: tuple[int, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, then the average after it."""
        call: Callable[..., Any] = super().__call__  # type: ignore[misc]
        if not self.__dict__.get("_dense_positions"):
            return call(*args, **kwargs)
        link = self._dense
        if torch.compiler.is_compiling():
            run = enter(link, self._dense_positions, args, kwargs)
            y = run(_run_block(link, call, args, kwargs))
            link.set(None if run.depth == link.depth else run)
            return y
        outside_backward()
        run = enter(link, self._dense_positions, args, kwargs)
        try:
            with recomputing(run):
                out = _run_block(link, call, args, kwargs)
            y = run(out)
        except BaseException:
            link.set(None)
            raise
        if link.on_output is not None:
            tuples = isinstance(out, tuple)
            link.on_output(out[0] if tuples else out, y[0] if tuples else y)
        if run.depth == link.depth:
            link.set(None)
        return y

    def prepare(self, residual: Tensor) -> Any:
        """Open the run where an x-transformers residual takes the stream of the first layer."""
        if self.__dict__.get("_dense_opens"):
            self._dense.open(residual)
        return super().prepare(residual)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy the block by itself as a plain one; a copied model attaches its blocks again."""
        return _rebuild, (original(self),), _state(self)


def _run_block(link: Link, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    if link.own_checkpoint and torch.is_grad_enabled():
        return checkpoint_block(call, *args, use_reentrant=False, **kwargs)
    return call(*args, **kwargs)


class DenseModel:
    """Mixed into a model's class: a pass that ends early leaves nothing behind, or says what is missing."""

    _dense: Link

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with a fresh set of runs."""
        call: Callable[..., Any] = super().__call__  # type: ignore[misc]
        if torch.compiler.is_compiling() or "_dense" not in self.__dict__:
            return call(*args, **kwargs)
        before = _RUNS.set({})
        try:
            out = call(*args, **kwargs)
            run = self._dense.current()
            if run is not None:
                run.close()
            return out
        finally:
            _RUNS.reset(before)

    @property
    def set_grad_checkpointing(self) -> Callable[..., Any]:
        """Timm's switch, where it is one of the model's own: the link's; else what the model had."""
        if isinstance(self.__dict__.get("grad_checkpointing"), bool):
            return self._dense.recompute_blocks
        had: Callable[..., Any] = super().set_grad_checkpointing  # type: ignore[misc]
        return had

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy the model with its link."""
        state = _state(self), self.__dict__.get("_dense")
        return _rebuild, (original(self), DenseModel), state

    def __setstate__(self, state: tuple[Any, Link | None]) -> None:
        """Attach the blocks of the copy to its own averages."""
        own, link = state
        super().__setstate__(own)  # type: ignore[misc]
        if link is not None:
            self.__dict__["_dense"] = link
            link.attach()


_CLASSES: dict[tuple[Any, Any], Any] = {}


def dense_class(mixin: Any, cls: Any) -> Any:
    """Return the subclass of ``cls`` with a mixin, under the same name; always the same one."""
    cls = vars(cls).get("_dense_original", cls)
    if (mixin, cls) in _CLASSES:
        return _CLASSES[mixin, cls]
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "_dense_original": cls}
    return _CLASSES.setdefault((mixin, cls), type(cls.__name__, (mixin, cls), names))


def original(module: object) -> type:
    """Return the class that a module had before."""
    return cast(type, type(module)._dense_original)  # type: ignore[attr-defined]


def _state(module: object) -> Any:
    """Return what a module's own ``__getstate__`` gives, or its attributes; without ours."""
    own = getattr(module, "__getstate__", None)  # every object has one from Python 3.11 on
    state = vars(module) if own is None else own()
    if not isinstance(state, dict):
        return state
    return {key: value for key, value in state.items() if key not in ATTRIBUTES}


def _rebuild(cls: type, mixin: type | None = None) -> Any:
    made: Any = cls if mixin is None else dense_class(mixin, cls)
    return made.__new__(made)
