"""Balanced sampling: as many training samples of each class in an epoch, as a pure function of (seed, epoch).

In: sample indices and their classes. Out: the indices of an epoch, of the same number, some of them repeated or left out.
"""

from __future__ import annotations

import numpy as np

from kd_accel.data.hashing import hash_words, hashed_order
from kd_accel.errors import UserError

_DRAW, _REMAINDER = 23, 24
"""Hash keys of the samples and of the classes that have one more, different from those of all other uses of `hash_words`."""


def balanced_samples(samples: np.ndarray, labels: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """Draw the samples of an epoch: N labeled samples, N // C or one more of each of C classes, and all without a label.

    A small class has each of its samples several times, as often as any other of its samples up to one. A large class has a
    part of its samples, another one in each epoch. Classes without samples are not counted.

    Args:
        samples: Indices of the training samples, int64 [M].
        labels: Their classes, int64 [M]; -1 = no label.
        seed: Seed of the draw.
        epoch: Number of the epoch.

    Returns:
        Indices, int64 [M], by class.
    """
    is_labeled = labels >= 0
    own, own_labels = samples[is_labeled], labels[is_labeled]
    classes, counts = np.unique(own_labels, return_counts=True)
    words = hash_words((_DRAW, seed, epoch), own, 1)[:, 0]
    by_class = own[np.lexsort((own, words, own_labels))]
    quotas = np.full(len(classes), len(own) // len(classes))
    # Positions of the classes, in another order in each epoch: the first of them get the remainder of the division.
    quotas[hashed_order((_REMAINDER, seed, epoch), np.arange(len(classes)))[: len(own) % len(classes)]] += 1
    rank_in_class = np.arange(len(own)) - np.repeat(np.cumsum(quotas) - quotas, quotas)
    starts, sizes = np.repeat(np.cumsum(counts) - counts, quotas), np.repeat(counts, quotas)
    return np.concatenate([by_class[starts + rank_in_class % sizes], samples[~is_labeled]])


def check_balance(labels: np.ndarray, *, setting: str = "data.sampling", value: object = "balanced") -> None:
    """Raise UserError if balanced sampling has no effect.

    Args:
        labels: Classes of the training samples, int64 [M], -1 = no label.
        setting: Setting or argument that asks for it, for the message.
        value: Its value.
    """
    counts = np.unique(labels[labels >= 0], return_counts=True)[1]
    if len(counts) == 0 or counts.min() == counts.max():
        found = f"each class has {counts[0]}" if len(counts) else "none has a label"
        raise UserError(f"{setting}: {value} has no effect (of the training samples {found}); leave it out")
