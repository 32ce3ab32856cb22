"""Duplicates: images with the same content within a split and across splits, found by the digests of their contents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kd_accel.data.dataset import ImageSet
from kd_accel.data.splits import Split

_SHOWN = 3
_HELD_OUT: Mapping[Split, str] = {"test": "test", "val": "validation"}


@dataclass(frozen=True)
class Part:
    """Samples of a split.

    Attributes:
        images: The source split.
        samples: Indices, int64 [n].
    """

    images: ImageSet
    samples: np.ndarray

    def contents(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (digests of the contents, indices) of the samples that can be read."""
        digests = self.images.content_digests(self.samples)
        return digests[digests != 0], self.samples[digests != 0]


def repeated(part: Part) -> int:
    """Count the samples whose image occurred before in the same split."""
    digests, _ = part.contents()
    return len(digests) - len(np.unique(digests))


def shared_samples(part: Part, train: Part) -> list[tuple[int, int]]:
    """Return (sample, a training sample with the same image) for each sample whose image is also in the training split."""
    digests, samples = part.contents()
    train_digests, train_samples = train.contents()
    unique, first = np.unique(train_digests, return_index=True)
    is_shared = np.isin(digests, unique)
    partners = train_samples[first[np.searchsorted(unique, digests[is_shared])]]
    return list(zip(samples[is_shared].tolist(), partners.tolist(), strict=True))


def conflicts(part: Part) -> list[tuple[int, int]]:
    """Return two samples of each image that has several labels in a split; unlabeled samples (-1) are ignored."""
    digests, samples = part.contents()
    labels = part.images.labels[samples]
    digests, samples, labels = (each[labels >= 0] for each in (digests, samples, labels))
    order = np.lexsort((samples, labels, digests))
    digests, samples, labels = (each[order] for each in (digests, samples, labels))
    differs = (digests[1:] == digests[:-1]) & (labels[1:] != labels[:-1])
    _, first = np.unique(digests[1:][differs], return_index=True)
    pairs = zip(samples[:-1][differs][first].tolist(), samples[1:][differs][first].tolist(), strict=True)
    return sorted((min(pair), max(pair)) for pair in pairs)


def _unlabeled_leaks(parts: Mapping[Split, Part]) -> list[str]:
    """Describe the held-out samples whose image is also that of an unlabeled sample."""
    lines = []
    for split, name in _HELD_OUT.items():
        pairs = shared_samples(parts[split], parts["unlabeled"]) if "unlabeled" in parts else []
        if pairs:
            lines.append(
                f"data.unlabeled: {len(pairs)} of {len(parts[split].samples)} {name} samples are also unlabeled samples (the "
                f"same image: {_examples(pairs, name, 'unlabeled')}), so that the accuracy on them is too high"
            )
    return lines


def _examples(pairs: Sequence[tuple[int, int]], name: str, other: str) -> str:
    return ", ".join(f"{name} sample {sample} = {other} sample {same}" for sample, same in pairs[:_SHOWN])


def leak_notices(parts: Mapping[Split, Part]) -> list[str]:
    """Describe the samples of held-out splits that are also training samples, and the training images with two labels.

    Args:
        parts: The splits train, val, test and perhaps unlabeled.
    """
    lines, train = [], parts["train"]
    found = {split: shared_samples(parts[split], train) for split in _HELD_OUT}
    if any(found.values()):
        counts = [
            f"{len(pairs)} of {len(parts[split].samples)} {_HELD_OUT[split]} samples" for split, pairs in found.items() if pairs
        ]
        split, pairs = next((split, pairs) for split, pairs in found.items() if pairs)
        lines.append(
            f"data: {' and '.join(counts)} are also training samples (the same image: "
            f"{_examples(pairs, _HELD_OUT[split], 'training')}), so that the accuracy on them is too high"
        )
    lines += _unlabeled_leaks(parts)
    if pairs := conflicts(train):
        names, labels = train.images.label_names, train.images.labels
        examples = "; ".join(
            f"samples {first} and {second}: {names[labels[first]]!a} and {names[labels[second]]!a}"
            for first, second in pairs[:_SHOWN]
        )
        count = f"{len(pairs)} image{'s' if len(pairs) > 1 else ''} of the training samples"
        lines.append(f"data: {count} occur{'' if len(pairs) > 1 else 's'} under two labels ({examples})")
    return lines
