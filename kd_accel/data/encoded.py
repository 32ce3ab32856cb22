"""Image set of encoded images, decoded on demand in the calling process, main or worker.

Input: a column of a Hugging Face dataset, or paths of files. Output: RGB pixels, uint8. It is pickled as the names of its
memory-mapped files, so workers share one copy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from kd_accel.data.dataset import Decoded, Digests
from kd_accel.data.decode import Crop, Decoder, image_size
from kd_accel.data.folders import FileColumn
from kd_accel.errors import UnreadableImage

Result = TypeVar("Result")

_CHUNK_SAMPLES = 64
MAX_FILE_BYTES = 512 * 2**20
"""Size limit of an image file; a larger file is refused before it fills the memory."""
_UNREADABLE = (ValueError, TypeError, KeyError, OSError)


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
        self._prefixes = tuple(os.path.join(root, "") for root in roots)  # noqa: PTH118
        self.decoder = decoder

    @property
    def num_samples(self) -> int:
        """Number of samples, N."""
        return len(self.labels)

    @property
    def paths(self) -> Sequence[str] | None:
        """Paths of the files; see `ImageSet.paths`."""
        return self._column.paths if isinstance(self._column, FileColumn) else None

    def pixels(self, samples: np.ndarray) -> np.ndarray:
        """Return the decoded images of samples; see `ImageSet.pixels`."""
        size = self.decoder.image_size
        out = np.empty((len(samples), size, size, 3), dtype=np.uint8)
        for position, (sample, cell) in enumerate(zip(samples, self._cells(samples), strict=True)):
            out[position] = self._with_content(int(sample), cell, self._decode)
        return out

    def crops(self, samples: np.ndarray, crops: Sequence[Crop]) -> np.ndarray:
        """Return parts of the images of samples; see `ImageSet.crops`."""
        size = self.decoder.image_size
        out = np.empty((len(samples), size, size, 3), dtype=np.uint8)
        for position, (sample, cell, crop) in enumerate(zip(samples, self._cells(samples), crops, strict=True)):
            out[position] = self._cropped(int(sample), cell, crop)
        return out

    def labels_of(self, samples: np.ndarray) -> np.ndarray:
        """Return the labels of samples; see `ImageSet.labels_of`."""
        return self.labels[samples]

    def are_of_image_size(self, samples: np.ndarray) -> bool:
        """Return whether the original images of samples are squares of the image size. An unreadable file is not considered.

        Args:
            samples: Indices, int64 [n].
        """
        square = (self.decoder.image_size, self.decoder.image_size)
        return all(self._size(cell) in (square, None) for cell in self._cells(samples))

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

    def _decode(self, content: bytes, crop: Crop | None = None) -> np.ndarray:
        return self.decoder.decode(content, crop)

    def _cropped(self, sample: int, cell: Any, crop: Crop) -> np.ndarray:
        return self._with_content(sample, cell, partial(self._decode, crop=crop))

    def _size(self, cell: Any) -> tuple[int, int] | None:
        """Return width and height of an image, without decoding it; None if it cannot be read."""
        try:
            return image_size(self._read(cell))
        except _UNREADABLE:
            return None

    def _read_file(self, path: str) -> bytes:
        """Read an image file inside the dataset's directories: a downloaded table could name any file of this machine."""
        # Links are not resolved: a link inside the dataset's directory may point to a file outside it. Path objects would take
        # a tenth of the time in which a small photo is decoded.
        absolute = os.path.abspath(os.path.join(self._roots[0], path))  # noqa: PTH100, PTH118
        if not any(absolute.startswith(root) for root in self._prefixes):
            raise ValueError("its path is outside the dataset")
        if not os.path.isfile(absolute):  # noqa: PTH113
            raise ValueError("file not found")
        with open(absolute, "rb") as file:  # noqa: PTH123
            if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                raise ValueError(f"the file is larger than {MAX_FILE_BYTES // 2**20} MiB")
            return file.read()

    def _cells(self, samples: np.ndarray) -> Any:
        cells = self._column[samples.tolist()]
        return cells["image"] if isinstance(cells, dict) else cells

    def _with_content(self, sample: int, cell: Any, use: Callable[[bytes], Result]) -> Result:
        """Apply `use` to a sample's encoded image. Raises UnreadableImage if it cannot be read or decoded."""
        return self._guarded(sample, cell, lambda: use(self._read(cell)))

    def _guarded(self, sample: int, cell: Any, call: Callable[[], Result]) -> Result:
        try:
            return call()
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
