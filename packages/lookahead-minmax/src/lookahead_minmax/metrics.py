"""How good samples are: Fréchet distance, inception score, modes of a mixture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    r"""Return the squared Fréchet distance of two Gaussians.

    :math:`|\mu_1 - \mu_2|^2 + tr(S_1 + S_2 - 2 (S_1^{1/2} S_2 S_1^{1/2})^{1/2})`, by symmetric
    eigendecompositions in float64, so that singular covariances give finite, real results.

    Args:
        mean1: (d,).
        cov1: (d, d), symmetric, positive semi-definite.
        mean2: (d,).
        cov2: (d, d).

    Raises:
        ValueError: shapes do not fit or an entry is not finite.

    Example:
        >>> import torch
        >>> frechet_distance(torch.zeros(2), torch.eye(2), torch.ones(2), 4 * torch.eye(2))
        4.0
    """
    mean1, cov1, mean2, cov2 = (tensor.double() for tensor in (mean1, cov1, mean2, cov2))
    size = len(mean1)
    if mean2.shape != (size,) or cov1.shape != (size, size) or cov2.shape != (size, size):
        raise ValueError(
            f"shapes do not fit: means {tuple(mean1.shape)} and {tuple(mean2.shape)}, covariances "
            f"{tuple(cov1.shape)} and {tuple(cov2.shape)}"
        )
    for tensor in (mean1, cov1, mean2, cov2):
        if not torch.isfinite(tensor).all():
            raise ValueError("means and covariances must be finite")
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = root @ cov2 @ root
    overlap = torch.linalg.eigvalsh((cross + cross.T) / 2).clamp_min(0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * overlap
    return max(0.0, float(distance))


def feature_distance(features1: Tensor, features2: Tensor) -> float:
    """Return the Fréchet distance of two samples of features, (n, d) and (m, d), n and m at least 2."""
    for features in (features1, features2):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"features must be (n >= 2, d), got {tuple(features.shape)}")
    first, second = features1.double(), features2.double()
    cov1, cov2 = (torch.cov(x.T).reshape(x.shape[1], x.shape[1]) for x in (first, second))
    return frechet_distance(first.mean(0), cov1, second.mean(0), cov2)


def inception_score(probabilities: Tensor, splits: int = 10) -> tuple[float, float]:
    """Return mean and standard deviation over splits of exp(mean KL(p(y|x) | p(y))).

    Args:
        probabilities: a classifier's class probabilities of the samples, (n, classes).
        splits: parts of which each gets a score; 10 in the literature.

    Raises:
        ValueError: there are fewer samples than splits, or rows are not probabilities.
    """
    if probabilities.ndim != 2 or len(probabilities) < splits or splits < 1:
        raise ValueError(f"need (n >= {splits}, classes), got {tuple(probabilities.shape)}")
    p = probabilities.double()
    if (p < 0).any() or not torch.allclose(p.sum(1), torch.ones(len(p)).double(), atol=1e-4):
        raise ValueError("rows of probabilities must be non-negative and sum to 1")
    scores = []
    for part in p.tensor_split(splits):
        marginal = part.mean(0, keepdim=True)
        divergence = (torch.xlogy(part, part) - torch.xlogy(part, marginal)).sum(1)
        scores.append(divergence.mean().exp())
    stacked = torch.stack(scores)
    return float(stacked.mean()), float(stacked.std(correction=0))


@dataclass(frozen=True)
class Coverage:
    """Modes of a mixture that samples reach.

    Attributes:
        modes: number of centres with a sample within the radius.
        quality: share of samples within the radius of some centre.
    """

    modes: int
    quality: float


def mode_coverage(samples: Tensor, centres: Tensor, radius: float) -> Coverage:
    """Count the centres that samples reach.

    Args:
        samples: (n, d).
        centres: (m, d).
        radius: usually three standard deviations of a mode.

    Raises:
        ValueError: dimensions differ, there is no sample, or the radius is not positive.
    """
    if samples.ndim != 2 or centres.ndim != 2 or samples.shape[1] != centres.shape[1]:
        raise ValueError(
            f"samples {tuple(samples.shape)} and centres {tuple(centres.shape)} must share d"
        )
    if len(samples) == 0:
        raise ValueError("there is no sample")
    if radius <= 0:
        raise ValueError(f"radius must be positive, got {radius}")
    near = torch.cdist(samples, centres) <= radius
    return Coverage(int(near.any(0).sum()), float(near.any(1).double().mean()))
