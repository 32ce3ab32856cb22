"""Image sets: the labels of a source split, and its pixels by sample index.

Input: decoded images. Output: RGB pixels, uint8, and digests of the samples. Images that are decoded on demand are in
`encoded.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import xxhash

from kd_accel.data.decode import Crop, Decoder
from kd_accel.io.hashing import arrays_digest

_SAMPLED_IMAGES = 512


class Digests(NamedTuple):
    """Digests of samples, uint64 [n]: XXH3-64 of the content, and of the content with the label as the seed.

    The content is the encoded image if the source holds encoded images, else the pixels. Both digests of a file that could not
    be read are 0.
    """

    contents: np.ndarray
    labeled: np.ndarray

    @classmethod
    def of(cls, contents: Iterable[Any], labels: np.ndarray) -> Digests:
        """Compute the digests of contents; None stands for a file that cannot be read."""
        digests = cls(np.zeros(len(labels), np.uint64), np.zeros(len(labels), np.uint64))
        for position, (content, label) in enumerate(zip(contents, labels.tolist(), strict=True)):
            if content is not None:
                digests.contents[position] = xxhash.xxh3_64_intdigest(content)
                digests.labeled[position] = xxhash.xxh3_64_intdigest(content, seed=label % 2**64)
        return digests

    @classmethod
    def join(cls, parts: Sequence[Digests]) -> Digests:
        """Concatenate digests of consecutive samples."""
        return cls(np.concatenate([part.contents for part in parts]), np.concatenate([part.labeled for part in parts]))


@dataclass(frozen=True)
class Decoded:
    """Decoded images with what is known about their files.

    Attributes:
        pixels: RGB images, uint8 [n, S, S, 3]; black where a file is unreadable.
        digests: Digests of the samples.
        unreadable: Reason by the index of each sample that cannot be read or decoded.
    """

    pixels: np.ndarray
    digests: Digests
    unreadable: dict[int, str] = field(default_factory=dict)


class ImageReader(Protocol):
    """Images and labels by the index of a sample."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Class names, by label."""
        ...

    @property
    def is_in_memory(self) -> bool:
        """True if the decoded images are held in memory."""
        ...

    def pixels(self, samples: np.ndarray) -> np.ndarray:
        """Return the decoded images of samples.

        Args:
            samples: Indices, int64 [n].

        Returns:
            RGB images in new memory, uint8 [n, S, S, 3]; either C-contiguous (channels-last) or contiguous as [n, 3, S, S]
            (channels-first).

        Raises:
            UserError: If an image cannot be decoded; the message contains its index.
        """
        ...

    def crops(self, samples: np.ndarray, crops: Sequence[Crop]) -> np.ndarray:
        """Return parts of the original images of samples, resized. Images held in memory are squares of the image size.

        Args:
            samples: Indices, int64 [n].
            crops: Part of each image.

        Returns:
            RGB images in new memory, uint8 [n, S, S, 3], C-contiguous.

        Raises:
            UserError: If an image cannot be decoded.
        """
        ...

    def labels_of(self, samples: np.ndarray) -> np.ndarray:
        """Return the labels of samples, int64 [n]; -1 = no label. samples: indices, int64 [n]."""
        ...


class ImageSet(ImageReader, Protocol):
    """Images and labels of a source split. A sample's index is its position in the split, before any subset.

    Attributes:
        labels: Class indices, int64 [N]; -1 = no label.
        notices: Lines for the user about the source, such as files that are left out.
        unreadable: Reason by the index of each sample that cannot be read or decoded, as far as it is known.
    """

    labels: np.ndarray
    notices: tuple[str, ...]
    unreadable: Mapping[int, str]

    @property
    def num_samples(self) -> int:
        """Number of samples, N."""
        ...

    @property
    def paths(self) -> Sequence[str] | None:
        """Path of each sample's image file; None if the source is not a folder or a list of files."""
        ...

    def digests(self, samples: np.ndarray) -> np.ndarray:
        """Compute a digest of each sample's label and image; of the encoded image if the source holds encoded images.

        Args:
            samples: Indices, int64 [n].

        Returns:
            Digests, uint64 [n].
        """
        ...

    def content_digests(self, samples: np.ndarray) -> np.ndarray:
        """Compute a digest of each sample's image without its label. samples: indices, int64 [n]. Returns uint64 [n]."""
        ...


def empty_images(samples: int, image_size: int) -> np.ndarray:
    """Allocate uint8 [samples, S, S, 3], channels-first in memory, which `MemoryImages` uses without a copy."""
    return np.empty((samples, 3, image_size, image_size), dtype=np.uint8).transpose(0, 2, 3, 1)


def channels_last(images: np.ndarray) -> np.ndarray:
    """Return uint8 [..., S, S, 3] as a C-contiguous array, the layout of Pillow and image files; copy only if necessary."""
    if images.flags.c_contiguous:
        return images
    copy = np.empty(images.shape, dtype=np.uint8)
    # Three strided copies of planes are several times as fast as one copy of pixels.
    for channel in range(3):
        copy[..., channel] = images[..., channel]
    return copy


class MemoryImages:
    """Image set decoded in memory, stored channels-first, which a CPU mirrors and normalizes faster.

    Args:
        images: Decoded images, uint8 [N, S, S, 3]; copied unless allocated by `empty_images`.
        labels: Class indices, int64 [N].
        label_names: Class names, by label.
        digests: Digests of the encoded images; None = those of the pixels.
        unreadable: Reason by the index of each sample that cannot be read or decoded.
        notices: Lines for the user about the source, such as files that are left out.
        paths: Path of each sample's image file; None if the source is not a folder or a list of files.
    """

    is_in_memory = True

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        label_names: Sequence[str],
        *,
        digests: Digests | None = None,
        unreadable: Mapping[int, str] | None = None,
        notices: Sequence[str] = (),
        paths: Sequence[str] | None = None,
    ) -> None:
        self._planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        if digests is not None:
            self._digests = digests
        self.unreadable = unreadable or {}
        self.notices = tuple(notices)
        self.paths = paths
        self.labels = labels
        self.label_names = tuple(label_names)

    @property
    def num_samples(self) -> int:
        """Number of samples, N."""
        return len(self.labels)

    def pixels(self, samples: np.ndarray) -> np.ndarray:
        """Return the decoded images of samples; see `ImageSet.pixels`."""
        return self._planes[samples].transpose(0, 2, 3, 1)

    def crops(self, samples: np.ndarray, crops: Sequence[Crop]) -> np.ndarray:
        """Return parts of the images of samples; see `ImageSet.crops`."""
        images = channels_last(self.pixels(samples))
        decoder = Decoder(images.shape[1])
        return np.stack([decoder.fit_array(image, crop) for image, crop in zip(images, crops, strict=True)])

    def labels_of(self, samples: np.ndarray) -> np.ndarray:
        """Return the labels of samples; see `ImageSet.labels_of`."""
        return self.labels[samples]

    def digests(self, samples: np.ndarray) -> np.ndarray:
        """Return the digest of each sample; see `ImageSet.digests`."""
        return self._digests.labeled[samples]

    def content_digests(self, samples: np.ndarray) -> np.ndarray:
        """Return the digest of each sample's image; see `ImageSet.content_digests`."""
        return self._digests.contents[samples]

    @cached_property
    def _digests(self) -> Digests:
        images = (channels_last(planes.transpose(1, 2, 0)) for planes in self._planes)
        return Digests.of((image.data for image in images), self.labels)


def samples_digest(images: ImageSet, samples: np.ndarray, *, replaceable: Sequence[int] = ()) -> str:
    """Compute a digest of samples in their order: of all indices and labels, and of 512 evenly spaced images.

    Args:
        images: The source split.
        samples: Indices, int64 [n].
        replaceable: Samples whose images do not change the digest.
    """
    drawn = samples[:: max(1, len(samples) // _SAMPLED_IMAGES)][:_SAMPLED_IMAGES]
    digests = np.where(np.isin(drawn, replaceable), np.uint64(0), images.digests(drawn))
    return arrays_digest(samples, images.labels[samples], digests)
