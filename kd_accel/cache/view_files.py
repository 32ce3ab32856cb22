"""Open files of one view of a cache, and the positions of samples in them.

In: indices of samples. Out: their positions, and their rows (rows.py) on a device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from kd_accel.cache.rows import RowFormat
from kd_accel.cache.shard import read_scale, values_offset
from kd_accel.cache.spec import CacheSpec, Shard

_LARGEST_TABLE, _SPARSE = 2**24, 64
"""Entries of a table that are always allowed, and further ones for each sample: 128 MiB, and 512 bytes a sample."""


class PositionTable:
    """Position of each covered sample of a split, by its index.

    A table lookup takes a tenth of the time of a binary search, which is used where a table would be mostly empty.

    Args:
        indices: Indices of the covered samples in the split, int64 [N], ascending.
        first_index: Number that is added to an index in a training.
        first_position: Position of the first sample.
    """

    def __init__(self, indices: np.ndarray, *, first_index: int = 0, first_position: int = 0) -> None:
        self._before_index, self._first_position = first_index - 1, first_position
        self._sorted: np.ndarray | None = None
        if indices.max(initial=-1) > _LARGEST_TABLE + _SPARSE * len(indices):
            self._sorted = indices + 1
            return
        # The first and the last entry stand for all indices outside.
        self._position = np.full(indices.max(initial=-1) + 3, -1)
        self._position[indices + 1] = first_position + np.arange(len(indices))

    def look_up(self, indices: np.ndarray) -> np.ndarray:
        """Return the positions of samples, int64 [n]; -1 for one that is not covered. indices: int64 [n]."""
        own = indices - self._before_index
        if self._sorted is None:
            return self._position.take(own, mode="clip")
        found = np.searchsorted(self._sorted, own).clip(max=len(self._sorted) - 1)
        return np.where(self._sorted[found] == own, self._first_position + found, -1)


class ViewFiles:
    """Open files of one view.

    The position of a sample in the view is the number of its file, times the samples per shard, plus its row in the file.

    Args:
        cache_spec: Spec of the cache.
        files: Files of each tensor with their content, in the order of their positions, by the name of the tensor.
        row_format: Places of the tensors in a row of these tensors.
        device: Device of the rows.
    """

    def __init__(
        self,
        cache_spec: CacheSpec,
        files: Mapping[str, Sequence[tuple[Shard, memoryview]]],
        row_format: RowFormat,
        device: torch.device,
    ) -> None:
        self.device = device
        self._format, self._samples_per_shard = row_format, cache_spec.samples_per_shard
        self._values = {
            name: [file[values_offset(cache_spec, shard) :] for shard, file in files[name]] for name in row_format.sample_bytes
        }
        self._samples = [shard.samples for shard, _ in next(iter(files.values()))]
        self._tails = [row_format.tail(number) for number in range(len(self._samples))]
        scaled = [
            torch.stack([read_scale(file, cache_spec, shard) for shard, file in files[name]]) for name in row_format.scaled
        ]
        self.scales: tuple[Tensor, ...] = (torch.cat(scaled, dim=1).to(device),) if scaled else ()
        """With int8 tensors one tensor, their scales side by side, float32 [files, channels of all of them]; else nothing."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape (positions, words) of the rows of all samples."""
        # Each file but the last takes the positions of a complete one.
        return sum(self._samples[-1:], self._samples_per_shard * (len(self._samples) - 1)), self._format.words

    @property
    def matrix_bytes(self) -> int:
        """Size of the rows of all samples."""
        return math.prod(self.matrix_shape) * torch.int64.itemsize

    def fetch(self, positions: np.ndarray) -> tuple[Tensor, ...]:
        """Copy rows into new memory: one host copy, and one copy to the device.

        Args:
            positions: Positions of samples, int64 [n].

        Returns:
            Rows, int64 [n, words], and `scales`, both on the device.
        """
        numbers, rows_in_file = np.divmod(positions, self._samples_per_shard)
        # Iterating over an array would create a NumPy scalar for each element; lists hold plain integers.
        file_of = numbers.tolist()
        columns: list[list[memoryview] | list[bytes]] = []
        for name, length in self._format.sample_bytes.items():
            files, starts = self._values[name], (rows_in_file * length).tolist()
            columns.append([files[number][start : start + length] for number, start in zip(file_of, starts, strict=True)])
        columns.append([self._tails[number] for number in file_of])
        # The join is one memcpy per piece; assigning each piece to a slice of a memoryview takes 1.6 to 1.8 times as long.
        # Gathering with tensor operations would need one pass and one copy per file.
        block = bytearray().join(chain.from_iterable(zip(*columns, strict=True)))
        rows = torch.from_numpy(np.frombuffer(block, np.int64).reshape(len(file_of), self._format.words))
        rows = rows.pin_memory() if self.device.type == "cuda" else rows
        return rows.to(self.device, non_blocking=True), *self.scales

    def copy_to(self, rows: Tensor) -> None:
        """Copy all samples, one file at a time.

        Args:
            rows: Zeros, int64 of `matrix_shape`, which are overwritten at the positions of samples.
        """
        in_bytes, first = rows.view(torch.uint8), 0
        for name, length in self._format.sample_bytes.items():
            for number, (file, samples) in enumerate(zip(self._values[name], self._samples, strict=True)):
                start = number * self._samples_per_shard
                # A tensor cannot share the memory of a file that is open for reading only.
                values = torch.from_numpy(np.frombuffer(file, np.uint8).copy()).view(samples, length)
                in_bytes[start : start + samples, first : first + length] = values.to(self.device)
            first += length
        for number in range(len(self._samples) if self._format.scaled else 0):
            start = number * self._samples_per_shard
            rows[start : start + self._samples_per_shard, -1] = number
