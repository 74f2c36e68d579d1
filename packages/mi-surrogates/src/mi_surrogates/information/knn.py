"""The k-nearest-neighbour estimator of Kraskov, Stögbauer and Grassberger (KSG-1, 2004)."""

from __future__ import annotations

import numpy as np
import torch
from scipy.spatial import cKDTree
from scipy.special import digamma
from torch import Tensor

from mi_surrogates.errors import DegenerateData

TILE = 2**22  # distances held at once by the brute-force path
BRUTE = 128  # samples up to which all distances are cheaper than a tree on a CPU


def _check(x: Tensor, y: Tensor, k: int) -> None:
    if x.shape[:-1] != y.shape[:-1] or x.dim() < 2:
        raise ValueError(
            f"x and y must be (..., N, dx) and (..., N, dy), got {tuple(x.shape)}, {tuple(y.shape)}"
        )
    if not 1 <= k < x.shape[-2]:
        raise ValueError(f"k must be at least 1 and below the {x.shape[-2]} samples, got {k}")
    for name, block in (("x", x), ("y", y)):
        if not bool(torch.isfinite(block).all()):
            raise ValueError(f"{name} has NaN or infinite values")
        for sample in block.reshape(-1, *block.shape[-2:]):
            # rows can only coincide where their first columns do, and those are quick to compare
            rows = torch.unique(sample[:, 0]).shape[0]
            if rows <= 0.99 * sample.shape[0] and sample.shape[1] > 1:
                rows = torch.unique(sample, dim=0).shape[0]
            if rows <= 0.99 * sample.shape[0]:
                raise DegenerateData(
                    f"{name} has {sample.shape[0] - rows} ties among {sample.shape[0]} samples, and KSG "
                    "needs continuous variables; use 'infonce', 'nwj' or 'ba', or add a small jitter"
                )


def _scaled(block: Tensor) -> Tensor:
    centred = block - block.mean(-2, keepdim=True)
    scale = centred.square().mean(-2, keepdim=True).sqrt()
    return centred / torch.where(scale > 0, scale, torch.ones_like(scale))


def _line_counts(values: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Return (N,) numbers of values (N,), the own one included, strictly nearer than the radius (N,)."""
    line = np.sort(values)
    last, positive = len(line) - 1, radius > 0
    low = np.searchsorted(line, values - radius, "right")
    high = np.searchsorted(line, values + radius, "left")

    def near(place: np.ndarray) -> np.ndarray:
        return np.asarray(np.abs(values - line[place.clip(0, last)]) < radius)

    # values ± radius are rounded: move the ends until the comparison of the definition agrees
    while (move := (low > 0) & near(low - 1)).any():
        low -= move
    while (move := positive & ~near(low)).any():
        low += move
    while (move := (high <= last) & near(high)).any():
        high += move
    while (move := positive & ~near(high - 1)).any():
        high -= move
    return np.where(positive, high - low, 1)


def _tree_counts(x: np.ndarray, y: np.ndarray, k: int, workers: int) -> np.ndarray:
    """Return (N, 2) numbers of other points strictly nearer than the k-th joint neighbour."""
    joint = np.concatenate([x, y], 1)
    radius = cKDTree(joint).query(joint, [k + 1], p=np.inf, workers=workers)[0][:, 0]
    inside = np.nextafter(radius, 0)
    counts = [
        _line_counts(block[:, 0], radius)
        if block.shape[1] == 1
        else cKDTree(block).query_ball_point(
            block, inside, np.inf, workers=workers, return_length=True
        )
        for block in (x, y)
    ]
    # a point with coinciding neighbours (radius 0) still counts itself
    return np.stack(counts, 1) - 1


def _brute_counts(x: Tensor, y: Tensor, k: int) -> Tensor:
    """Return (..., N, 2) counts as `_tree_counts`, in tiles of rows, on any device."""
    samples = x.shape[-2]
    rows = max(1, TILE // (samples * max(1, x[..., 0, 0].numel())))
    counts = []
    for start in range(0, samples, rows):
        tile = slice(start, start + rows)
        near_x, near_y = (
            (block[..., tile, None, :] - block[..., None, :, :]).abs().amax(-1)
            if block.shape[-1] < 4
            else torch.cdist(block[..., tile, :], block, p=float("inf"))
            for block in (x, y)
        )
        joint = torch.maximum(near_x, near_y)
        radius = torch.topk(joint, k + 1, largest=False).values[..., -1:]
        inside = torch.stack([(near < radius).sum(-1) for near in (near_x, near_y)], -1)
        counts.append(inside - 1)
    return torch.cat(counts, -2).clamp_min(0)


def ksg_terms(
    x: Tensor,
    y: Tensor,
    k: int = 3,
    *,
    standardize: bool = True,
    workers: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Return the summands ψ(k) + ψ(N) − ψ(n_x + 1) − ψ(n_y + 1) of `ksg`, (..., N) in float64.

    Example:
        >>> x = torch.randn(100, 1, dtype=torch.float64)
        >>> ksg_terms(x, x + 0.1 * x.flip(0)).shape
        torch.Size([100])
    """
    _check(x, y, k)
    if backend not in ("auto", "tree", "brute"):
        raise ValueError(f"backend must be 'auto', 'tree' or 'brute', got {backend!r}")
    x, y = x.detach().double(), y.detach().double()
    if standardize:
        x, y = _scaled(x), _scaled(y)
    samples = x.shape[-2]
    if backend == "auto":
        backend = "brute" if samples <= BRUTE or x.device.type != "cpu" else "tree"
    if backend == "brute":
        counts = _brute_counts(x, y, k).cpu().numpy()
    else:
        flat = zip(x.reshape(-1, *x.shape[-2:]), y.reshape(-1, *y.shape[-2:]), strict=True)
        trees = [_tree_counts(a.cpu().numpy(), b.cpu().numpy(), k, workers) for a, b in flat]
        counts = np.stack(trees).clip(0).reshape(*x.shape[:-1], 2)
    terms = digamma(k) + digamma(samples) - digamma(counts + 1).sum(-1)
    return torch.from_numpy(np.asarray(terms))


def ksg(
    x: Tensor,
    y: Tensor,
    k: int = 3,
    *,
    standardize: bool = True,
    workers: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Return the KSG-1 estimate ψ(k) + ψ(N) − ⟨ψ(n_x + 1) + ψ(n_y + 1)⟩.

    n_x is the number of other points whose x is strictly nearer than the k-th neighbour in the joint
    space, by the maximum norm. The estimate may be negative, and it cannot exceed about ψ(N).

    Args:
        x: (..., N, dx) samples; not differentiated.
        y: (..., N, dy) samples.
        k: neighbours, at least 1 and below N.
        standardize: whether each column is divided by its standard deviation first.
        workers: threads of the tree's queries, -1 for all.
        backend: "tree" (scipy), "brute" (torch, in tiles, on the tensors' device) or "auto".

    Returns:
        (...) nats, float64.

    Raises:
        ValueError: shapes do not match, k is out of range, or values are not finite.
        DegenerateData: at least 1 % of the samples are ties.

    Example:
        >>> x = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))
        >>> y = 0.9 * x + 0.19**0.5 * torch.randn(2000, 1, generator=torch.Generator().manual_seed(1))
        >>> abs(ksg(x, y).item() - 0.830366) < 0.1
        True
    """
    return ksg_terms(x, y, k, standardize=standardize, workers=workers, backend=backend).mean(-1)


def entropy_knn(x: Tensor, k: int = 3) -> Tensor:
    """Return the entropy estimate of Kozachenko and Leonenko, in nats.

    Args:
        x: (N, d) samples of a continuous variable.
        k: neighbours.

    Example:
        >>> x = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0)) * 4
        >>> abs(entropy_knn(x).item() - 1.3863) < 0.1
        True
    """
    points = x.detach().double().cpu().numpy()
    samples, dim = points.shape
    if not 1 <= k < samples:
        raise ValueError(f"k must be at least 1 and below the {samples} samples, got {k}")
    radius = cKDTree(points).query(points, [k + 1], p=np.inf)[0][:, 0]
    if (radius == 0).any():
        raise DegenerateData("x has ties; give its entropy as x_entropy")
    value = digamma(samples) - digamma(k) + dim * np.log(2 * radius).mean()
    return torch.tensor(float(value), dtype=torch.float64)
