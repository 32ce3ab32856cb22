"""Train, validation and test samples, and the channel statistics of the training images.

Validation and test samples that are drawn from the training split are drawn class by class, and depend only on the labels of
that split, not on the seed of a run or the number of samples it uses. So a student trained on a subset never trains on a
validation sample of its teacher, and never validates on a training sample of its teacher.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kd_accel.config.schema import DataConfig
from kd_accel.data.hashing import hashed_order
from kd_accel.data.inventory import Inventory, mean_and_std
from kd_accel.data.sources import ImageSet
from kd_accel.errors import UserError

Split = Literal["train", "val", "test", "unlabeled"]
HeldOutSplit = Literal["val", "test"]

_VALIDATION, _LIMIT, _STATISTICS, _TEST = 1, 2, 3, 4
"""Hash keys of the random selections, so that they are independent of each other."""
_STATISTICS_SAMPLES, _SAMPLES_ON_DEMAND = 50_000, 4096
_CHANNELS = ("red", "green", "blue")


@dataclass(frozen=True)
class SplitSamples:
    """Sample indices of each split, int64, ascending.

    Attributes:
        train: Positions in the source's training split.
        val: Positions in the source's validation split; without one in its training split, disjoint from `train`.
        test: Positions in the source's test split; with `data.test_fraction` in its training split, disjoint from the others.
        unlabeled: Positions in the source of unlabeled training images (`data.unlabeled`); None = not set.
    """

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    unlabeled: np.ndarray | None = None

    def without(self, unreadable: Mapping[Split, Collection[int]]) -> SplitSamples:
        """Return the samples that are readable. unreadable: indices to leave out of each split.

        Raises:
            UserError: If no training sample is left.
        """
        left = {name: samples[~np.isin(samples, list(unreadable[name]))] for name, samples in self.by_name().items()}
        for name, samples in self.by_name().items():
            if name in ("train", "unlabeled") and len(samples) and not len(left[name]):
                what = "training" if name == "train" else name
                raise UserError(
                    f"data.on_error: skip leaves out all {what} samples, because none can be decoded; use another source"
                )
        return SplitSamples(**left)

    def by_name(self) -> dict[Split, np.ndarray]:
        """Return the indices by the name of the split."""
        splits: dict[Split, np.ndarray] = {"train": self.train, "val": self.val, "test": self.test}
        return splits if self.unlabeled is None else {**splits, "unlabeled": self.unlabeled}


def split_samples(
    labels: np.ndarray, config: DataConfig, *, num_val: int | None = None, num_test: int | None = None
) -> SplitSamples:
    """Select the test and validation samples, then reduce train and val to `limit_train` by the same ratio.

    Args:
        labels: Class indices of the source's training split, int64 [N].
        config: The data settings; `val_fraction`, `test_fraction`, `limit_train` and `limit_test` are used.
        num_val: Number of samples in the source's validation split; None = `val_fraction` of the training samples.
        num_test: Number of samples in the source's test split; None = `test_fraction` of the training split.
    """
    train = np.arange(len(labels))
    if num_test is None:
        test = _drawn_by_class(labels, train, config.test_fraction or 0.0, key=_TEST)
        train = np.setdiff1d(train, test, assume_unique=True)
    else:
        test = np.arange(num_test)
    if num_val is None:
        val = _drawn_by_class(labels, train, config.val_fraction, key=_VALIDATION)
        train = np.setdiff1d(train, val, assume_unique=True)
    else:
        val = np.arange(num_val)
    if config.limit_train is not None and config.limit_train < len(train):
        ratio = config.limit_train / len(train)
        val = _random_subset(val, max(1, round(ratio * len(val))) if len(val) else 0)
        train = _random_subset(train, config.limit_train)
    return SplitSamples(train, val, _random_subset(test, config.limit_test))


def _drawn_by_class(labels: np.ndarray, samples: np.ndarray, fraction: float, *, key: int) -> np.ndarray:
    """Draw a fraction of the samples, of each class in proportion: the shares are rounded by largest remainders.

    At least one sample of each class is not drawn. Samples without a label (-1) are drawn only if no sample has one: then the
    agreement with the teacher is measured.

    Args:
        labels: Class indices of the source split, int64 [N].
        samples: Indices to draw from, int64 [n].
        fraction: Share of the samples to draw.
        key: Hash key of the selection.

    Returns:
        The drawn indices, ascending: round(n * fraction), or fewer where too many classes have a single sample.
    """
    is_labeled = labels[samples] >= 0
    order = hashed_order((key,), samples[is_labeled] if is_labeled.any() else samples)
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    quotas = counts * fraction
    drawn = np.minimum(np.floor(quotas).astype(np.int64), counts - 1)
    rest = round(len(order) * fraction) - int(drawn.sum())
    # Equal remainders, usual with classes of equal size, are ordered by chance: by each class's first sample in hashed order.
    by_remainder = np.lexsort((first, -np.round(quotas - np.floor(quotas), 9)))
    while rest > 0 and len(open_classes := by_remainder[drawn[by_remainder] < counts[by_remainder] - 1]):
        drawn[open_classes[:rest]] += 1
        rest -= len(open_classes[:rest])
    by_class = order[np.argsort(labels[order], kind="stable")]
    rank_in_class = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(by_class[rank_in_class < np.repeat(drawn, counts)])


def channel_statistics(
    images: ImageSet, indices: np.ndarray, inventory: Inventory | None = None
) -> tuple[list[float], list[float]]:
    """Compute mean and standard deviation of each channel over the pixels of the samples, or of a random 50,000 of them.

    Images that are decoded on demand are sampled: a random 4,096 of them. The drawn samples depend only on the indices.

    Args:
        images: The source split.
        indices: Positions in the source split, int64 [n].
        inventory: Inventory that keeps the counts of images that are decoded on demand; None = of this process alone.

    Returns:
        (means, standard deviations), three values each, in 0..1.

    Raises:
        UserError: If a channel has the same value in all pixels.
    """
    limit = _STATISTICS_SAMPLES if images.is_in_memory else _SAMPLES_ON_DEMAND
    drawn = np.sort(hashed_order((_STATISTICS,), indices)[:limit])
    counts = (inventory or Inventory()).color_counts(images, drawn)
    mean, std = mean_and_std(counts)
    constant = [name for name, of_levels in zip(_CHANNELS, counts, strict=True) if np.count_nonzero(of_levels) == 1]
    if constant:
        shown = [f"{name} {value:.3g}" for name, value in zip(_CHANNELS, mean, strict=True) if name in constant]
        raise UserError(
            f"data.std: 0 for {' and '.join(constant)}, because all {len(drawn)} training images have one value there "
            f"({', '.join(shown)}), and normalization divides by it; check the images, or set data.mean and data.std (1.0 for "
            "a constant channel)"
        )
    return mean.tolist(), std.tolist()


def _random_subset(indices: np.ndarray, limit: int | None) -> np.ndarray:
    """Return at most `limit` of the indices, ascending."""
    if limit is None or limit >= len(indices):
        return indices
    return np.sort(hashed_order((_LIMIT,), indices)[:limit])
