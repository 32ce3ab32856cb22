"""Random access to the samples of a cache: memory-mapped files, one copy per sample, no pickle.

A file is opened when its view is first read, in the process that reads; a pickled reader opens its own files. Opening a file
checks its header. If the view fits in free memory, the first opening also checks every byte of the data, a pass that loads the
file into the page cache in order. Mapped pages belong to the page cache; memory use is otherwise independent of the size of the
cache.

`open_cache` checks a cache against a request. `CachedTeacher` is a source of teacher outputs, interchangeable with a live
teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_accel.cache.compatibility import (
    BUILD_COMMAND,
    CacheRequest,
    check_contents,
    check_fingerprint,
    check_headers,
    check_samples,
    data_fields,
    differing_samples,
)
from kd_accel.cache.differences import differing_fields
from kd_accel.cache.manifest import CachedSamples, read_manifest, read_samples, read_spec, read_targets
from kd_accel.cache.shard import (
    INT8_LARGEST,
    TORCH_TYPE,
    decode,
    find_damage,
    is_data_intact,
    open_shard,
    read_scale,
    values_offset,
)
from kd_accel.cache.spec import LOGITS, CacheSpec, Shard
from kd_accel.config.fields import flatten
from kd_accel.data.datamodule import DataModule
from kd_accel.data.splits import HeldOutSplit, Split
from kd_accel.errors import UserError
from kd_accel.io.hashing import settings_digest
from kd_accel.losses.targets import TargetFunction
from kd_accel.types import Batch, TeacherOutput


@dataclass(frozen=True)
class StoredValues:
    """Samples of one tensor in their storage type.

    Attributes:
        values: Values, [n, ...].
        scale: Scale per sample and channel, float32 [n, D]; None for the float types.
    """

    values: Tensor
    scale: Tensor | None


class Reader:
    """Random access to the samples of one split of a complete cache.

    Args:
        directory: Directory of the cache.
        cache_spec: Spec of the cache.
        split: Split to read.
        indices: Indices of the samples that the cache covers in this split, int64 [N], ascending.
        tensors: Names of the tensors to read.
    """

    def __init__(
        self, directory: Path, cache_spec: CacheSpec, split: Split, indices: np.ndarray, tensors: Sequence[str]
    ) -> None:
        self._directory, self._cache_spec, self._split = directory, cache_spec, split
        self._tensors = tuple(tensors)
        # Position of each index among the covered samples, -1 if not covered. A table lookup takes a tenth of the time of a
        # binary search.
        self._position = np.full(indices.max(initial=-1) + 1, -1)
        self._position[indices] = np.arange(len(indices))
        self._files: dict[str, _View] = {}
        self._view: int | None = None
        self._checked: set[str] = set()

    def covers(self, indices: np.ndarray) -> bool:
        """Return whether the cache holds all samples with these indices."""
        is_inside = not len(indices) or (indices.min() >= 0 and indices.max() < len(self._position))
        return bool(is_inside and (self._position[indices] >= 0).all())

    def read(self, view: int, indices: np.ndarray, *, pin_memory: bool = False) -> dict[str, StoredValues]:
        """Copy samples into new memory.

        Args:
            view: Number of the view.
            indices: Indices of covered samples, int64 [n].
            pin_memory: Whether the memory is page-locked.

        Returns:
            Samples by the name of the tensor, in host memory.

        Raises:
            UserError: If a file of the view is missing or damaged.
        """
        positions = self._positions(indices)
        self._open(view)
        return {name: self._files[name].read(positions, pin_memory=pin_memory) for name in self._tensors}

    def read_into(self, view: int, indices: np.ndarray, tensor: str, out: Tensor) -> None:
        """Copy samples of one tensor into existing memory.

        Args:
            view: Number of the view.
            indices: Indices of covered samples, int64 [n].
            tensor: Name of the tensor.
            out: Tensor to fill, [n, ...] of the storage type, contiguous, in host memory.

        Raises:
            UserError: If a file of the view is missing or damaged.
        """
        self._open(view)
        self._files[tensor].copy(self._positions(indices), out)

    def _positions(self, indices: np.ndarray) -> np.ndarray:
        positions = self._position.take(indices)
        assert positions.min(initial=0) >= 0, "the cache does not cover all of these samples"
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
        damage = find_damage(self._directory, self._cache_spec, shard, reads_data=False)
        if damage is None:
            file = open_shard(self._directory, self._cache_spec, shard)
            if not reads_data or shard.name in self._checked or is_data_intact(file, self._cache_spec, shard):
                self._checked.add(shard.name)
                return file
            damage = "does not match its checksum"
        raise UserError(
            f"teacher.cache.dir: {self._directory / shard.name} {damage}; run `kd-accel cache build` with the same config, "
            "which writes only missing and damaged files"
        )

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": {}, "_view": None}


class _View:
    """Open files of one tensor and view."""

    def __init__(self, cache_spec: CacheSpec, shards: Sequence[Shard], files: Sequence[memoryview]) -> None:
        spec = cache_spec.tensors[shards[0].tensor]
        self._shape, self._dtype, self._sample_bytes = spec.shape, TORCH_TYPE[spec.dtype], spec.sample_bytes
        self._samples_per_shard = cache_spec.samples_per_shard
        self._values = [file[values_offset(cache_spec, shard) :] for file, shard in zip(files, shards, strict=True)]
        scales = [read_scale(file, cache_spec, shard) for file, shard in zip(files, shards, strict=True)]
        self._scales = torch.stack([scale for scale in scales if scale is not None]) if spec.is_scaled else None

    def read(self, positions: np.ndarray, *, pin_memory: bool) -> StoredValues:
        out = torch.empty((len(positions), *self._shape), dtype=self._dtype, pin_memory=pin_memory)
        self.copy(positions, out)
        scale = None if self._scales is None else self._scales[torch.from_numpy(positions // self._samples_per_shard)]
        return StoredValues(out, scale)

    def copy(self, positions: np.ndarray, out: Tensor) -> None:
        # All files but the last have the same number of samples, and all samples the same number of bytes, so one division
        # gives the file of a sample and the offset in the file. Assigning a slice of one memoryview to another is a memcpy, a
        # few hundred nanoseconds per sample. Gathering with tensor operations would need one pass and one copy per file.
        length, values = self._sample_bytes, self._values
        target = memoryview(out.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        shards, offsets = np.divmod(positions, self._samples_per_shard)
        starts, end = offsets * length, 0
        # Iterating over an array would create a NumPy scalar for each element; lists hold plain integers.
        for shard, start, stop in zip(shards.tolist(), starts.tolist(), (starts + length).tolist(), strict=True):
            begin, end = end, end + length
            target[begin:end] = values[shard][start:stop]


class CachedTeacher:
    """Source of teacher outputs that reads a cache by index and view; the pixels of a batch are not used.

    Args:
        reader: Reader of the split, with the logits among its tensors.
        layers: The teacher's layers to read.
        channels_last: Whether feature maps are returned in the channels_last memory format, as the live teacher computes them.
            The last bits of a sum over a map depend on the format.
    """

    def __init__(self, reader: Reader, layers: Sequence[str], *, channels_last: bool) -> None:
        self._reader, self._layers = reader, tuple(layers)
        self._map_memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, batch: Batch) -> TeacherOutput:
        """Read the outputs for a batch, in float32 on the device of its images; features by the teacher's layer."""
        return self.read(batch.index.numpy(), batch.view, batch.images.device)

    def read(self, indices: np.ndarray, view: int, device: torch.device) -> TeacherOutput:
        """Read the outputs for samples of one view.

        Args:
            indices: Indices of covered samples, int64 [n].
            view: Number of the view.
            device: Device of the result.

        Returns:
            Logits [n, C], and features [n, D, H, W] by the teacher's layer, both float32.
        """
        stored = self._reader.read(view, indices, pin_memory=device.type == "cuda")
        values = {name: decode_on(device, samples, self._map_memory_format) for name, samples in stored.items()}
        return TeacherOutput(values[LOGITS], {layer: values[layer] for layer in self._layers})

    def covers(self, indices: np.ndarray) -> bool:
        """Return whether the cache holds all samples with these indices."""
        return self._reader.covers(indices)

    def ranges(self, batch: Batch) -> dict[str, float]:
        """Return the largest magnitude of each int8 layer in the files of these samples, which decides the rounding error."""
        stored = self._reader.read(batch.view, batch.index.numpy())
        scales = {layer: stored[layer].scale for layer in self._layers}
        return {layer: INT8_LARGEST * scale.max().item() for layer, scale in scales.items() if scale is not None}


@dataclass(frozen=True)
class OpenCache:
    """Cache that has passed the checks of `open_cache`.

    Attributes:
        directory: Directory of the cache.
        cache_spec: Spec of the cache.
        samples: Samples that the cache covers, by split.
        layers: The teacher's layers that are read.
    """

    directory: Path
    cache_spec: CacheSpec
    samples: Mapping[Split, CachedSamples]
    layers: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Digest of all that decides the values read, stored in each checkpoint."""
        specs = {name: self.cache_spec.tensors[name] for name in (LOGITS, *self.layers)}
        tensors = {name: [spec.dtype, spec.target, spec.target_digest] for name, spec in specs.items()}
        return settings_digest({"cache": self.cache_spec.fingerprint, "tensors": tensors})

    def load_targets(self, targets: Mapping[str, TargetFunction]) -> None:
        """Load the fitted tensors of the cache into target functions, in place.

        Args:
            targets: Target functions by the teacher's layer, with the same descriptions as in the cache.

        Raises:
            UserError: If targets.safetensors is missing or damaged.
        """
        stored = read_targets(self.directory, self.cache_spec)
        for layer, target in targets.items():
            target.load(stored[layer].tensors())
            target.explained = stored[layer].explained

    def source(self, split: Split) -> CachedTeacher:
        """Return the source of the teacher's outputs for a split; features are stored for the training split only."""
        layers = self.layers if split == "train" else ()
        reader = Reader(self.directory, self.cache_spec, split, self.samples[split].indices, (LOGITS, *layers))
        return CachedTeacher(reader, layers, channels_last=self.cache_spec.fingerprint_fields["numerics"]["channels_last"])


def open_cache(directory: Path, request: CacheRequest) -> OpenCache:
    """Open a cache and check that it holds what is requested.

    Raises:
        UserError: If the cache differs from the request or lacks a part of it. The message names what differs or is missing,
            and the remedy.
    """
    cache_spec = read_spec(directory)
    check_fingerprint(directory, cache_spec, request)
    samples = read_samples(directory, cache_spec)
    for split, requested in request.samples.items():
        check_samples(directory, split, samples[split], requested)
    files = read_manifest(directory, cache_spec)
    if not files:
        raise UserError(
            f"teacher.cache.dir: the build of the cache in {directory} has not finished (manifest.json is missing); run "
            f"{BUILD_COMMAND}, which resumes the build"
        )
    check_contents(directory, cache_spec, request)
    check_headers(directory, cache_spec, files, splits=request.samples, views=request.views, tensors=request.tensors)
    return OpenCache(directory, cache_spec, samples, tuple(request.targets))


def find_held_out(directory: Path, data: DataModule, split: HeldOutSplit) -> tuple[CachedTeacher | None, list[str]]:
    """Find the stored logits of a held-out split, for data that may be other than those of the build.

    Args:
        directory: Directory of the cache.
        data: Images to evaluate on.
        split: The held-out split.

    Returns:
        (source of the logits, notices). The source is None, and a notice has the reason, if the cache lacks a sample.

    Raises:
        UserError: If the cache is missing, incomplete or damaged.
    """
    cache_spec = read_spec(directory)
    different = differing_fields(*map(_held_out_fields, (cache_spec.fingerprint_fields, data_fields(data))))
    part, samples = data.parts()[split], read_samples(directory, cache_spec)
    requested = CachedSamples(part.samples, part.images.digests(part.samples))
    missing, changed = differing_samples(samples[split], requested)
    if count := len(missing) + len(changed):
        different.append(f"{count} of {len(requested.indices)} {split} samples are not those of the cache")
    if different:
        return None, [
            f"teacher.cache.dir: no agreement, because the cache in {directory} holds other outputs: {'; '.join(different)}"
        ]
    files = read_manifest(directory, cache_spec)
    check_headers(directory, cache_spec, files, splits=[split], views=1, tensors=(LOGITS,))
    return OpenCache(directory, cache_spec, samples, ()).source(split), []


def _held_out_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fingerprint fields on which the outputs of held-out samples depend, apart from the samples themselves."""
    kept = {"data.label_names", "views.image_size"}
    flat = flatten(dict(fields))
    return {name: value for name, value in flat.items() if name in kept or name.startswith("pixels.")}


def decode_on(device: torch.device, stored: StoredValues, map_memory_format: torch.memory_format) -> Tensor:
    """Move samples to a device in their storage type, and decode them on the device.

    Returns:
        Decoded samples, float32 [n, ...]; maps [n, D, H, W] are in the given memory format.
    """
    values = stored.values.to(device, non_blocking=True)
    scale = None if stored.scale is None else stored.scale.to(device, non_blocking=True)
    memory_format = map_memory_format if values.ndim == 4 else torch.contiguous_format
    return decode(values.contiguous(memory_format=memory_format), scale)


def available_bytes() -> int:
    """Return the memory that can be allocated without swapping, page cache included; 0 if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else 0


def _view_bytes(cache_spec: CacheSpec, split: Split, tensors: Sequence[str]) -> int:
    return cache_spec.samples[split] * sum(cache_spec.tensors[name].sample_bytes for name in tensors)
