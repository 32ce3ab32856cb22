"""Image sets: the labels of a source split, and its pixels by sample index.

Input: decoded images, or a dataset of encoded images. Output: RGB pixels, uint8. Encoded images are decoded in the calling
process, main or worker. An `EncodedImages` is pickled as the names of its memory-mapped files, so workers share one copy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import xxhash

from kd_accel.data.decode import Decoder
from kd_accel.errors import UnreadableImage
from kd_accel.io.hashing import arrays_digest

Result = TypeVar("Result")

_CHUNK_SAMPLES = 64
MAX_FILE_BYTES = 512 * 2**20
"""Size limit of an image file; a larger file is refused before it fills the memory."""
_SAMPLED_IMAGES = 512
_UNREADABLE = (ValueError, TypeError, KeyError, OSError)


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


class ImageSet(Protocol):
    """Images and labels of a source split. A sample's index is its position in the split, before any subset.

    Attributes:
        labels: Class indices, int64 [N]; -1 = no label.
        label_names: Class names, by label.
        is_in_memory: Whether the decoded images are held in memory.
        notices: Lines for the user about the source, such as files that are left out.
        unreadable: Reason by the index of each sample that cannot be read or decoded, as far as it is known.
    """

    labels: np.ndarray
    label_names: tuple[str, ...]
    is_in_memory: bool
    notices: tuple[str, ...]
    unreadable: Mapping[int, str]

    @property
    def num_samples(self) -> int:
        """Number of samples, N."""
        ...

    def pixels(self, samples: np.ndarray) -> np.ndarray:
        """Return the decoded images of samples.

        Args:
            samples: Indices, int64 [n].

        Returns:
            RGB images, uint8 [n, S, S, 3]; either C-contiguous (channels-last) or contiguous as [n, 3, S, S] (channels-first).

        Raises:
            UserError: If an image cannot be decoded; the message contains its index.
        """
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
    ) -> None:
        self._planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        if digests is not None:
            self._digests = digests
        self.unreadable = unreadable or {}
        self.notices = tuple(notices)
        self.labels = labels
        self.label_names = tuple(label_names)

    @property
    def num_samples(self) -> int:
        """Number of samples, N."""
        return len(self.labels)

    def pixels(self, samples: np.ndarray) -> np.ndarray:
        """Return the decoded images of samples; see `ImageSet.pixels`."""
        return self._planes[samples].transpose(0, 2, 3, 1)

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


class EncodedImages:
    """Image set of a Hugging Face dataset, decoded on demand.

    Args:
        column: Dataset with the single column `image`, or a list of its cells by indices; undecoded: {"bytes", "path"} each.
        labels: Class indices, int64 [N].
        label_names: Class names, by label.
        split: Name of the split, for error messages.
        decoder: Conversion of an encoded image to pixels.
        roots: Absolute paths of the directories that may contain image files; a relative path is relative to the first.
        notices: Lines for the user about the source, such as files that are left out.
        stamp: Digest of the path, size and time of every file (`inventory.stamp_of`), by which the inventory of the images is
            kept; None = it cannot be kept.

    Attributes:
        can_be_forked: Whether worker processes may read the images although `data.num_workers` is 0, which a user's own data
            set may not allow.
    """

    is_in_memory = False
    can_be_forked = True

    def __init__(
        self,
        column: Any,
        labels: np.ndarray,
        label_names: Sequence[str],
        *,
        split: str,
        decoder: Decoder,
        roots: Sequence[Path],
        notices: Sequence[str] = (),
        stamp: str | None = None,
    ) -> None:
        self.notices = tuple(notices)
        self.unreadable: Mapping[int, str] = {}
        self.stamp = stamp
        self._digests: Digests | None = None
        self._column = column
        self.labels = labels
        self.label_names = tuple(label_names)
        self.split = split
        self._roots = tuple(roots)
        self.decoder = decoder

    @property
    def num_samples(self) -> int:
        """Number of samples, N."""
        return len(self.labels)

    def pixels(self, samples: np.ndarray) -> np.ndarray:
        """Return the decoded images of samples; see `ImageSet.pixels`."""
        size = self.decoder.image_size
        out = np.empty((len(samples), size, size, 3), dtype=np.uint8)
        for position, (sample, cell) in enumerate(zip(samples, self._cells(samples), strict=True)):
            out[position] = self._with_content(int(sample), cell, self._decode)
        return out

    def decoded(self, samples: np.ndarray) -> Decoded:
        """Read and decode samples; unlike with `pixels`, a sample that cannot be decoded is part of the result.

        Args:
            samples: Indices, int64 [n].
        """
        size, unreadable, contents = self.decoder.image_size, {}, []
        pixels = np.zeros((len(samples), size, size, 3), dtype=np.uint8)
        for position, (sample, cell) in enumerate(zip(samples.tolist(), self._cells(samples), strict=True)):
            content = None
            try:
                content = self._read(cell)
                pixels[position] = self._decode(content)
            except _UNREADABLE as error:
                unreadable[sample] = self._described(sample, cell, error)
            contents.append(content)
        return Decoded(pixels, Digests.of(contents, self.labels[samples]), unreadable)

    @property
    def is_held(self) -> bool:
        """True if `hold` was called."""
        return self._digests is not None

    def hold(self, digests: Digests, unreadable: Mapping[int, str]) -> None:
        """Keep the digests of all samples, and the samples that cannot be decoded, which a pass over them has found."""
        self._digests, self.unreadable = digests, unreadable

    def digests(self, samples: np.ndarray) -> np.ndarray:
        """Return the digest of each sample; see `ImageSet.digests`."""
        return self.read_digests(samples).labeled if self._digests is None else self._digests.labeled[samples]

    def content_digests(self, samples: np.ndarray) -> np.ndarray:
        """Return the digest of each sample's image; see `ImageSet.content_digests`."""
        return self.read_digests(samples).contents if self._digests is None else self._digests.contents[samples]

    def read_digests(self, samples: np.ndarray) -> Digests:
        """Compute the digests of samples from their present content; 0 for those known as unreadable.

        Args:
            samples: Indices, int64 [n].

        Raises:
            UserError: If a file cannot be read.
        """
        parts = np.array_split(samples, max(1, -(-len(samples) // _CHUNK_SAMPLES)))
        return Digests.join([Digests.of(self._contents(part), self.labels[part]) for part in parts])

    def _contents(self, samples: np.ndarray) -> Iterator[bytes | None]:
        for sample, cell in zip(samples.tolist(), self._cells(samples), strict=True):
            is_known = sample in self.unreadable
            yield None if is_known else self._with_content(sample, cell, lambda content: content)

    def _read(self, cell: Any) -> bytes:
        content: bytes = cell["bytes"] if cell["bytes"] is not None else self._read_file(cell["path"])
        return content

    def _decode(self, content: bytes) -> np.ndarray:
        return self.decoder.decode(content)

    def _read_file(self, path: str) -> bytes:
        """Read an image file inside the dataset's directories: a downloaded table could name any file of this machine."""
        # Links are not resolved: a link inside the dataset's directory may point to a file outside it.
        absolute = Path(os.path.abspath(self._roots[0] / path))  # noqa: PTH100
        if not any(absolute.is_relative_to(root) for root in self._roots):
            raise ValueError("its path is outside the dataset")
        if not absolute.is_file():
            raise ValueError("file not found")
        with absolute.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"the file is larger than {MAX_FILE_BYTES // 2**20} MiB")
        return data

    def _cells(self, samples: np.ndarray) -> Any:
        cells = self._column[samples.tolist()]
        return cells["image"] if isinstance(cells, dict) else cells

    def _with_content(self, sample: int, cell: Any, use: Callable[[bytes], Result]) -> Result:
        """Apply `use` to a sample's encoded image. Raises UnreadableImage if it cannot be read or decoded."""
        try:
            return use(self._read(cell))
        except _UNREADABLE as error:
            raise unreadable_image(sample, self._described(sample, cell, error)) from None

    def _described(self, sample: int, cell: Any, error: Exception) -> str:
        path = cell.get("path") if isinstance(cell, dict) else None
        name = f"sample {sample} of the {self.split} split" + (f", {path}," if path else "")
        return f"{name} cannot be decoded ({error})"


def unreadable_image(sample: int, description: str) -> UnreadableImage:
    """Create the error of an image that cannot be decoded. description: Sample, split and reason."""
    return UnreadableImage(
        description,
        "restore or remove the image, or set data.on_error to skip, which leaves such images out (`kd-accel data check` lists "
        "them all)",
        sample,
    )


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
