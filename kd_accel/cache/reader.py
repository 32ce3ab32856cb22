"""Random access to the samples of a cache: memory-mapped files, one copy per sample, no pickle.

A file is opened when its view is first read, in the process that reads, and stays mapped for the next epochs of the view; a
pickled reader opens its own files. Opening a file checks its header. If the view fits in free memory, the first opening also
checks every byte of the data, a pass that loads the file into the page cache in order. Mapped pages belong to the page cache;
memory use is otherwise independent of the size of the cache.

`open_cache` checks a cache against a request. `CachedTeacher` is a source of teacher outputs, interchangeable with a live
teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from kd_accel.cache.device_view import DeviceView
from kd_accel.cache.differences import differing_fields
from kd_accel.cache.manifest import CachedSamples, read_manifest, read_samples, read_spec, read_targets
from kd_accel.cache.rows import RowFormat, StoredValues
from kd_accel.cache.shard import (
    INT8_LARGEST,
    decode,
    find_damage,
    is_data_intact,
    open_shard,
)
from kd_accel.cache.spec import LOGITS, VIEWED_SPLITS, CacheSpec, Shard
from kd_accel.cache.view_files import PositionTable, ViewFiles
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
_Place = tuple[int, torch.device]
"""Number of a view, and the device for which it is read."""


class Reader:
    """Random access to the samples of one split of a complete cache, and to its unlabeled samples.

    Args:
        directory: Directory of the cache.
        cache_spec: Spec of the cache.
        split: Split to read.
        indices: Indices of the samples that the cache covers in this split, int64 [N], ascending.
        tensors: Names of the tensors to read.
        unlabeled: Indices of the samples of the split unlabeled that are read too, int64 [M], ascending; `UNLABELED_OFFSET` is
            added to them in a training. None = none of them.
        keeps: Function (bytes, device) -> bool that decides if a view is kept in the memory of the device from its first read.
            None = the files of each view are read in each step.
    """

    def __init__(
        self,
        directory: Path,
        cache_spec: CacheSpec,
        split: Split,
        indices: np.ndarray,
        tensors: Sequence[str],
        *,
        unlabeled: np.ndarray | None = None,
        keeps: Callable[[int, torch.device], bool] | None = None,
    ) -> None:
        self._directory, self._cache_spec, self._keeps = directory, cache_spec, keeps
        self._format = RowFormat({name: cache_spec.tensors[name] for name in tensors})
        self._splits: tuple[Split, ...] = (split,)
        self._tables = [PositionTable(indices)]
        if unlabeled is not None:
            self._splits = (split, "unlabeled")
            # The files of both splits in one sequence: a position counts each file before as a complete one.
            first = len(cache_spec.shards(split, 0, LOGITS)) * cache_spec.samples_per_shard
            self._tables.append(PositionTable(unlabeled, first_index=UNLABELED_OFFSET, first_position=first))
        self._files: dict[_Place, ViewFiles] = {}
        self._kept: dict[_Place, DeviceView] = {}
        self._checked: set[str] = set()

    def covers(self, indices: np.ndarray) -> bool:
        """Return whether the cache holds all samples with these indices."""
        return bool((self._positions(indices) >= 0).all())

    def fetch(self, view: int, indices: np.ndarray, device: torch.device) -> tuple[Tensor, ...]:
        """Copy samples into new memory of a device, in their storage types.

        Args:
            view: Number of the view.
            indices: Indices of covered samples, int64 [n].
            device: Device of the result.

        Returns:
            Input of `split`, whose shapes and types depend on n alone.

        Raises:
            UserError: If a file of the view is missing or damaged.
        """
        positions, place = self._positions(indices), (view, device)
        assert positions.min(initial=0) >= 0, "the cache does not cover all of these samples"
        return (self._kept.get(place) or self._files.get(place) or self._open(*place)).fetch(positions)

    def split(self, fetched: tuple[Tensor, ...]) -> dict[str, StoredValues]:
        """Return what `fetch` has read, by the name of the tensor."""
        return self._format.split(*fetched)

    def read(self, view: int, indices: np.ndarray) -> dict[str, StoredValues]:
        """Copy samples into new host memory; see `fetch`.

        Returns:
            Samples by the name of the tensor.
        """
        return self.split(self.fetch(view, indices, _CPU))

    def _positions(self, indices: np.ndarray) -> np.ndarray:
        """Return the position of each sample in the files of a view, int64 [n]; -1 for one that is not covered."""
        first, *others = (table.look_up(indices) for table in self._tables)
        return np.maximum(first, others[0]) if others else first

    def _open(self, view: int, device: torch.device) -> ViewFiles | DeviceView:
        """Open the files of a view and check them, and copy them to the device if the view is kept."""
        samples = sum(self._cache_spec.samples[split] for split in self._splits)
        reads_data = samples * sum(self._format.sample_bytes.values()) < available_bytes()
        files = {}
        for name in self._format.sample_bytes:
            shards = [shard for split in self._splits for shard in self._cache_spec.shards(split, view, name)]
            files[name] = [(shard, self._open_shard(shard, reads_data=reads_data)) for shard in shards]
        opened = ViewFiles(self._cache_spec, files, self._format, device)
        if self._keeps is not None and self._keeps(opened.matrix_bytes, device):
            self._kept[view, device] = DeviceView(opened)
            return self._kept[view, device]
        # The first access to a page of a new mapping is a page fault, about a quarter of the time of an epoch's reads.
        if sum(map(len, files.values())) * (len(self._files) + 1) > _MAX_FILES:
            self._files.clear()
        self._files[view, device] = opened
        return opened

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
        return {**self.__dict__, "_files": {}, "_kept": {}}


class CachedTeacher:
    """Source of teacher outputs that reads a cache by index and view; the pixels of a batch are not used.

    It is a `StagedTeacher`: files and host memory are read in `fetch` alone.

    Args:
        reader: Reader of the samples, with the logits among its tensors.
        layers: The teacher's layers to read.
        channels_last: Whether feature maps are returned in the channels_last memory format, as the live teacher computes them.
            The last bits of a sum over a map depend on the format.
    """

    def __init__(self, reader: Reader, layers: Sequence[str], *, channels_last: bool) -> None:
        self._reader, self._layers = reader, tuple(layers)
        self._map_memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, batch: Batch) -> TeacherOutput:
        """Read the outputs for a batch, in float32 on the device of its images; features by the teacher's layer."""
        return self.finish(batch, self.fetch(batch))

    def fetch(self, batch: Batch) -> tuple[Tensor, ...]:
        """Copy the stored outputs for a batch to the device of its images; see `Reader.fetch`."""
        return self._reader.fetch(batch.view, batch.index.numpy(), batch.images.device)

    def finish(self, batch: Batch, fetched: tuple[Tensor, ...]) -> TeacherOutput:
        """Decode on the device what `fetch` has returned for the batch; see `read` for the result."""
        return self._decoded(batch.images.device, fetched)

    def read(self, indices: np.ndarray, view: int, device: torch.device) -> TeacherOutput:
        """Read the outputs for samples of one view.

        Args:
            indices: Indices of covered samples, int64 [n].
            view: Number of the view.
            device: Device of the result.

        Returns:
            Logits [n, C], and features [n, D, H, W] by the teacher's layer, both float32.
        """
        return self._decoded(device, self._reader.fetch(view, indices, device))

    def covers(self, indices: np.ndarray) -> bool:
        """Return whether the cache holds all samples with these indices."""
        return self._reader.covers(indices)

    def ranges(self, batch: Batch) -> dict[str, float]:
        """Return the largest magnitude of each int8 layer in the files of these samples, which decides the rounding error."""
        stored = self._reader.read(batch.view, batch.index.numpy())
        scales = {layer: stored[layer].scale for layer in self._layers}
        return {layer: INT8_LARGEST * scale.max().item() for layer, scale in scales.items() if scale is not None}

    def _decoded(self, device: torch.device, fetched: tuple[Tensor, ...]) -> TeacherOutput:
        stored = self._reader.split(fetched)
        values = {name: decode_on(device, samples, self._map_memory_format) for name, samples in stored.items()}
        return TeacherOutput(values[LOGITS], {layer: values[layer] for layer in self._layers})


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
        """Digest of all that decides the values read, and the batch size of the build, stored in each checkpoint."""
        specs = {name: self.cache_spec.tensors[name] for name in (LOGITS, *self.layers)}
        tensors = {name: [spec.dtype, spec.target, spec.target_digest] for name, spec in specs.items()}
        # The last bits of an output depend on the number of images in a forward.
        return f"{settings_digest({'cache': self.cache_spec.fingerprint, 'tensors': tensors})}-{self.cache_spec.batch_samples}"

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

    def source(self, split: Split, *, keeps_views: bool = False) -> CachedTeacher:
        """Return the source of the teacher's outputs for a split, with features unless it is a held-out split.

        The source of `train` also has the unlabeled samples, by their indices in a training.

        Args:
            split: Split to read.
            keeps_views: Whether views read for a GPU stay in its memory, as many as fit in half of what is free at first.
        """
        layers = self.layers if split in VIEWED_SPLITS else ()
        unlabeled = self.samples.get("unlabeled") if split == "train" else None
        reader = Reader(
            self.directory,
            self.cache_spec,
            split,
            self.samples[split].indices,
            (LOGITS, *layers),
            unlabeled=None if unlabeled is None else unlabeled.indices,
            keeps=_GpuBudget() if keeps_views else None,
        )
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
    # A split that the cache has in addition is neither checked nor read.
    own = {split: samples[split] for split in request.samples}
    return OpenCache(directory, cache_spec, own, tuple(request.targets))


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
    # Without a copy, float32 values would stay slices of their rows. The last bits of a matrix product on a CPU may also depend
    # on the alignment of the memory, which a copy ensures.
    return decode(values.to(torch.float32, memory_format=memory_format, copy=True), scale)


def available_bytes() -> int:
    """Return the memory that can be allocated without swapping, page cache included; 0 if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else 0


class _GpuBudget:
    """Decision if a view is kept on a GPU: all kept views fit in half of the memory that was free before the first of them."""

    def __init__(self) -> None:
        self._left_bytes: int | None = None

    def __call__(self, needed_bytes: int, device: torch.device) -> bool:
        if device.type != "cuda":
            return False
        if self._left_bytes is None:
            self._left_bytes = torch.cuda.mem_get_info(device)[0] // 2
        is_kept = needed_bytes <= self._left_bytes
        self._left_bytes -= needed_bytes if is_kept else 0
        return is_kept
