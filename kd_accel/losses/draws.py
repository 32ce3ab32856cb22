"""Random integers on the device as a pure function: the same in each process, after a resume, and in a replayed CUDA graph.

Shapes: B batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 53
"""Bits of each random integer."""


def hash_words(seed: int, draw: Tensor, index: Tensor, words: int) -> Tensor:
    """Hash (seed, draw, index) to random integers, a pure function without a generator's state.

    The four numbers are combined with odd factors, whose multiples fill 64 bits evenly, and mixed by the finalizer of
    splitmix64, with the arithmetic of int64 that wraps around. It takes few operators, which matters more than on a host, where
    `data/hashing.py` mixes after each number.

    Args:
        seed: Seed of the run.
        draw: Number of the draw, int64 scalar.
        index: Positions of the samples, int64 [B].
        words: Number of integers for each sample.

    Returns:
        Integers from 0 to 2^53 - 1, int64 [B, words].

    References:
        Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    start = index * _signed(0x9FB21C651E98DF25) + draw * _signed(0xD6E8FEB86659FD93) + _signed(seed * 0xA24BAED4963EE407)
    steps = torch.arange(words, device=index.device) * _signed(0x9E3779B97F4A7C15)
    state = start[:, None] + steps
    state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
    return _shifted(state ^ _shifted(state, 31), 64 - WORD_BITS)


def _signed(word: int) -> int:
    """Return the int64 with the lower 64 bits of an integer."""
    word %= 1 << 64
    return word - (1 << 64) if word >> 63 else word


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Shift int64 words to the right and fill with zeros; `>>` alone fills with the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
