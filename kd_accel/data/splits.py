"""Train, validation and test samples, and the channel statistics of the training images.

Whether a sample validates depends on its index and on the size of the source split alone: not on the seed of a run, nor on how
many samples it uses. So a student that learns from a subset never trains on a sample its teacher was validated on, or the
reverse.
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
    """Split off the validation samples, then apply `limit_train` to the rest and the same ratio to the validation samples.

    Args:
        num_train: Samples in the source's training split.
        num_test: Samples in the source's test split.
        config: `val_fraction`, `limit_train`, `limit_test`.

    Raises:
        UserError: No training sample is left.
    """
    shuffled = hashed_order((_VALIDATION,), np.arange(num_train))
    num_val = round(num_train * config.val_fraction)
    val, train = shuffled[:num_val], shuffled[num_val:]
    if not len(train):
        raise UserError(
            f"data.val_fraction: {config.val_fraction} of {num_train} samples leaves none to train on; lower it or add samples"
        )
    if config.limit_train is not None and config.limit_train < len(train):
        ratio = config.limit_train / len(train)
        val = _limited(val, max(1, round(ratio * len(val))) if len(val) else 0)
        train = _limited(train, config.limit_train)
    return SplitSamples(np.sort(train), np.sort(val), _limited(np.arange(num_test), config.limit_test))


def channel_statistics(images: ImageSet, indices: np.ndarray) -> tuple[list[float], list[float]]:
    """Compute mean and standard deviation of each channel over the pixels of the samples, or of 50,000 drawn from them.

    Args:
        images: The source split.
        indices: int64 [n], positions in it.

    Returns:
        (means, standard deviations), three each, in 0..1; a constant channel has the deviation 1.
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


def _limited(indices: np.ndarray, limit: int | None) -> np.ndarray:
    if limit is None or limit >= len(indices):
        return indices
    return np.sort(hashed_order((_LIMIT,), indices)[:limit])
