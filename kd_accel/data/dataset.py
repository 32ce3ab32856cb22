"""One split of a data set, as everything after the sources sees it: labels, and pixels by sample number.

In: decoded images, or a dataset of encoded ones. Out: uint8 RGB. What is encoded is decoded by whoever asks, in the main
process or in a worker, so an `EncodedImages` travels as the memory-mapped files that it names.
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

Used = TypeVar("Used")

_CHUNK_SAMPLES = 1024
MAX_FILE_BYTES = 512 * 2**20
_SAMPLED_IMAGES = 512


class ImageSet(Protocol):
    """One split. labels: int64 [N]. A sample is an index in it, before any cut."""

    labels: np.ndarray
    label_names: tuple[str, ...]
    is_in_memory: bool

    @property
    def num_samples(self) -> int: ...

    def pixels(self, samples: np.ndarray) -> np.ndarray:
        """uint8 [n, S, S, 3], RGB; its memory channels-last as the shape says, or channels-first (contiguous as [n, 3, S, S]).

        Raises UserError that names a sample which cannot be decoded.
        """
        ...

    def digests(self, samples: np.ndarray) -> np.ndarray:
        """uint64 [n], of each sample's image and label; of the encoded image where the source holds one."""
        ...


def empty_images(samples: int, image_size: int) -> np.ndarray:
    """Memory to fill for `MemoryImages`: uint8 [samples, S, S, 3], channels-first."""
    return np.empty((samples, 3, image_size, image_size), dtype=np.uint8).transpose(0, 2, 3, 1)


def channels_last(images: np.ndarray) -> np.ndarray:
    """uint8 [..., S, S, 3] in the memory order of its shape, as Pillow and files have it; copied where it has another.

    Channel by channel, since a copy of pixels takes several times as long.
    """
    if images.flags.c_contiguous:
        return images
    copy = np.empty(images.shape, dtype=np.uint8)
    for channel in range(3):
        copy[..., channel] = images[..., channel]
    return copy


class MemoryImages:
    """A split that is held decoded; channels-first, which a CPU mirrors and normalizes faster.

    images: uint8 [N, S, S, 3], copied unless they lie in `empty_images`. encoded: what they were decoded from, where known.
    """

    is_in_memory = True

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, label_names: Sequence[str], *, encoded: EncodedImages | None = None
    ) -> None:
        self._planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        self._encoded = encoded
        self.labels = labels
        self.label_names = tuple(label_names)

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    def pixels(self, samples: np.ndarray) -> np.ndarray:
        return self._planes[samples].transpose(0, 2, 3, 1)

    def digests(self, samples: np.ndarray) -> np.ndarray:
        if self._encoded is not None:
            return self._encoded.digests(samples)
        images = (channels_last(self._planes[sample].transpose(1, 2, 0)) for sample in samples)
        return _digests((image.data for image in images), self.labels[samples])


class EncodedImages:
    """A split of a Hugging Face dataset whose images are decoded when they are asked for."""

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
    ) -> None:
        """roots: absolute directories in which image files may lie."""
        self._column = column
        self.labels = labels
        self.label_names = tuple(label_names)
        self._split = split
        self._roots = tuple(roots)
        self._image_size = image_size

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    def pixels(self, samples: np.ndarray) -> np.ndarray:
        size = self._image_size
        out = np.empty((len(samples), size, size, 3), dtype=np.uint8)
        for index, (sample, cell) in enumerate(zip(samples, self._cells(samples), strict=True)):
            out[index] = self._tried(int(sample), cell, lambda data: decode(data, size))
        return out

    def digests(self, samples: np.ndarray) -> np.ndarray:
        parts = np.array_split(samples, max(1, -(-len(samples) // _CHUNK_SAMPLES)))
        return np.concatenate([_digests(self._encoded(part), self.labels[part]) for part in parts])

    def _encoded(self, samples: np.ndarray) -> Iterator[bytes]:
        for sample, cell in zip(samples, self._cells(samples), strict=True):
            yield self._tried(int(sample), cell, lambda data: data)

    def _read_file(self, path: str) -> bytes:
        """A cell of a stranger's table may name any file of this machine."""
        place = Path(os.path.abspath(path))  # noqa: PTH100  (a link inside the directory may lead where its owner wants)
        if not any(place.is_relative_to(root) for root in self._roots):
            raise ValueError("it names a file outside the data set")
        if not place.is_file():
            raise ValueError("there is no such file")
        with place.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"more than {MAX_FILE_BYTES // 2**20} MiB")
        return data

    def _cells(self, samples: np.ndarray) -> Any:
        cells = self._column[samples.tolist()]
        return cells["image"] if isinstance(cells, dict) else cells

    def _tried(self, sample: int, cell: Any, use: Callable[[bytes], Used]) -> Used:
        try:
            return use(cell["bytes"] if cell["bytes"] is not None else self._read_file(cell["path"]))
        except (ValueError, TypeError, KeyError, OSError) as error:
            path = cell.get("path") if isinstance(cell, dict) else None
            raise UserError(
                f"data: the image in sample {sample} of the {self._split} split{f', {path},' if path else ''} cannot be decoded "
                f"({error}); mend or remove the sample"
            ) from None


def _digests(contents: Iterable[Any], labels: np.ndarray) -> np.ndarray:
    pairs = zip(contents, labels.tolist(), strict=True)
    return np.fromiter((xxhash.xxh3_64_intdigest(content, seed=label) for content, label in pairs), np.uint64, len(labels))


def samples_digest(images: ImageSet, samples: np.ndarray) -> str:
    """Of the samples of a split, in their order: all labels, and the images of an even sample of 512 of them."""
    sample = samples[:: max(1, len(samples) // _SAMPLED_IMAGES)][:_SAMPLED_IMAGES]
    return arrays_digest(samples, images.labels[samples], images.digests(sample))
