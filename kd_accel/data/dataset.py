"""Image sets: the labels of a source split, and its pixels by sample index.

Input: decoded images, or a dataset of encoded images. Output: RGB pixels, uint8. Encoded images are decoded in the calling
process, main or worker. An `EncodedImages` is pickled as the names of its memory-mapped files, so workers share one copy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import xxhash

from kd_accel.data.decode import decode
from kd_accel.errors import UserError
from kd_accel.io.hashing import arrays_digest

Result = TypeVar("Result")

_CHUNK_SAMPLES = 1024
MAX_FILE_BYTES = 512 * 2**20
"""Size limit of an image file; a larger file is refused before it fills the memory."""
_SAMPLED_IMAGES = 512


class ImageSet(Protocol):
    """Images and labels of a source split. A sample's index is its position in the split, before any subset.

    Attributes:
        labels: Class indices, int64 [N].
        label_names: Class names, by label.
        is_in_memory: Whether the decoded images are held in memory.
        notices: Lines for the user about the source, such as files that are left out.
    """

    labels: np.ndarray
    label_names: tuple[str, ...]
    is_in_memory: bool
    notices: tuple[str, ...]

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
        encoded: Image set from which the images were decoded, for the digests; None = the digests are those of the pixels.
    """

    is_in_memory = True

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, label_names: Sequence[str], *, encoded: EncodedImages | None = None
    ) -> None:
        self._planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        self._encoded = encoded
        self.notices = () if encoded is None else encoded.notices
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
        """Compute a digest of each sample; see `ImageSet.digests`."""
        if self._encoded is not None:
            return self._encoded.digests(samples)
        images = (channels_last(self._planes[sample].transpose(1, 2, 0)) for sample in samples)
        return _compute_digests((image.data for image in images), self.labels[samples])


class EncodedImages:
    """Image set of a Hugging Face dataset, decoded on demand.

    Args:
        column: Dataset with the single column `image`, or a list of its cells by indices; undecoded: {"bytes", "path"} each.
        labels: Class indices, int64 [N].
        label_names: Class names, by label.
        split: Name of the split, for error messages.
        image_size: Side of the square that images are resized to, in pixels.
        roots: Absolute paths of the directories that may contain image files.
        notices: Lines for the user about the source, such as files that are left out.
    """

    is_in_memory = False

    def __init__(
        self,
        column: Any,
        labels: np.ndarray,
        label_names: Sequence[str],
        *,
        split: str,
        image_size: int,
        roots: Sequence[Path],
        notices: Sequence[str] = (),
    ) -> None:
        self.notices = tuple(notices)
        self._column = column
        self.labels = labels
        self.label_names = tuple(label_names)
        self._split = split
        self._roots = tuple(roots)
        self._image_size = image_size

    @property
    def num_samples(self) -> int:
        """Number of samples, N."""
        return len(self.labels)

    def pixels(self, samples: np.ndarray) -> np.ndarray:
        """Return the decoded images of samples; see `ImageSet.pixels`."""
        size = self._image_size
        out = np.empty((len(samples), size, size, 3), dtype=np.uint8)
        for position, (sample, cell) in enumerate(zip(samples, self._cells(samples), strict=True)):
            out[position] = self._with_content(int(sample), cell, lambda data: decode(data, size))
        return out

    def digests(self, samples: np.ndarray) -> np.ndarray:
        """Compute a digest of each sample; see `ImageSet.digests`."""
        parts = np.array_split(samples, max(1, -(-len(samples) // _CHUNK_SAMPLES)))
        return np.concatenate([_compute_digests(self._encoded(part), self.labels[part]) for part in parts])

    def _encoded(self, samples: np.ndarray) -> Iterator[bytes]:
        for sample, cell in zip(samples, self._cells(samples), strict=True):
            yield self._with_content(int(sample), cell, lambda data: data)

    def _read_file(self, path: str) -> bytes:
        """Read an image file inside the dataset's directories: a downloaded table could name any file of this machine."""
        # Links are not resolved: a link inside the dataset's directory may point to a file outside it.
        absolute = Path(os.path.abspath(path))  # noqa: PTH100
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
        """Apply `use` to a sample's encoded image. Raises UserError with the sample's index if it cannot be read or decoded."""
        try:
            return use(cell["bytes"] if cell["bytes"] is not None else self._read_file(cell["path"]))
        except (ValueError, TypeError, KeyError, OSError) as error:
            path = cell.get("path") if isinstance(cell, dict) else None
            name = f"sample {sample} of the {self._split} split" + (f", {path}," if path else "")
            raise UserError(f"data.source: {name} cannot be decoded ({error}); fix or remove the image") from None


def _compute_digests(contents: Iterable[Any], labels: np.ndarray) -> np.ndarray:
    pairs = zip(contents, labels.tolist(), strict=True)
    return np.fromiter((xxhash.xxh3_64_intdigest(content, seed=label) for content, label in pairs), np.uint64, len(labels))


def samples_digest(images: ImageSet, samples: np.ndarray) -> str:
    """Compute a digest of samples in their order: of all indices and labels, and of 512 evenly spaced images.

    Args:
        images: The source split.
        samples: Indices, int64 [n].
    """
    drawn = samples[:: max(1, len(samples) // _SAMPLED_IMAGES)][:_SAMPLED_IMAGES]
    return arrays_digest(samples, images.labels[samples], images.digests(drawn))
