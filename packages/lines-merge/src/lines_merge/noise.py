"""A counter-based random number for every parameter: a function of (seed, model, tensor, index) alone."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E37_79B9_7F4A_7C15)
_MIX_1 = np.uint64(0xBF58_476D_1CE4_E5B9)
_MIX_2 = np.uint64(0x94D0_49BB_1331_11EB)


def uniform_words(seed: int, model: str, name: str, start: int, size: int) -> NDArray[np.uint32]:
    """Return uniform 32-bit words for the flat indices start..start+size of a tensor.

    Words 2j and 2j+1 are the halves of SplitMix64's j-th output, whose state is a hash of
    (seed, model, name): no word depends on how the tensor is cut.

    Args:
        seed: any integer.
        model: key of the model.
        name: name of the tensor.
        start: first flat index.
        size: number of words.
    """
    text = f"{seed}\x00{model}\x00{name}".encode()
    key = np.uint64(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
    first, last = start // 2, (start + size + 1) // 2
    with np.errstate(over="ignore"):
        z = np.arange(first + 1, last + 1, dtype=np.uint64)
        z *= _GOLDEN
        z += key
        for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
            z ^= z >> np.uint64(shift)
            z *= factor
        z ^= z >> np.uint64(31)
    words = z.astype("<u8", copy=False).view("<u4").astype(np.uint32, copy=False)
    return words[start - 2 * first :][:size]
