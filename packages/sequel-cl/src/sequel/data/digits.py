"""scikit-learn's handwritten digits."""

from __future__ import annotations

import numpy as np

from sequel.rng import stream
from sequel.scenarios import Dataset

__all__ = ["digits"]


def digits(*, seed: int = 0, images: bool = False, dtype: str = "float32") -> Dataset:
    """Return load_digits: 1,797 images of 8x8 in [0, 1]; 1,400 for training, 397 for testing.

    ``images=True`` shapes them (N, 1, 8, 8), else (N, 64). ``seed`` shuffles the split. Needs scikit-learn
    (``pip install sequel-cl[digits]``); no download.

    >>> digits().x_train.shape
    (1400, 64)
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits needs scikit-learn: pip install sequel-cl[digits]") from error
    x, y = load_digits(return_X_y=True)
    order = stream(seed, "digits-split").permutation(len(y))
    x = (np.asarray(x)[order] / 16).astype(dtype)
    y = np.asarray(y)[order].astype(np.int64)
    if images:
        x = x.reshape(-1, 1, 8, 8)
    return Dataset(x[:1400], y[:1400], x[1400:], y[1400:])
