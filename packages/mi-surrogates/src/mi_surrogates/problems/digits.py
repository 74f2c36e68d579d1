"""Where to put K photodiodes on an 8 × 8 image to tell digits apart (scikit-learn's real digits)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mi_surrogates.design.space import DesignSpace
from mi_surrogates.errors import missing

Floats = NDArray[np.float64]
H_DIGIT = float(np.log(10))


class DigitSensors:
    """x = the label, y = K noisy readings of Gaussian apertures at θ = (row1, column1, …).

    Args:
        count: K.
        width: of the aperture, in pixels.
        noise: of a reading; a full white pixel reads 1.
        seed: of the split of the images; the optimiser sees only one half of them.

    Example:
        >>> x, y = DigitSensors(6)(np.full(12, 3.5), 10, 0)
        >>> x.shape, y.shape
        ((10, 1), (10, 6))
    """

    def __init__(
        self, count: int = 6, *, width: float = 0.7, noise: float = 0.05, seed: int = 0
    ) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise missing("scikit-learn", "digits") from error
        data: Any = load_digits()
        images, labels = data.images / 16.0, data.target
        order = np.random.default_rng(seed).permutation(len(labels))
        half = len(labels) // 2
        self.count, self.width, self.noise = count, width, noise
        self.images: Floats = images[order[:half]]
        self.labels: NDArray[np.int64] = labels[order[:half]]
        self.test_images: Floats = images[order[half:]]
        self.test_labels: NDArray[np.int64] = labels[order[half:]]

    def space(self, seed: int = 0) -> DesignSpace:
        """Return the box [0, 7]^{2K} with a random start."""
        start = np.random.default_rng(seed).uniform(0.5, 6.5, 2 * self.count)
        return DesignSpace(initial=start, lower=0.0, upper=7.0, sigma=0.7)

    def read(self, theta: Floats, images: Floats, rng: np.random.Generator) -> Floats:
        """Return the readings (n, K) of images (n, 8, 8)."""
        pixels = np.arange(8)
        rows, columns = theta[::2, None] - pixels, theta[1::2, None] - pixels
        weights = np.exp(-(rows[:, :, None] ** 2 + columns[:, None, :] ** 2) / (2 * self.width**2))
        weights /= weights.sum((1, 2), keepdims=True)
        clean = np.einsum("nij,kij->nk", images, weights)
        return np.asarray(clean + self.noise * rng.standard_normal(clean.shape))

    def __call__(self, theta: Floats, n: int, seed: int) -> tuple[Floats, Floats]:
        """Draw images with replacement and read them."""
        rng = np.random.default_rng(seed)
        chosen = rng.integers(len(self.labels), size=n)
        labels = self.labels[chosen, None].astype(np.float64)
        return labels, self.read(theta, self.images[chosen], rng)

    def accuracy(self, theta: Floats, neighbours: int = 9, seed: int = 1) -> float:
        """Return the accuracy of k nearest neighbours on the images that the optimiser never saw."""
        rng = np.random.default_rng(seed)
        train = self.read(theta, self.images, rng)
        test = self.read(theta, self.test_images, rng)
        distance = ((test[:, None] - train[None]) ** 2).sum(-1)
        near = self.labels[np.argpartition(distance, neighbours, 1)[:, :neighbours]]
        votes = (near[:, :, None] == np.arange(10)).sum(1)
        return float((votes.argmax(1) == self.test_labels).mean())
