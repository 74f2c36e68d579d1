"""Counter-based random streams: every draw is a pure function of its position in the run.

A stream is named by ``(seed, purpose)``, a draw by its counters, e.g. ``(task, epoch, step)``. Nothing
is carried from one draw to the next, so a resumed run needs no generator state, both backends see the
same indices, and an evaluation in between changes nothing.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["draws_at", "stream"]


def _key(seed: int, purpose: str) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def stream(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """Return the Philox generator of one position: ``stream(seed, "order", task, epoch)``.

    Up to three non-negative counters; the fourth word of Philox's counter runs within the position.

    >>> int(stream(0, "order", 1, 2).integers(100)) == int(stream(0, "order", 1, 2).integers(100))
    True
    """
    if len(counters) > 3 or any(c < 0 for c in counters):
        raise ValueError(f"counters must be at most three integers >= 0, got {counters}")
    words = np.zeros(4, dtype=np.uint64)
    words[1 : 1 + len(counters)] = counters
    return np.random.Generator(np.random.Philox(key=_key(seed, purpose), counter=words))


def draws_at(seed: int, purpose: str, start: int, n: int) -> NDArray[np.float64]:
    """Return draws number ``start .. start + n - 1`` of a stream of uniforms in [0, 1).

    The i-th draw is the same however the stream is cut into calls.

    >>> a = draws_at(0, "reservoir", 0, 10)
    >>> bool((a[7:] == draws_at(0, "reservoir", 7, 3)).all())
    True
    """
    words = np.zeros(4, dtype=np.uint64)
    words[0] = start // 4
    skip = start % 4
    raw = np.random.Philox(key=_key(seed, purpose), counter=words).random_raw(skip + n)
    out: NDArray[np.float64] = (raw[skip:] >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return out
