"""Reading samples from the files of a cache: mapped into memory, one copy per sample, no pickle.

A file is opened when its view is first asked for, in the process that asks; a reader that travels to another process opens its
own. Opening checks the header, and every byte of the data once where the view fits in free memory: that read is also what
brings the file into the page cache, in order. Mapped pages belong to the page cache; nothing else grows with the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kd_accel.cache.codec import TORCH_TYPE
from kd_accel.cache.shard import damage, is_data_whole, open_shard, scale_of, values_offset
from kd_accel.cache.spec import CacheSpec, Shard, Split
from kd_accel.errors import UserError


@dataclass(frozen=True)
class StoredValues:
    """values: [n, ...] as they are kept. scale: float32 [n, D] for int8, else None."""

    values: Tensor
    scale: Tensor | None


class Reader:
    """Samples of one split of a complete cache."""

    def __init__(
        self, directory: Path, cache_spec: CacheSpec, split: Split, samples: np.ndarray, tensors: Sequence[str]
    ) -> None:
        """samples: int64 [N], ascending, the samples that the cache covers. tensors: which of its tensors are read."""
        self._directory, self._cache_spec, self._split = directory, cache_spec, split
        self._tensors = tuple(tensors)
        self._position = np.full(samples.max(initial=-1) + 1, -1)  # of each sample; a look-up costs a tenth of a search
        self._position[samples] = np.arange(len(samples))
        self._files: dict[str, _View] = {}
        self._view: int | None = None
        self._checked: set[str] = set()

    def read(self, view: int, samples: np.ndarray, *, pin_memory: bool = False) -> dict[str, StoredValues]:
        """Each tensor of these samples, in new memory. samples: int64 [n], each one that the cache covers."""
        positions = self._positions(samples)
        self._open(view)
        return {name: self._files[name].read(positions, pin_memory=pin_memory) for name in self._tensors}

    def read_into(self, view: int, samples: np.ndarray, tensor: str, out: Tensor) -> None:
        """The same for one tensor, into memory that is there: `out` [n, ...], contiguous, of the stored type, on the CPU."""
        self._open(view)
        self._files[tensor].copy(self._positions(samples), out)

    def _positions(self, samples: np.ndarray) -> np.ndarray:
        positions = self._position.take(samples)
        assert positions.min(initial=0) >= 0, "asked for samples that the cache does not cover"
        return positions

    def _open(self, view: int) -> None:
        if view == self._view:
            return
        shards = {name: self._cache_spec.shards(self._split, view, name) for name in self._tensors}
        reads_data = _view_bytes(self._cache_spec, self._split, self._tensors) < available_bytes()
        files = {}
        for name, parts in shards.items():
            files[name] = _View(self._cache_spec, parts, [self._open_shard(shard, reads_data=reads_data) for shard in parts])
        self._files, self._view = files, view

    def _open_shard(self, shard: Shard, *, reads_data: bool) -> memoryview:
        found = damage(self._directory, self._cache_spec, shard, reads_data=False)
        if found is None:
            file = open_shard(self._directory, self._cache_spec, shard)
            if not reads_data or shard.name in self._checked or is_data_whole(file, self._cache_spec, shard):
                self._checked.add(shard.name)
                return file
            found = "does not match its checksum"
        raise UserError(
            f"teacher.cache_dir: {self._directory / shard.name} {found}; run `kd-accel cache build` with the same config, "
            "which writes just that file again"
        )

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": {}, "_view": None}


class _View:
    """The open files of one tensor and view."""

    def __init__(self, cache_spec: CacheSpec, shards: Sequence[Shard], files: Sequence[memoryview]) -> None:
        spec = cache_spec.tensors[shards[0].tensor]
        self._shape, self._dtype, self._sample_bytes = spec.shape, TORCH_TYPE[spec.dtype], spec.sample_bytes
        self._samples_per_shard = cache_spec.samples_per_shard
        self._values = [file[values_offset(cache_spec, shard) :] for file, shard in zip(files, shards, strict=True)]
        scales = [scale_of(file, cache_spec, shard) for file, shard in zip(files, shards, strict=True)]
        self._scales = torch.stack([scale for scale in scales if scale is not None]) if spec.is_scaled else None

    def read(self, positions: np.ndarray, *, pin_memory: bool) -> StoredValues:
        out = torch.empty((len(positions), *self._shape), dtype=self._dtype, pin_memory=pin_memory)
        self.copy(positions, out)
        scale = None if self._scales is None else self._scales[torch.from_numpy(positions // self._samples_per_shard)]
        return StoredValues(out, scale)

    def copy(self, positions: np.ndarray, out: Tensor) -> None:
        """Slices of memory views are copied by memcpy: a few hundred nanoseconds a sample, and no sample is copied twice."""
        length, values = self._sample_bytes, self._values
        target = memoryview(out.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        shards, offsets = np.divmod(positions, self._samples_per_shard)
        starts, end = offsets * length, 0
        for shard, start, stop in zip(shards.tolist(), starts.tolist(), (starts + length).tolist(), strict=True):
            begin, end = end, end + length
            target[begin:end] = values[shard][start:stop]


def available_bytes() -> int:
    """Memory that could be taken without swapping, the page cache included; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else 0


def _view_bytes(cache_spec: CacheSpec, split: Split, tensors: Sequence[str]) -> int:
    return cache_spec.samples[split] * sum(cache_spec.tensors[name].sample_bytes for name in tensors)
