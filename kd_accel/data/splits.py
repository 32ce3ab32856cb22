"""Train, validation and test samples, and the channel statistics of the training images.

Whether a sample is for training or validation depends only on its index and the size of the source's training split, not on the
seed of a run or the number of samples it uses. So a student trained on a subset never trains on a validation sample of its
teacher, and never validates on a training sample of its teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from kd_accel.config.schema import DataConfig
from kd_accel.data.hashing import hashed_order
from kd_accel.data.sources import ImageSet
from kd_accel.errors import UserError

Split = Literal["train", "val", "test"]
HeldOutSplit = Literal["val", "test"]

_VALIDATION, _LIMIT, _STATISTICS = 1, 2, 3
"""Hash keys of the three random selections, so that they are independent of each other."""
_CHUNK_SAMPLES = 2048
_STATISTICS_SAMPLES = 50_000


@dataclass(frozen=True)
class SplitSamples:
    """Sample indices of each split, int64, ascending.

    Attributes:
        train: Positions in the source's training split.
        val: Positions in the source's training split, disjoint from `train`.
        test: Positions in the source's test split.
    """

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray

    def by_name(self) -> dict[Split, np.ndarray]:
        """Return the indices by the name of the split."""
        return {"train": self.train, "val": self.val, "test": self.test}


def split_samples(num_train: int, num_test: int, config: DataConfig) -> SplitSamples:
    """Select the validation samples, then reduce the rest to `limit_train` and the validation samples by the same ratio.

    Args:
        num_train: Number of samples in the source's training split.
        num_test: Number of samples in the source's test split.
        config: The data settings; `val_fraction`, `limit_train` and `limit_test` are used.

    Raises:
        UserError: If no training sample is left.
    """
    shuffled = hashed_order((_VALIDATION,), np.arange(num_train))
    num_val = round(num_train * config.val_fraction)
    val, train = shuffled[:num_val], shuffled[num_val:]
    if not len(train):
        raise UserError(
            f"data.val_fraction: {config.val_fraction} of {num_train} samples leaves none for training; lower it or add samples"
        )
    if config.limit_train is not None and config.limit_train < len(train):
        ratio = config.limit_train / len(train)
        val = _random_subset(val, max(1, round(ratio * len(val))) if len(val) else 0)
        train = _random_subset(train, config.limit_train)
    return SplitSamples(np.sort(train), np.sort(val), _random_subset(np.arange(num_test), config.limit_test))


def channel_statistics(images: ImageSet, indices: np.ndarray) -> tuple[list[float], list[float]]:
    """Compute mean and standard deviation of each channel over the pixels of the samples, or of a random 50,000 of them.

    Args:
        images: The source split.
        indices: Positions in the source split, int64 [n].

    Returns:
        (means, standard deviations), three values each, in 0..1. The standard deviation of a constant channel is set to 1.
    """
    drawn = np.sort(hashed_order((_STATISTICS,), indices)[:_STATISTICS_SAMPLES])
    counts = np.zeros((3, 256), dtype=np.int64)
    for start in range(0, len(drawn), _CHUNK_SAMPLES):
        pixels = images.pixels(drawn[start : start + _CHUNK_SAMPLES])
        counts += np.stack([np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)])
    levels = np.arange(256) / 255
    frequency = counts / counts.sum(1, keepdims=True)
    mean = frequency @ levels
    variance = frequency @ levels**2 - mean**2
    std = np.sqrt(np.maximum(variance, 0))
    return mean.tolist(), np.where(std > 1e-6, std, 1.0).tolist()


def _random_subset(indices: np.ndarray, limit: int | None) -> np.ndarray:
    """Return at most `limit` of the indices, ascending."""
    if limit is None or limit >= len(indices):
        return indices
    return np.sort(hashed_order((_LIMIT,), indices)[:limit])
