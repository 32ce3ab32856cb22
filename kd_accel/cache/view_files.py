"""Open files of one view of a cache, and samples read from them in their storage type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kd_accel.cache.shard import TORCH_TYPE, read_scale, values_offset
from kd_accel.cache.spec import CacheSpec, Shard

_ALIGNMENT_BYTES = 64
"""Alignment of the tensors within the block of `ViewFiles.read`."""


@dataclass(frozen=True)
class StoredValues:
    """Samples of one tensor in their storage type.

    Attributes:
        values: Values, [n, ...].
        scale: Scale per sample and channel, float32 [n, D]; None for the float types.
    """

    values: Tensor
    scale: Tensor | None

    def joined(self, others: StoredValues, order: Tensor, *, pin_memory: bool) -> StoredValues:
        """Return these and other samples in a new order.

        Args:
            others: Samples of the same tensor.
            order: Position of each sample of the result among these samples followed by the others, int64 [n].
            pin_memory: Whether the memory of the result is page-locked.
        """
        out = torch.empty((len(order), *self.values.shape[1:]), dtype=self.values.dtype, pin_memory=pin_memory)
        torch.index_select(torch.cat([self.values, others.values]), 0, order, out=out)
        scale = None if self.scale is None or others.scale is None else torch.cat([self.scale, others.scale])[order]
        return StoredValues(out, scale)


class ViewFiles:
    """Open files of one view.

    Args:
        cache_spec: Spec of the cache.
        files: Files of each tensor with their content, in the order of their samples, by the name of the tensor.
    """

    def __init__(self, cache_spec: CacheSpec, files: Mapping[str, Sequence[tuple[Shard, memoryview]]]) -> None:
        self._samples_per_shard = cache_spec.samples_per_shard
        self._specs = {name: cache_spec.tensors[name] for name in files}
        self._values = {name: [file[values_offset(cache_spec, shard) :] for shard, file in of] for name, of in files.items()}
        scaled = [[read_scale(file, cache_spec, shard) for shard, file in files[name]] for name in self._scaled]
        # Scales of the int8 tensors side by side, [files, channels of all of them].
        self._scales = torch.cat([torch.stack(scales) for scales in scaled], dim=1) if scaled else None

    def read(self, positions: np.ndarray, device: torch.device) -> dict[str, StoredValues]:
        """Copy samples into one block of new memory, which is one copy to a device.

        Args:
            positions: Positions among the samples of the split, int64 [n].
            device: Device of the result. Host memory is aligned to 16 bytes only, that of other tensors to 64.

        Returns:
            Samples by the name of the tensor.
        """
        # All files but the last have the same number of samples, and all samples the same number of bytes, so one division
        # gives the file of a sample and the offset in the file.
        shards, offsets = np.divmod(positions, self._samples_per_shard)
        # Iterating over an array would create a NumPy scalar for each element; lists hold plain integers.
        numbers, sizes, pieces = shards.tolist(), list[int](), list[memoryview | bytes]()
        for name, spec in self._specs.items():
            files, length = self._values[name], spec.sample_bytes
            starts = (offsets * length).tolist()
            pieces += [files[number][start : start + length] for number, start in zip(numbers, starts, strict=True)]
            sizes += [length * len(numbers), -length * len(numbers) % _ALIGNMENT_BYTES]
            pieces.append(bytes(sizes[-1]))
        # The join is one memcpy per piece; assigning each piece to a slice of a memoryview takes 1.6 to 1.8 times as long.
        # Gathering with tensor operations would need one pass and one copy per file.
        block = torch.from_numpy(np.frombuffer(bytearray().join([*pieces, shards.data]), np.uint8))
        block = (block.pin_memory() if device.type == "cuda" else block).to(device, non_blocking=True)
        *parts, shard_bytes = block.split([*sizes, shards.nbytes])
        scales = self._scales_of(shard_bytes.view(torch.int64))
        return {
            name: StoredValues(part.view(TORCH_TYPE[spec.dtype]).view(len(numbers), *spec.shape), scales.get(name))
            for (name, spec), part in zip(self._specs.items(), parts[::2], strict=True)
        }

    def _scales_of(self, shards: Tensor) -> Mapping[str, Tensor]:
        """Return the scales [n, D] of the int8 tensors by name. shards: file number of each sample, int64 [n]."""
        if self._scales is None:
            return {}
        self._scales = self._scales.to(shards.device)
        columns = self._scales[shards].split([self._specs[name].shape[0] for name in self._scaled], dim=1)
        return dict(zip(self._scaled, columns, strict=True))

    @property
    def _scaled(self) -> list[str]:
        return [name for name, spec in self._specs.items() if spec.is_scaled]
