"""A teacher that answers from its cache, with the same type of signals as the live one; the training step cannot tell.

Opening is where every doubt is settled: another identity, other samples, tensors or views that are not there. What is asked for
may be less than the cache holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from kd_accel.cache.codec import INT8_LARGEST, RELATIVE_ERROR, decode
from kd_accel.cache.manifest import CachedSamples, read_manifest, read_samples, read_spec
from kd_accel.cache.reader import Reader, StoredValues
from kd_accel.cache.shard import damage
from kd_accel.cache.spec import LOGITS, CacheSpec, Split
from kd_accel.config.parsing import flatten
from kd_accel.errors import UserError
from kd_accel.io.hashing import settings_digest
from kd_accel.types import Batch, TeacherOutput

_BUILD = "`kd-accel cache build` with this config"
_LISTED = 5
_MEMORY_FORMAT = "numeric.channels_last"


@dataclass(frozen=True)
class CacheRequest:
    """What a run asks of a cache.

    identity: of the teacher, its numerics, the data and the views, without the contents of the samples. samples: by split.
    layers: {student layer: teacher layer}. projected: channels by teacher layer where its features are to be projected by a frozen
    PCA; the others are to be raw. pca_images: on how many images such a PCA is fitted. dtype: None = whatever is stored.
    any_layout: the memory layout was left to the device, so a cache that another kind of device made will do.
    """

    fingerprint_fields: Mapping[str, Any]
    samples: Mapping[Split, CachedSamples]
    views: int
    layers: Mapping[str, str]
    projected: Mapping[str, int]
    pca_images: int | None = None
    dtype: str | None = None
    any_memory_format: bool = False


@dataclass(frozen=True)
class OpenCache:
    """A cache that holds what is wanted. samples: what it covers."""

    directory: Path
    cache_spec: CacheSpec
    samples: dict[Split, CachedSamples]
    layers: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Of all that decides what is read: kept in each checkpoint."""
        tensors = {name: [spec.dtype, spec.projector] for name, spec in self.cache_spec.tensors.items() if self._is_used(name)}
        return settings_digest({"cache": self.cache_spec.digest, "tensors": tensors})

    def _is_used(self, name: str) -> bool:
        return name == LOGITS or name in self.layers.values()

    def source(self, split: Split) -> CachedTeacher:
        """Answers for the samples of a split: with features for the training samples."""
        layers = self.layers if split == "train" else {}
        tensors = (LOGITS, *dict.fromkeys(layers.values()))
        reader = Reader(self.directory, self.cache_spec, split, self.samples[split].samples, tensors)
        return CachedTeacher(reader, layers, channels_last=self.cache_spec.fingerprint_fields["numeric"]["channels_last"])


class CachedTeacher:
    """Answers for a batch by its samples and view; the pixels are not looked at."""

    def __init__(self, reader: Reader, layers: Mapping[str, str], *, channels_last: bool) -> None:
        """channels_last: the memory layout of the features, which is the live teacher's: sums depend on it bit for bit."""
        self._reader, self._layers = reader, dict(layers)
        self._map_memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, batch: Batch) -> TeacherOutput:
        """Signals on the device of the images, float32."""
        device = batch.images.device
        stored = self._reader.read(batch.view, batch.samples.numpy(), pin_memory=device.type == "cuda")
        values = {name: decoded_on(device, samples, self._map_memory_format) for name, samples in stored.items()}
        return TeacherOutput(values[LOGITS], {layer: values[name] for layer, name in self._layers.items()})

    def ranges(self, batch: Batch) -> dict[str, float]:
        """By student layer: the largest magnitude in the files of these samples, where it decides how coarse the values are."""
        stored = self._reader.read(batch.view, batch.samples.numpy())
        scales = {layer: stored[name].scale for layer, name in self._layers.items()}
        return {layer: INT8_LARGEST * scale.max().item() for layer, scale in scales.items() if scale is not None}


def decoded_on(device: torch.device, stored: StoredValues, map_memory_format: torch.memory_format) -> Tensor:
    """float32 [n, ...] on the device: moved as it is kept, decoded there."""
    values = stored.values.to(device, non_blocking=True)
    scale = None if stored.scale is None else stored.scale.to(device, non_blocking=True)
    memory_format = map_memory_format if values.ndim == 4 else torch.contiguous_format
    return decode(values.contiguous(memory_format=memory_format), scale)


def open_cache(directory: Path, request: CacheRequest) -> OpenCache:
    """Raises UserError that names each field in which the cache differs, or what it lacks, and the remedy."""
    cache_spec = read_spec(directory)
    refuse_other_fingerprint(directory, cache_spec, request)
    samples = read_samples(directory, cache_spec)
    for split, own in request.samples.items():
        refuse_other_samples(directory, split, samples[split], own)
    files = read_manifest(directory, cache_spec)
    if not files:
        raise UserError(f"teacher.cache_dir: the build of {directory} has not ended; run {_BUILD}, which goes on with it")
    refuse_lacking(directory, cache_spec, request)
    _refuse_missing(directory, cache_spec, files, request)
    return OpenCache(directory, cache_spec, samples, request.layers)


def refuse_other_fingerprint(directory: Path, cache_spec: CacheSpec, request: CacheRequest) -> None:
    """What can never be mended by adding to the cache: another teacher, other numerics, data, views, projectors or types."""
    stored = {
        key: value for key, value in flatten(cache_spec.fingerprint_fields).items() if not key.startswith("data.contents.")
    }
    own = flatten(dict(request.fingerprint_fields))
    different = [
        f"{key}: {_short(stored.get(key))} stored, {_short(own.get(key))} wanted"
        for key in {**stored, **own}
        if stored.get(key) != own.get(key) and not (key == _MEMORY_FORMAT and request.any_memory_format)
    ]
    different += _other_tensors(cache_spec, request)
    if different:
        raise UserError(
            f"teacher.cache_dir: {directory} is a cache of something else: {'; '.join(different)}. Name another cache_dir and "
            f"run {_BUILD}, or remove that directory first; or set these fields back"
        )


def requested_tensors(request: CacheRequest) -> Sequence[str]:
    return (LOGITS, *dict.fromkeys(request.layers.values()))


def differing_samples(stored: CachedSamples, request: CachedSamples) -> tuple[np.ndarray, np.ndarray]:
    """(wanted samples that are not covered, covered ones with another content)."""
    at = np.searchsorted(stored.samples, request.samples)
    inside = np.minimum(at, max(0, len(stored.samples) - 1))
    is_there = stored.samples[inside] == request.samples if len(stored.samples) else np.zeros(len(request.samples), bool)
    missing = request.samples[~is_there]
    is_other = is_there.copy()
    is_other[is_there] = stored.contents[inside[is_there]] != request.contents[is_there]
    return missing, request.samples[is_other]


def largest_difference(cached: TeacherOutput, live: TeacherOutput, ranges: Mapping[str, float]) -> tuple[str, float]:
    """(tensor, largest difference relative to the largest magnitude of the live tensor), of the tensor where that is worst.

    ranges: larger magnitudes to take instead, by layer. The difference from what is not a number is infinite.
    """
    assert cached.logits is not None and live.logits is not None
    pairs = {LOGITS: (cached.logits, live.logits)}
    pairs |= {layer: (feature, live.features[layer]) for layer, feature in cached.features.items()}
    differences = {name: _relative(stored, fresh.float(), ranges.get(name, 0.0)) for name, (stored, fresh) in pairs.items()}
    worst = max(differences, key=lambda name: differences[name])
    return worst, differences[worst]


def tolerance(dtype: str, precision: str) -> float:
    """What `largest_difference` may be when the teacher answers again, in another batch shape, perhaps on another device."""
    return 2 * RELATIVE_ERROR[dtype] + {"no": 5e-3, "fp16": 2e-2, "bf16": 6e-2}[precision]


def _relative(stored: Tensor, fresh: Tensor, largest: float) -> float:
    if stored.shape != fresh.shape:
        return math.inf
    relative = (stored - fresh).abs().max() / fresh.abs().max().clamp(min=max(largest, 1e-12))
    return relative.nan_to_num(nan=math.inf).item()


def _other_tensors(cache_spec: CacheSpec, request: CacheRequest) -> list[str]:
    different = []
    for layer in dict.fromkeys(request.layers.values()):
        spec = cache_spec.tensors.get(layer)
        if spec is None:
            continue
        channels = request.projected.get(layer)
        stored_channels = spec.shape[0] if spec.projector else None
        if channels != stored_channels:
            different.append(f"projectors.{layer}: {_kind(stored_channels)} stored, {_kind(channels)} wanted")
        elif channels is not None and spec.pca_images != request.pca_images:
            different.append(f"distill.feature.pca_images: {spec.pca_images} stored, {request.pca_images} wanted")
    names = [name for name in requested_tensors(request) if name in cache_spec.tensors]
    for name in names if request.dtype is not None else []:
        own = stored_type(request.dtype, is_logits=name == LOGITS)
        if cache_spec.tensors[name].dtype != own:
            different.append(f"teacher.dtype: {name} is {cache_spec.tensors[name].dtype} stored, {own} wanted")
    return list(dict.fromkeys(different))


def stored_type(dtype: Any, *, is_logits: bool) -> Any:
    """Of a tensor in a cache of that type: logits are never int8."""
    return "float16" if is_logits and dtype == "int8" else dtype


def _kind(channels: int | None) -> str:
    return "raw features" if channels is None else f"a PCA to {channels} channels"


def refuse_other_samples(directory: Path, split: Split, stored: CachedSamples, request: CachedSamples) -> None:
    missing, other = differing_samples(stored, request)
    if len(other):
        raise UserError(
            f"teacher.cache_dir: {directory} was built from other data: data.contents.{split}: {len(other)} of "
            f"{len(request.samples)} wanted samples have another image or label than the stored ones (samples {_listed(other)}). "
            f"Bring the data back, or name another cache_dir and run {_BUILD}"
        )
    if len(missing):
        raise UserError(
            f"teacher.cache_dir: {directory} lacks {len(missing)} of {len(request.samples)} wanted {split} samples (samples "
            f"{_listed(missing)}); it was built with other data.limit_train, data.limit_test or data.val_fraction. Name "
            f"another cache_dir and run {_BUILD}"
        )


def refuse_lacking(directory: Path, cache_spec: CacheSpec, request: CacheRequest) -> None:
    """Tensors and views that the plan does not have."""
    lacking = [f"tensor {name}" for name in requested_tensors(request) if name not in cache_spec.tensors]
    if cache_spec.views < request.views:
        lacking.append(
            f"views {cache_spec.views} to {request.views - 1} (data.views: {cache_spec.views} stored, {request.views} wanted)"
        )
    if lacking:
        _refuse(directory, "lacks", lacking)


def _refuse_missing(directory: Path, cache_spec: CacheSpec, files: Mapping[str, str], request: CacheRequest) -> None:
    """Files of the plan that are not there, not finished, or by their header not the ones that were built."""
    shards = [
        shard
        for split in request.samples
        for view in range(request.views if split == "train" else 1)
        for name in (requested_tensors(request) if split == "train" else (LOGITS,))
        for shard in cache_spec.shards(split, view, name)
    ]
    unlisted = [shard.name for shard in shards if shard.name not in files]
    if unlisted:
        _refuse(directory, "lacks", [f"{len(unlisted)} files that no build has finished, such as {unlisted[0]}"])
    found = {shard.name: damage(directory, cache_spec, shard, checksum=files[shard.name], reads_data=False) for shard in shards}
    wrong = [f"{name} {reason}" for name, reason in found.items() if reason is not None]
    if wrong:
        _refuse(directory, f"has {len(wrong)} wrong files:", wrong[:_LISTED])


def _refuse(directory: Path, verb: str, lacking: Sequence[str]) -> NoReturn:
    raise UserError(
        f"teacher.cache_dir: {directory} {verb} {'; '.join(lacking)}. Run {_BUILD}: it writes just what is missing or wrong"
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listed(samples: np.ndarray) -> str:
    shown = ", ".join(str(sample) for sample in samples[:_LISTED].tolist())
    return f"{shown}, ..." if len(samples) > _LISTED else shown
