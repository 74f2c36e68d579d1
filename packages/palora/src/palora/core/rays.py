"""Several preferences in one pass: the batch is tiled, every block has its own λ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from palora.core.norms import make_ray_aware
from palora.core.preference import Active, PreferenceState, as_preference, state_of

__all__ = ["as_rays", "multi"]


def as_rays(rays: Any, state: PreferenceState) -> Tensor:
    """Validate M preferences as an ``(M, T)`` tensor."""
    value = as_preference(rays, state.tasks)
    return value.unsqueeze(0) if value.dim() == 1 else value


def batch_size(args: Any) -> int:
    """The first dimension of the first tensor among the model's inputs."""
    for leaf in tree_flatten(args)[0]:
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    raise ValueError("multi found no tensor with a batch dimension among the model's inputs")


class _Tiler:
    """Repeats what belongs to the batch M times, and remembers which tensors it made."""

    def __init__(self, rays: int, batch: int) -> None:
        self.rays, self.batch = rays, batch
        self.made: list[tuple[int, int, Tensor]] = []

    def __call__(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != self.batch:
            return leaf
        tiled = leaf.repeat(self.rays, *([1] * (leaf.dim() - 1)))
        if not torch.compiler.is_compiling() and not tiled.is_inference():
            self.made.append((tiled.untyped_storage().data_ptr(), tiled.numel(), tiled))
        return tiled


def multi(
    model: nn.Module,
    rays: Any,
    *args: Any,
    chunk: int | None = None,
    norm: Literal["per-ray", "joint"] = "per-ray",
    shared_mask: bool = False,
    batch_args: Sequence[int | str] | None = None,
    **kw: Any,
) -> Any:
    """Run the model at M preferences in one pass and return outputs with a leading M dimension.

    The result equals M separate passes to rounding, batch normalisation's running statistics
    included; dropout draws independent masks. Inputs whose first dimension is the batch size (the
    first dimension of the first tensor) are tiled, others are passed as they are.

    Args:
        model: an injected model.
        rays: ``(M, T)`` preferences.
        *args: the model's arguments.
        chunk: at most this many rays in one pass (less memory); ``chunk=1`` is the plain loop.
        norm: ``"per-ray"`` gives each ray its own batch statistics; ``"joint"`` takes them over
            all rays together.
        shared_mask: dropout modules draw one mask for all rays.
        batch_args: positions and keywords of exactly those arguments that carry the batch, where
            the first dimension does not tell.
        **kw: the model's keyword arguments.

    Returns:
        The model's outputs, every tensor ``(M·B, ...)`` reshaped to ``(M, B, ...)``.

    Raises:
        ValueError: an output without the batch dimension (a loss computed inside the model): use
            ``chunk=1``, which stacks such outputs.

    Example:
        >>> import palora
        >>> net = palora.inject(nn.Linear(4, 3), 2, rank=1)
        >>> multi(net, palora.simplex_grid(2, 4), torch.ones(7, 4)).shape
        torch.Size([5, 7, 3])
    """
    state = state_of(model)
    values = as_rays(rays, state)
    if norm not in ("per-ray", "joint"):
        raise ValueError(f"norm must be 'per-ray' or 'joint', got {norm!r}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    make_ray_aware(model, state)
    count = len(values)
    size = count if chunk is None else min(chunk, count)
    parts = []
    for part in values.split(size):
        if size == 1:
            with state.activate(Active(part[0])):
                out = model(*args, **kw)
            parts.append(tree_map(lambda t: t.unsqueeze(0) if _is_tensor(t) else t, out))
        else:
            parts.append(_pass(model, state, part, args, kw, norm, shared_mask, batch_args))
    if len(parts) == 1:
        return parts[0]
    flat, tree = zip(*(tree_flatten(part) for part in parts), strict=True)
    joined = [
        torch.cat(leaves) if _is_tensor(leaves[0]) else leaves[0]
        for leaves in zip(*flat, strict=True)
    ]
    return tree_unflatten(joined, tree[0])


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _pass(
    model: nn.Module,
    state: PreferenceState,
    values: Tensor,
    args: tuple[Any, ...],
    kw: dict[str, Any],
    norm: str,
    shared_mask: bool,
    batch_args: Sequence[int | str] | None,
) -> Any:
    rays = len(values)
    chosen: Any = (args, kw)
    if batch_args is not None:
        chosen = [args[a] if isinstance(a, int) else kw[a] for a in batch_args]
    batch = batch_size(chosen)
    tile = _Tiler(rays, batch)
    if batch_args is None:
        tiled_args, tiled_kw = tree_map(tile, (args, kw))
    else:
        tiled_args = tuple(tree_map(tile, a) if i in batch_args else a for i, a in enumerate(args))
        tiled_kw = {k: tree_map(tile, v) if k in batch_args else v for k, v in kw.items()}
    active = Active(
        values,
        rays=rays,
        batch=batch,
        joint=norm == "joint",
        shared_mask=shared_mask,
        tiled=tuple(tile.made),
    )
    with state.activate(active):
        out = model(*tiled_args, **tiled_kw)

    def untile(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if not leaf.dim() or leaf.shape[0] != rays * batch:
            raise ValueError(
                f"an output of shape {tuple(leaf.shape)} has no batch of {rays}·{batch} rows to "
                "split by ray (a loss computed inside the model?): use chunk=1"
            )
        return leaf.unflatten(0, (rays, batch))

    return tree_map(untile, out)
