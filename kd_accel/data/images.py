"""One split of a data set, as everything after the sources sees it: labels, and pixels by row number.

In: decoded images, or a dataset of encoded ones. Out: uint8 RGB. What is encoded is decoded by whoever asks, in the main
process or in a worker, so an `EncodedImages` travels as the memory-mapped files that it names.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kd_accel.data.decode import decode
from kd_accel.types import UserError


class ImageSet(Protocol):
    """One split. labels: int64 [N]. A row is an index in it, before any cut."""

    labels: np.ndarray
    label_names: tuple[str, ...]
    is_in_memory: bool

    @property
    def num_rows(self) -> int: ...

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [n, S, S, 3], RGB. Raises UserError that names a row which cannot be decoded."""
        ...


class MemoryImages:
    """A split that is held decoded. images: uint8 [N, S, S, 3]."""

    is_in_memory = True

    def __init__(self, images: np.ndarray, labels: np.ndarray, label_names: Sequence[str]) -> None:
        self._images = images
        self.labels = labels
        self.label_names = tuple(label_names)

    @property
    def num_rows(self) -> int:
        return len(self.labels)

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        return self._images[rows]


class EncodedImages:
    """A split of a Hugging Face dataset whose images are decoded when they are asked for."""

    is_in_memory = False

    def __init__(self, column: Any, labels: np.ndarray, label_names: Sequence[str], *, split: str, image_size: int) -> None:
        self._column = column
        self.labels = labels
        self.label_names = tuple(label_names)
        self._split = split
        self._image_size = image_size

    @property
    def num_rows(self) -> int:
        return len(self.labels)

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        size = self._image_size
        out = np.empty((len(rows), size, size, 3), dtype=np.uint8)
        cells = self._column[rows.tolist()]
        cells = cells["image"] if isinstance(cells, dict) else cells
        for index, (row, cell) in enumerate(zip(rows, cells, strict=True)):
            out[index] = self._decoded(int(row), cell)
        return out

    def _decoded(self, row: int, cell: Any) -> np.ndarray:
        try:
            data = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
            return decode(data, self._image_size)
        except (ValueError, TypeError, KeyError, OSError) as error:
            path = cell.get("path") if isinstance(cell, dict) else None
            raise UserError(
                f"data: the image in row {row} of the {self._split} split{f', {path},' if path else ''} cannot be decoded "
                f"({error}); mend or remove the row"
            ) from None
