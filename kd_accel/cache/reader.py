"""Random access to the samples of a cache: memory-mapped files, one copy per sample, no pickle.

A file is opened when its view is first read, in the process that reads, and stays mapped for the next epochs of the view; a
pickled reader opens its own files. Opening a file checks its header. If the view fits in free memory, the first opening also
checks every byte of the data, a pass that loads the file into the page cache in order. Mapped pages belong to the page cache;
memory use is otherwise independent of the size of the cache.

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
    decode,
    find_damage,
    is_data_intact,
    open_shard,
)
from kd_accel.cache.spec import LOGITS, VIEWED_SPLITS, CacheSpec, Shard
from kd_accel.cache.view_files import StoredValues, ViewFiles
from kd_accel.config.fields import flatten
from kd_accel.data.datamodule import DataModule
from kd_accel.data.splits import HeldOutSplit, Split
from kd_accel.data.unlabeled import UNLABELED_OFFSET
from kd_accel.errors import UserError
from kd_accel.io.hashing import settings_digest
from kd_accel.losses.targets import TargetFunction
from kd_accel.types import Batch, TeacherOutput

_MAX_FILES = 1024
"""Number of mapped files from which the next view replaces those before; Linux allows 65,530 mappings per process."""
_CPU = torch.device("cpu")


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
        self._views: dict[int, ViewFiles] = {}
        self._checked: set[str] = set()

    def covers(self, indices: np.ndarray) -> bool:
        """Return whether the cache holds all samples with these indices."""
        is_inside = not len(indices) or (indices.min() >= 0 and indices.max() < len(self._position))
        return bool(is_inside and (self._position[indices] >= 0).all())

    def read(self, view: int, indices: np.ndarray, *, device: torch.device = _CPU) -> dict[str, StoredValues]:
        """Copy samples into new memory.

        Args:
            view: Number of the view.
            indices: Indices of covered samples, int64 [n].
            device: Device of the result.

        Returns:
            Samples by the name of the tensor.

        Raises:
            UserError: If a file of the view is missing or damaged.
        """
        positions = self._position.take(indices)
        assert positions.min(initial=0) >= 0, "the cache does not cover all of these samples"
        return self._open(view).read(positions, device)

    def _open(self, view: int) -> ViewFiles:
        if view in self._views:
            return self._views[view]
        reads_data = _view_bytes(self._cache_spec, self._split, self._tensors) < available_bytes()
        files = {}
        for name in self._tensors:
            shards = self._cache_spec.shards(self._split, view, name)
            files[name] = [(shard, self._open_shard(shard, reads_data=reads_data)) for shard in shards]
        # The first access to a page of a new mapping is a page fault, about a quarter of the time of an epoch's reads.
        if sum(map(len, files.values())) * (len(self._views) + 1) > _MAX_FILES:
            self._views.clear()
        self._views[view] = ViewFiles(self._cache_spec, files)
        return self._views[view]

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
        return {**self.__dict__, "_views": {}}


class JoinedReader:
    """Random access to the labeled and the unlabeled training samples of a cache, by their indices in a training.

    Args:
        labeled: Reader of the split train.
        unlabeled: Reader of the split unlabeled.
    """

    def __init__(self, labeled: Reader, unlabeled: Reader) -> None:
        self._labeled, self._unlabeled = labeled, unlabeled

    def covers(self, indices: np.ndarray) -> bool:
        """Return whether the cache holds all samples with these indices."""
        is_unlabeled = indices >= UNLABELED_OFFSET
        own = indices[is_unlabeled] - UNLABELED_OFFSET
        return self._labeled.covers(indices[~is_unlabeled]) and self._unlabeled.covers(own)

    def read(self, view: int, indices: np.ndarray, *, device: torch.device = _CPU) -> dict[str, StoredValues]:
        """Copy samples into new memory; see `Reader.read`. Samples of both splits are in host memory."""
        is_unlabeled = indices >= UNLABELED_OFFSET
        if not is_unlabeled.any():
            return self._labeled.read(view, indices, device=device)
        own = indices[is_unlabeled] - UNLABELED_OFFSET
        if is_unlabeled.all():
            return self._unlabeled.read(view, own, device=device)
        labeled, unlabeled = self._labeled.read(view, indices[~is_unlabeled]), self._unlabeled.read(view, own)
        # Position of each sample of the batch among the labeled samples, then the unlabeled ones.
        order = torch.from_numpy(np.argsort(np.argsort(is_unlabeled, kind="stable")))
        is_pinned = device.type == "cuda"
        return {name: labeled[name].joined(unlabeled[name], order, pin_memory=is_pinned) for name in labeled}


class CachedTeacher:
    """Source of teacher outputs that reads a cache by index and view; the pixels of a batch are not used.

    Args:
        reader: Reader of the samples, with the logits among its tensors.
        layers: The teacher's layers to read.
        channels_last: Whether feature maps are returned in the channels_last memory format, as the live teacher computes them.
            The last bits of a sum over a map depend on the format.
    """

    def __init__(self, reader: Reader | JoinedReader, layers: Sequence[str], *, channels_last: bool) -> None:
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
        stored = self._reader.read(view, indices, device=device)
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
        """Return the source of the teacher's outputs for a split, with features unless it is a held-out split.

        The source of `train` also has the unlabeled samples, by their indices in a training.
        """
        layers = self.layers if split in VIEWED_SPLITS else ()
        reader: Reader | JoinedReader = self._reader(split, layers)
        if split == "train" and "unlabeled" in self.samples:
            reader = JoinedReader(self._reader(split, layers), self._reader("unlabeled", layers))
        return CachedTeacher(reader, layers, channels_last=self.cache_spec.fingerprint_fields["numerics"]["channels_last"])

    def _reader(self, split: Split, layers: Sequence[str]) -> Reader:
        return Reader(self.directory, self.cache_spec, split, self.samples[split].indices, (LOGITS, *layers))


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
    # The last bits of a matrix product on a CPU may depend on the alignment of the memory, which a copy ensures.
    return decode(values.to(torch.float32, memory_format=memory_format, copy=device.type == "cpu"), scale)


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
