"""Random numbers as a pure function of what they are for: no generator, no state, no order of calls.

The mixing function is splitmix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_GAMMA = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF


def hash_words(keys: tuple[int, ...], counters: np.ndarray, words: int) -> np.ndarray:
    """uint64 [len(counters), words]: for each counter as many independent words as asked for.

    keys: whole numbers that name the purpose (a constant), a seed, a view. counters: int64 [n], sample numbers for instance.
    """
    state = np.uint64(_fold(keys))
    samples = _mix(state ^ _mix(counters.astype(np.uint64)))
    steps = np.arange(1, words + 1, dtype=np.uint64) * np.uint64(_GAMMA)
    return _mix(samples[:, None] + steps)


def hashed_order(keys: tuple[int, ...], samples: np.ndarray) -> np.ndarray:
    """The samples in an order that depends on the keys and on the samples alone."""
    words = hash_words(keys, samples, 1)[:, 0]
    return samples[np.lexsort((samples, words))]


@lru_cache(maxsize=1024)
def _fold(keys: tuple[int, ...]) -> int:
    """One word of several, each mixed in before the next, so that (1, 2) and (2, 1) or sums do not meet."""
    state = 0
    for key in keys:
        state = int(_mix(np.array([(state ^ (key & _MASK)) & _MASK], dtype=np.uint64))[0])
    return state


def _mix(words: np.ndarray) -> np.ndarray:
    """words: an array, which wraps around without a warning."""
    words = words + np.uint64(_GAMMA)
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words
