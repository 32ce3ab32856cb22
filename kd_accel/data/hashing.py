"""Counter-based random numbers: pure functions of keys and counters, without a generator or its state.

The mixing function is splitmix64.

References:
    Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_GAMMA = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF


def hash_words(keys: tuple[int, ...], counters: np.ndarray, words: int) -> np.ndarray:
    """Hash each counter to independent 64-bit words.

    Args:
        keys: Integers that identify the use: a constant of the caller, a seed, a view.
        counters: Integers to hash, for example sample indices, int64 [n].
        words: Number of words per counter.

    Returns:
        Hash words, uint64 [n, words].
    """
    state = np.uint64(_fold(keys))
    hashes = _mix(state ^ _mix(counters.astype(np.uint64)))
    steps = np.arange(1, words + 1, dtype=np.uint64) * np.uint64(_GAMMA)
    return _mix(hashes[:, None] + steps)


def uniform(words: np.ndarray) -> np.ndarray:
    """Map hash words to [0, 1), by their upper 53 bits. words: uint64 of any shape. Returns float64 of the same shape."""
    return (words >> np.uint64(11)).astype(np.float64) / (1 << 53)


def hashed_order(keys: tuple[int, ...], indices: np.ndarray) -> np.ndarray:
    """Return the indices in a pseudorandom order that depends only on the keys and the indices."""
    words = hash_words(keys, indices, 1)[:, 0]
    return indices[np.lexsort((indices, words))]


@lru_cache(maxsize=1024)
def _fold(keys: tuple[int, ...]) -> int:
    """Combine keys into one word; each is mixed in before the next, so that (1, 2), (2, 1) and equal sums differ."""
    state = 0
    for key in keys:
        state = int(_mix(np.array([(state ^ (key & _MASK)) & _MASK], dtype=np.uint64))[0])
    return state


def _mix(words: np.ndarray) -> np.ndarray:
    """Apply the finalizer of splitmix64 to uint64 [n]; arrays wrap around without the overflow warning of scalars."""
    words = words + np.uint64(_GAMMA)
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words
