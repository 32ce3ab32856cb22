"""Rows: the stored values of all tensors of a sample side by side, so that one copy moves a batch to a device.

    row    values of each tensor, the largest type first | zeros | with an int8 tensor: number of the sample's file, int64

A matrix of rows is int64 [n, words]. The values of a tensor are a slice of its columns, viewed as their type without a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_accel.cache.shard import TORCH_TYPE
from kd_accel.cache.spec import BYTES_PER_VALUE, TensorSpec

_WORD_BYTES = 8
_ALIGNMENT_BYTES = 16
"""Largest word that a GPU copies; a row has a multiple of it."""


@dataclass(frozen=True)
class StoredValues:
    """Samples of one tensor in their storage type.

    Attributes:
        values: Values, [n, ...]; the values of a sample are contiguous.
        scale: Scale per sample and channel, float32 [n, D]; None for the float types.
    """

    values: Tensor
    scale: Tensor | None


class RowFormat:
    """Places of the tensors in a row.

    Args:
        specs: Specs of the tensors by name.

    Attributes:
        sample_bytes: Size of a sample's values by the name of the tensor, in the order of a row.
        scaled: Names of the int8 tensors in the order of a row.
        words: Length of a row in int64 words.
    """

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        # In descending order of their sizes, values of each type start at a multiple of their size without padding.
        self._specs = dict(sorted(specs.items(), key=lambda item: -BYTES_PER_VALUE[item[1].dtype]))
        self.sample_bytes = {name: spec.sample_bytes for name, spec in self._specs.items()}
        self.scaled = [name for name, spec in self._specs.items() if spec.is_scaled]
        values_bytes, number_bytes = sum(self.sample_bytes.values()), _WORD_BYTES if self.scaled else 0
        self._padding_bytes = -(values_bytes + number_bytes) % _ALIGNMENT_BYTES
        self.words = (values_bytes + self._padding_bytes + number_bytes) // _WORD_BYTES

    def tail(self, number: int) -> bytes:
        """Return the end of each row of a file, after the values. number: number of the file."""
        return bytes(self._padding_bytes) + (number.to_bytes(_WORD_BYTES, "little") if self.scaled else b"")

    def split(self, rows: Tensor, *scales: Tensor) -> dict[str, StoredValues]:
        """Return the values in rows, without a copy and without a synchronization of the device.

        Args:
            rows: Rows, int64 [n, words].
            scales: With int8 tensors their scales side by side, float32 [files, channels of all of them]; else nothing.

        Returns:
            Samples by the name of the tensor, on the device of the rows.
        """
        sizes = list(self.sample_bytes.values())
        *parts, _ = rows.view(torch.uint8).split([*sizes, _WORD_BYTES * self.words - sum(sizes)], dim=1)
        scale_of: dict[str, Tensor] = {}
        if scales:
            channels = [self._specs[name].shape[0] for name in self.scaled]
            scale_of = dict(zip(self.scaled, scales[0][rows.select(1, -1)].split(channels, dim=1), strict=True))
        return {
            name: StoredValues(part.view(TORCH_TYPE[spec.dtype]).view(len(rows), *spec.shape), scale_of.get(name))
            for (name, spec), part in zip(self._specs.items(), parts, strict=True)
        }
