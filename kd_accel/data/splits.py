"""Which samples are trained on, which validate, which are held out; and the color statistics of the first.

Whether a sample validates depends on the number of samples and on the sample, not on the seed of a run or on how many samples it uses: a
student that learns from a part of the data never trains on a sample that its teacher was validated on, and the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kd_accel.config.schema import DataConfig
from kd_accel.data.hashing import hashed_order
from kd_accel.data.sources import ImageSet
from kd_accel.errors import UserError

_VALIDATION, _LIMIT, _STATISTICS = 1, 2, 3
_CHUNK_SAMPLES = 2048
_STATISTICS_SAMPLES = 50_000


@dataclass(frozen=True)
class SplitSamples:
    """int64 sample numbers, ascending: train and val in the training split, test in the held-out split."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def split_samples(num_train: int, num_test: int, config: DataConfig) -> SplitSamples:
    """Cut the validation samples off, then keep `limit_train` of the rest, and the same share of the validation samples."""
    shuffled = hashed_order((_VALIDATION,), np.arange(num_train))
    num_val = round(num_train * config.val_fraction)
    val, train = shuffled[:num_val], shuffled[num_val:]
    if not len(train):
        raise UserError(f"data.val_fraction: {config.val_fraction} of {num_train} samples leaves none to train on")
    if config.limit_train is not None and config.limit_train < len(train):
        share = config.limit_train / len(train)
        val = _limited(val, max(1, round(share * len(val))) if len(val) else 0)
        train = _limited(train, config.limit_train)
    return SplitSamples(np.sort(train), np.sort(val), _limited(np.arange(num_test), config.limit_test))


def channel_statistics(images: ImageSet, samples: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, in 0..1, over all pixels of the samples (of 50,000 of them at most)."""
    sample = np.sort(hashed_order((_STATISTICS,), samples)[:_STATISTICS_SAMPLES])
    counts = np.zeros((3, 256), dtype=np.int64)
    for start in range(0, len(sample), _CHUNK_SAMPLES):
        pixels = images.pixels(sample[start : start + _CHUNK_SAMPLES])
        counts += np.stack([np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)])
    levels = np.arange(256) / 255
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ levels
    variance = share @ levels**2 - mean**2
    std = np.sqrt(np.maximum(variance, 0))
    return mean.tolist(), np.where(std > 1e-6, std, 1.0).tolist()


def _limited(samples: np.ndarray, limit: int | None) -> np.ndarray:
    if limit is None or limit >= len(samples):
        return samples
    return np.sort(hashed_order((_LIMIT,), samples)[:limit])
