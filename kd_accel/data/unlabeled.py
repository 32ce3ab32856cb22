"""Training images without labels from a source of their own (`data.unlabeled`), joined to the labeled training images.

Sample j of that source has the index `UNLABELED_OFFSET + j` wherever a batch, a view or the order of an epoch needs one. So the
views and the order of the labeled samples do not depend on the unlabeled ones, nor the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kd_accel.data.dataset import ImageSet
from kd_accel.data.decode import Crop
from kd_accel.data.hashing import hashed_order
from kd_accel.errors import UnreadableImage, UserError

UNLABELED_OFFSET = 2**40
"""Index of the first unlabeled sample; no source split has as many samples."""

_TURNS = 22
"""Hash key of the order in which unlabeled samples take turns, different from the keys of all other uses of `hash_words`."""


class JoinedImages:
    """Image set of the labeled and the unlabeled training images, by index.

    Args:
        labeled: The source's training split.
        unlabeled: The unlabeled images.
    """

    def __init__(self, labeled: ImageSet, unlabeled: ImageSet) -> None:
        self._labeled, self._unlabeled = labeled, unlabeled

    @property
    def label_names(self) -> tuple[str, ...]:
        """Class names of the labeled images, by label."""
        return self._labeled.label_names

    @property
    def is_in_memory(self) -> bool:
        """True if all decoded images are held in memory."""
        return self._labeled.is_in_memory and self._unlabeled.is_in_memory

    def pixels(self, samples: np.ndarray) -> np.ndarray:
        """Return the decoded images of samples; see `ImageSet.pixels`."""
        return self._routed(samples, lambda images, own, _: images.pixels(own))

    def crops(self, samples: np.ndarray, crops: Sequence[Crop]) -> np.ndarray:
        """Return parts of the images of samples; see `ImageSet.crops`."""
        return self._routed(samples, lambda images, own, at: images.crops(own, [crops[position] for position in at]))

    def labels_of(self, samples: np.ndarray) -> np.ndarray:
        """Return the labels of samples; see `ImageSet.labels_of`."""
        return self._routed(samples, lambda images, own, _: images.labels_of(own))

    def _routed(self, samples: np.ndarray, read: Callable[[ImageSet, np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """Call `read(image set, indices within it, positions in samples)` for each set, and join the results by position."""
        is_unlabeled = samples >= UNLABELED_OFFSET
        if not is_unlabeled.any():
            return read(self._labeled, samples, np.arange(len(samples)))
        try:
            unlabeled = read(self._unlabeled, samples[is_unlabeled] - UNLABELED_OFFSET, np.flatnonzero(is_unlabeled))
        except UnreadableImage as error:
            description, remedy, sample, _ = error.args
            raise UnreadableImage(description, remedy, UNLABELED_OFFSET + sample, "data.unlabeled") from None
        if is_unlabeled.all():
            return unlabeled
        # `empty_like` keeps the memory format.
        joined = np.empty_like(unlabeled, shape=(len(samples), *unlabeled.shape[1:]))
        joined[is_unlabeled] = unlabeled
        joined[~is_unlabeled] = read(self._labeled, samples[~is_unlabeled], np.flatnonzero(~is_unlabeled))
        return joined


@dataclass(frozen=True)
class Turns:
    """Unlabeled samples that take turns in the epochs.

    Attributes:
        samples: Indices from `UNLABELED_OFFSET` on, int64 [M], ascending.
        per_epoch: Number of samples in an epoch, at most M.
    """

    samples: np.ndarray
    per_epoch: int

    def at(self, epoch: int, *, seed: int) -> np.ndarray:
        """Return the samples of an epoch, int64 [per_epoch]; no sample has its next turn before all others had theirs.

        Args:
            epoch: Number of the epoch.
            seed: Seed of the order.
        """
        order = hashed_order((_TURNS, seed), self.samples)
        return order[(epoch * self.per_epoch + np.arange(self.per_epoch)) % len(order)]


def samples_per_epoch(ratio: float | None, labeled: np.ndarray, unlabeled: np.ndarray | None) -> int:
    """Return the number of unlabeled samples in an epoch.

    Args:
        ratio: Number of unlabeled samples for each labeled one, `data.unlabeled_ratio`; None = all of them.
        labeled: Labeled training samples, int64 [N].
        unlabeled: Unlabeled samples, int64 [M]; None without such a source.

    Raises:
        UserError: If the ratio asks for no sample, or for more than there are.
    """
    available = 0 if unlabeled is None else len(unlabeled)
    if ratio is None or unlabeled is None:
        return available
    if not 1 <= (count := round(ratio * len(labeled))) <= available:
        largest = np.floor(available / max(1, len(labeled)) * 1e4) / 1e4
        raise UserError(
            f"data.unlabeled_ratio: {ratio} for each of {len(labeled)} labeled training samples asks for {count} of "
            f"{available} unlabeled samples in an epoch; use a ratio of at most {largest:g}, or null for all of them"
        )
    return count


def sample_name(index: int) -> str:
    """Return the number of a training sample in its own source, for messages."""
    return str(index) if index < UNLABELED_OFFSET else f"{index - UNLABELED_OFFSET} of data.unlabeled"
