"""Checks of a cache against what a training or a build requests: fingerprint, samples, tensors, views, headers of all files.

A request may be for less than the cache holds. A cache that differs is refused by field, with the stored and the requested
value and the command that rebuilds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from kd_accel.cache.manifest import CachedSamples
from kd_accel.cache.shard import find_damage
from kd_accel.cache.spec import LOGITS, CacheSpec
from kd_accel.config.fields import flatten
from kd_accel.config.schema import Precision, StorageType
from kd_accel.data.datamodule import DataModule
from kd_accel.data.splits import Split
from kd_accel.errors import UserError
from kd_accel.io.hashing import tensors_digest
from kd_accel.losses.targets import TargetFunction
from kd_accel.models.inference import CpuKernels
from kd_accel.teacher.teacher import Teacher

BUILD_COMMAND = "`kd-accel cache build` with this config"
_LISTED = 5
_MEMORY_FORMAT = "numerics.channels_last"
_CONTENTS = "data.contents."


@dataclass(frozen=True)
class CacheRequest:
    """What a training or a build requests of a cache.

    Attributes:
        fingerprint_fields: Teacher, numerics, data and views, without the digests of the samples.
        samples: Samples of each split.
        views: Number of views of the training split, from view 0 on.
        targets: Target functions by the teacher's layer, fitted or not; `Identity` requests the raw map.
        dtype: Storage type; None accepts the stored one.
        any_memory_format: Whether another memory format of the teacher's maps is accepted, as a cache of another kind of device
            has it.
    """

    fingerprint_fields: Mapping[str, Any]
    samples: Mapping[Split, CachedSamples]
    views: int
    targets: Mapping[str, TargetFunction]
    dtype: StorageType | None = None
    any_memory_format: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the requested tensors: the logits and the layers."""
        return (LOGITS, *self.targets)


def create_request(  # noqa: PLR0913  (everything that decides the stored values)
    teacher: Teacher,
    data: DataModule,
    targets: Mapping[str, TargetFunction],
    *,
    device: torch.device,
    views: int,
    dtype: StorageType | None = None,
    precision: Precision = "float32",
    channels_last: bool | None = None,
    compiled: bool = False,
    tf32: bool = True,
    cpu_kernels: CpuKernels = "auto",
) -> CacheRequest:
    """Create the request for the outputs of a teacher.

    Args:
        teacher: The teacher.
        data: Images and splits.
        targets: Target functions by the teacher's layer; empty for logits only.
        device: Device of the teacher.
        views: Number of views of the training split, from view 0 on.
        dtype: Storage type; None accepts the stored one.
        precision: Precision of the teacher's forward.
        channels_last: Memory format of the teacher's maps; None = decided by the device, and any is accepted.
        compiled: Whether the teacher is compiled.
        tf32: Whether TF32 is allowed on GPUs.
        cpu_kernels: Kernels of the teacher: auto, always or never.

    Raises:
        UserError: A layer cannot be stored under its name.
    """
    if LOGITS in targets:
        raise UserError(
            f"distill.features: the teacher's layer {LOGITS} cannot be cached: a cache stores the logits under that name; "
            "compare a module inside it, or use teacher.outputs live or mixed"
        )
    numerics = teacher.numerics(
        device,
        layers=targets,
        image_size=data.transform.image_size,
        precision=precision,
        channels_last=channels_last,
        compiled=compiled,
        tf32=tf32,
        cpu_kernels=cpu_kernels,
    )
    fields = {"teacher": teacher.fingerprint_fields(), "numerics": numerics, **data_fields(data)}
    return CacheRequest(fields, covered_samples(data), views, targets, dtype, any_memory_format=channels_last is None)


def data_fields(data: DataModule) -> dict[str, Any]:
    """Return the fingerprint fields of data and views, without the digests of the samples."""
    classes = list(data.label_names)
    sizes = {"train_size": data.train.num_samples, "test_size": data.test.num_samples}
    return {"data": {"label_names": classes, **sizes}, "views": data.transform.fingerprint_fields()}


def covered_samples(data: DataModule) -> dict[Split, CachedSamples]:
    """Return the samples of each split with the digests of their contents."""
    return {split: CachedSamples(indices, digests) for split, (indices, digests) in data.covered_samples().items()}


def check_fingerprint(directory: Path, cache_spec: CacheSpec, request: CacheRequest) -> None:
    """Check what no addition to a cache can change: teacher, numerics, data, views, target functions and storage types.

    Raises:
        UserError: A field differs.
    """
    different = differing_fields(cache_spec, request.fingerprint_fields, any_memory_format=request.any_memory_format)
    different += _differing_tensors(cache_spec, request)
    if different:
        raise UserError(
            f"teacher.cache.dir: {directory} is a cache of something else: {'; '.join(different)}. Set another "
            f"teacher.cache.dir and run {BUILD_COMMAND}, or remove that directory first; or change these fields back"
        )


def differing_fields(cache_spec: CacheSpec, fields: Mapping[str, Any], *, any_memory_format: bool = False) -> list[str]:
    """Compare the stored fingerprint fields, apart from the samples' digests, with others.

    Returns:
        `FIELD: VALUE stored, VALUE requested` for each difference.
    """
    stored, requested = (
        {key: value for key, value in flatten(dict(each)).items() if not key.startswith(_CONTENTS)}
        for each in (cache_spec.fingerprint_fields, fields)
    )
    return [
        f"{key}: {_shorten(stored.get(key))} stored, {_shorten(requested.get(key))} requested"
        for key in {**stored, **requested}
        if stored.get(key) != requested.get(key) and not (key == _MEMORY_FORMAT and any_memory_format)
    ]


def _differing_tensors(cache_spec: CacheSpec, request: CacheRequest) -> list[str]:
    different = []
    for layer, target in request.targets.items():
        spec = cache_spec.tensors.get(layer)
        if spec is None:
            continue
        if spec.target != target.description():
            stored, requested = describe_target(spec.target or {}), describe_target(target.description())
            different.append(f"targets.{layer}: {stored} stored, {requested} requested")
        elif target.tensors() and (digest := tensors_digest(target.tensors())) != spec.target_digest:
            different.append(f"targets.{layer}: fitted tensors {spec.target_digest} stored, {digest} requested")
    for name in request.tensors if request.dtype is not None else ():
        stored_dtype = cache_spec.tensors[name].dtype if name in cache_spec.tensors else None
        requested_dtype = storage_type(request.dtype, is_logits=name == LOGITS)
        if stored_dtype not in (None, requested_dtype):
            different.append(f"teacher.cache.dtype: {name} is {stored_dtype} stored, {requested_dtype} requested")
    return different


def describe_target(description: Mapping[str, Any]) -> str:
    """Format the description of a target function, as `pca(channels=8, images=64)`."""
    settings = ", ".join(f"{key}={value}" for key, value in description.items() if key != "name")
    return f"{description.get('name')}({settings})" if settings else str(description.get("name"))


def storage_type(dtype: Any, *, is_logits: bool) -> Any:
    """Return the storage type of a tensor in a cache of the given type: logits are never int8."""
    return "float16" if is_logits and dtype == "int8" else dtype


def check_samples(directory: Path, split: Split, stored: CachedSamples, requested: CachedSamples) -> None:
    """Check that a cache covers samples, with the same images and labels.

    Raises:
        UserError: Samples are missing, or have other contents.
    """
    missing, changed = differing_samples(stored, requested)
    if len(changed):
        raise UserError(
            f"teacher.cache.dir: {directory} was built from other data: data.contents.{split}: {len(changed)} of "
            f"{len(requested.indices)} requested samples have another image or label than the stored samples (samples "
            f"{_listed(changed)}). Restore the data, or set another teacher.cache.dir and run {BUILD_COMMAND}"
        )
    if len(missing):
        raise UserError(
            f"teacher.cache.dir: {directory} lacks {len(missing)} of {len(requested.indices)} requested {split} samples "
            f"(samples {_listed(missing)}); it was built with another data.limit_train, data.limit_test or data.val_fraction. "
            f"Set another teacher.cache.dir and run {BUILD_COMMAND}"
        )


def differing_samples(stored: CachedSamples, requested: CachedSamples) -> tuple[np.ndarray, np.ndarray]:
    """Compare samples by index and digest.

    Returns:
        (indices that are not stored, stored indices with another digest).
    """
    at = np.searchsorted(stored.indices, requested.indices)
    inside = np.minimum(at, max(0, len(stored.indices) - 1))
    is_stored = (
        stored.indices[inside] == requested.indices if len(stored.indices) else np.zeros(len(requested.indices), dtype=bool)
    )
    is_changed = is_stored.copy()
    is_changed[is_stored] = stored.digests[inside[is_stored]] != requested.digests[is_stored]
    return requested.indices[~is_stored], requested.indices[is_changed]


def check_contents(directory: Path, cache_spec: CacheSpec, request: CacheRequest) -> None:
    """Check that the spec has all requested tensors and views.

    Raises:
        UserError: Some are missing; a build adds them.
    """
    missing = [f"tensor {name}" for name in request.tensors if name not in cache_spec.tensors]
    if cache_spec.views < request.views:
        numbers = f"data.views: {cache_spec.views} stored, {request.views} requested"
        missing.append(f"views {cache_spec.views} to {request.views - 1} ({numbers})")
    if missing:
        _refuse(directory, "lacks", missing)


def check_headers(
    directory: Path,
    cache_spec: CacheSpec,
    files: Mapping[str, str],
    *,
    splits: Iterable[Split],
    views: int,
    tensors: Sequence[str],
) -> None:
    """Check that files are listed in the manifest, and their headers and lengths; the data is checked when it is read.

    Args:
        directory: Directory of the cache.
        cache_spec: Its spec.
        files: Checksums by name, of the manifest.
        splits: Splits to check.
        views: Number of views of the training split to check.
        tensors: Tensors of the training split to check.

    Raises:
        UserError: A file is missing or damaged.
    """
    shards = [
        shard
        for split in splits
        for view in range(views if split == "train" else 1)
        for name in (tensors if split == "train" else (LOGITS,))
        for shard in cache_spec.shards(split, view, name)
    ]
    unlisted = [shard.name for shard in shards if shard.name not in files]
    if unlisted:
        _refuse(directory, "lacks", [f"{len(unlisted)} files that no build has completed, such as {unlisted[0]}"])
    damages = {
        shard.name: find_damage(directory, cache_spec, shard, checksum=files[shard.name], reads_data=False) for shard in shards
    }
    wrong = [f"{name} {damage}" for name, damage in damages.items() if damage is not None]
    if wrong:
        _refuse(directory, f"has {len(wrong)} damaged files:", wrong[:_LISTED])


def _refuse(directory: Path, verb: str, problems: Sequence[str]) -> NoReturn:
    raise UserError(
        f"teacher.cache.dir: {directory} {verb} {'; '.join(problems)}. Run {BUILD_COMMAND}: it writes only what is missing or "
        "damaged"
    )


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listed(indices: np.ndarray) -> str:
    shown = ", ".join(str(index) for index in indices[:_LISTED].tolist())
    return f"{shown}, ..." if len(indices) > _LISTED else shown
