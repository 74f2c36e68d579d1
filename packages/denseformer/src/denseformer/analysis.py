"""Looking at a trained DenseFormer: its weights, their history, pruning, and what each block sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denseformer.core.dwa import DWA

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def weight_matrix(dwa: DWA) -> Tensor:
    """Return α, one line per average in order of depth, one column per X_j: (rows, depth + 1), detached.

    >>> weight_matrix(DWA(4, period=2)).tolist()
    [[0.0, 0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]]
    """
    return dwa.matrix()[[i - 1 for i in dwa.rows]]


def off_diagonal(dwa: DWA) -> Tensor:
    """Return the learned weights other than α_ii, row after row.

    >>> off_diagonal(DWA(2)).tolist()
    [0.0, 0.0, 0.0]
    """
    keep = torch.ones(dwa.spec.nnz, dtype=torch.bool)
    keep[dwa._ends()] = False
    return dwa.weight.detach()[keep.to(dwa.weight.device)]


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'denseformer[plot]'") from error
    return plt


def plot_weights(dwa: DWA, ax: Axes | None = None) -> Figure:
    """Draw α as the paper does (Figure 4): lines are averages, columns X_j.

    The colours are logarithmic in both directions, linear below 0.05, with limits ±1. Weights outside
    S_i stay white. Returns the figure (that of ``ax`` where given); ``.savefig`` writes it.

    Raises:
        ImportError: matplotlib is missing (extra ``plot``).
        ValueError: there is no average, hence nothing to draw.
    """
    plt = _pyplot()
    if not dwa.rows:
        raise ValueError(f"nothing to draw: {dwa.spec}")
    from matplotlib.colors import SymLogNorm

    ax = ax if ax is not None else plt.subplots(layout="constrained")[1]
    values = weight_matrix(dwa).cpu()
    inside = torch.zeros_like(values, dtype=torch.bool)
    for n, i in enumerate(dwa.rows):
        inside[n, list(dwa.sources(i))] = True
    shown = torch.where(inside, values, torch.nan).numpy()
    norm = SymLogNorm(0.05, vmin=-1, vmax=1)
    image = ax.imshow(shown, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
    step = max(1, len(dwa.rows) // 12)
    ax.set_yticks(range(0, len(dwa.rows), step), [str(i) for i in dwa.rows[::step]])
    ax.set_xticks(range(0, values.shape[1], max(1, values.shape[1] // 12)))
    ax.set(
        xlabel="j (0: embedding)",
        ylabel="depth i",
        title=f"α, {dwa.spec.dilation}x{dwa.spec.period}",
    )
    ax.figure.colorbar(image, ax=ax, ticks=[-1, -0.1, 0, 0.1, 1])
    return cast("Figure", ax.figure)


def prune(dwa: DWA, fraction: float, *, keep_diagonal: bool = False) -> int:
    """Set the given fraction of all α, the smallest in magnitude, to 0, in place (paper, section 5).

    Args:
        dwa: the averages.
        fraction: 0 to 1, of all weights; rounded down.
        keep_diagonal: never touch α_ii.

    Returns:
        The number of weights set to 0.

    Raises:
        ValueError: the fraction is outside 0 to 1.

    >>> dwa = DWA(3)
    >>> prune(dwa, 0.5), int((dwa.weight != 0).sum())
    (4, 3)
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be from 0 to 1, got {fraction}")
    size = dwa.weight.detach().abs()
    if keep_diagonal:
        size[dwa._ends()] = torch.inf
    count = int(fraction * dwa.spec.nnz + 1e-9)  # 0.29 of 100 is 29, not 28.999...
    if keep_diagonal:
        count = min(count, dwa.spec.nnz - len(dwa.rows))
    with torch.no_grad():
        dwa.weight[size.argsort()[:count]] = 0.0
    return count


def pruning_curve(
    dwa: DWA,
    evaluate: Callable[[], float],
    fractions: Sequence[float] = (0, 0.05, 0.1, 0.15, 0.25, 0.5),
) -> dict[float, float]:
    """Return ``evaluate()`` after pruning each fraction; the weights are as before afterwards.

    Raises:
        ValueError: a fraction is outside 0 to 1.
    """
    saved = dwa.weight.detach().clone()
    curve = {}
    try:
        for fraction in fractions:
            prune(dwa, fraction)
            curve[float(fraction)] = evaluate()
            with torch.no_grad():
                dwa.weight.copy_(saved)
    finally:
        with torch.no_grad():
            dwa.weight.copy_(saved)
    return curve


def cosine_to_embedding(
    model: nn.Module, *batch: Any, blocks: Sequence[nn.Module] | None = None, **kwargs: Any
) -> Tensor:
    """Return the mean cosine between what each block sees, Y_{i-1}, and the embedding X_0 (Figure 6).

    Args:
        model: a densified model, one with a :class:`DenseStack`, or a plain one; called once without
            gradients as ``model(*batch, **kwargs)``.
        blocks: its blocks in order; absent: those that :func:`densify` took, or would take.

    Returns:
        (depth,) on the CPU; the first is 1.
    """
    at = 0
    if blocks is None:
        blocks, at = _own_blocks(model)
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [v for v in [*args, *kwargs.values()] if isinstance(v, Tensor)]
        seen.append(tensors[at].detach().float())

    handles = [m.register_forward_pre_hook(look, with_kwargs=True) for m in dict.fromkeys(blocks)]
    try:
        with torch.no_grad():
            model(*batch, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([F.cosine_similarity(y, seen[0], dim=-1).mean().cpu() for y in seen])


def _own_blocks(model: nn.Module) -> tuple[Sequence[nn.Module], int]:
    """Return the modules that take the stream into each block, and which of their tensors it is."""
    from denseformer.adapters import x_transformers
    from denseformer.models.surgery import find_blocks

    link = model.__dict__.get("_dense")
    if (link is None or link.opener is not None) and (special := x_transformers.find(model)):
        return special.entries, 1  # called as residual(output, stream)
    return (find_blocks(model)[1] if link is None else link.blocks), 0


def singular_values(model: nn.Module) -> dict[str, Tensor]:
    """Return the singular values of every matrix parameter, largest first, divided by the largest.

    >>> list(singular_values(nn.Linear(2, 3)))
    ['weight']
    """
    found = {}
    for name, p in model.named_parameters():
        if p.ndim == 2:
            values = torch.linalg.svdvals(p.detach().float())
            found[name] = values / values[0].clamp_min(1e-30)
    return found


class WeightHistory:
    """Snapshots of the weights during training (paper, Figure 10).

    Call :meth:`record` where you like in the loop; ``steps`` and ``weights`` hold the snapshots.

    >>> history = WeightHistory(DWA(2))
    >>> history.record(0)
    >>> history.stacked().shape
    torch.Size([1, 5])
    """

    def __init__(self, dwa: DWA) -> None:
        self.dwa = dwa
        self.steps: list[int] = []
        self.weights: list[Tensor] = []

    def record(self, step: int) -> None:
        """Keep a copy of the weights, on the CPU."""
        self.steps.append(step)
        self.weights.append(self.dwa.weight.detach().cpu().clone())

    def stacked(self) -> Tensor:
        """Return all snapshots, (snapshots, nnz)."""
        return torch.stack(self.weights)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw every weight against the step, the α_ii darker; returns the Axes."""
        plt = _pyplot()
        ax = ax if ax is not None else plt.subplots(layout="constrained")[1]
        ends = set(self.dwa._ends())
        for n, line in enumerate(self.stacked().t().tolist()):
            ax.plot(self.steps, line, color="C3" if n in ends else "C0", lw=0.8, alpha=0.6)
        ax.set(xlabel="step", ylabel="weight")
        return ax
