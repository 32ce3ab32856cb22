"""Checks of a cache against what a training or a build requests: fingerprint, samples, tensors, views, headers of all files.

A request may be for less than the cache holds. A refusal names each setting that differs, with its value in the cache and its
value now, and the command that builds the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from kd_accel.cache.differences import (
    TargetSettings,
    differing_fields,
    differing_targets,
    differing_types,
    settings_of_contents,
    settings_of_samples,
)
from kd_accel.cache.manifest import CachedSamples
from kd_accel.cache.shard import find_damage
from kd_accel.cache.spec import LOGITS, VIEWED_SPLITS, CacheSpec
from kd_accel.config.schema import Precision, StorageType
from kd_accel.data.datamodule import DataModule
from kd_accel.data.splits import Split
from kd_accel.errors import UserError
from kd_accel.losses.targets import TargetFunction
from kd_accel.models.inference import CpuKernels
from kd_accel.teacher.teacher import Teacher

BUILD_COMMAND = "`kd-accel cache build` with this config"
_ANOTHER = f"or set another teacher.cache.dir (or remove this directory) and run {BUILD_COMMAND}"
_LISTED = 5
_SPLITS = {"train": "training", "val": "validation", "test": "test", "unlabeled": "unlabeled"}


@dataclass(frozen=True)
class CacheRequest:
    """Contents that a training or a build requests of a cache.

    Attributes:
        fingerprint_fields: Teacher, numerics, data and views, without the digests of the samples.
        samples: Samples of each split.
        views: Number of views of the training split, from view 0 on.
        targets: Target functions by the teacher's layer, fitted or not; `Identity` requests the raw map.
        dtype: Storage type; None accepts the stored one.
        any_memory_format: Whether another memory format of the teacher's maps is accepted. A cache that was built on another
            kind of device has one.
        target_settings: Settings that decide the targets, by the teacher's layer, for messages.
    """

    fingerprint_fields: Mapping[str, Any]
    samples: Mapping[Split, CachedSamples]
    views: int
    targets: Mapping[str, TargetFunction]
    dtype: StorageType | None = None
    any_memory_format: bool = False
    target_settings: Mapping[str, TargetSettings] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the requested tensors: the logits and the layers."""
        return (LOGITS, *self.targets)

    def settings_of(self, layer: str) -> TargetSettings:
        """Return the settings that decide the target of a layer; by default the arguments of `TeacherCache.build`."""
        return self.target_settings.get(layer, TargetSettings())


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
    target_settings: Mapping[str, TargetSettings] | None = None,
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
        target_settings: Settings that decide the targets, by the teacher's layer, for messages.

    Raises:
        UserError: If a layer has the name under which the logits are stored.
    """
    if LOGITS in targets:
        raise UserError(
            f"distill.features: the teacher's layer {LOGITS} cannot be cached, because a cache stores the logits under that "
            "name; compare a module inside the layer, or set teacher.outputs to live or mixed"
        )
    image_size = data.transform.image_size
    numerics = teacher.numerics(
        device,
        layers=targets,
        image_size=image_size,
        precision=precision,
        channels_last=channels_last,
        compiled=compiled,
        tf32=tf32,
        cpu_kernels=cpu_kernels,
    )
    return CacheRequest(
        {"teacher": teacher.for_images(image_size).fingerprint_fields(), "numerics": numerics, **data_fields(data)},
        covered_samples(data),
        views,
        targets,
        dtype,
        any_memory_format=channels_last is None,
        target_settings=target_settings or {},
    )


def data_fields(data: DataModule) -> dict[str, Any]:
    """Return the fingerprint fields of data and views, without the digests of the samples."""
    classes = list(data.label_names)
    sizes = {"train_size": data.train.num_samples, "test_size": data.test.num_samples}
    if data.val is not data.train:
        sizes["val_size"] = data.val.num_samples
    sets = {"train": data.train, **({} if data.val is data.train else {"val": data.val}), "test": data.test}
    if data.unlabeled is not None:
        sizes["unlabeled_size"] = data.unlabeled.num_samples
        sets["unlabeled"] = data.unlabeled
    left_out = {split: sorted(images.unreadable) for split, images in sets.items() if images.unreadable}
    return {
        "data": {"label_names": classes, **sizes, **({"left_out": left_out} if left_out else {})},
        "pixels": data.decoder.fingerprint_fields(),
        "views": data.transform.fingerprint_fields(),
    }


def covered_samples(data: DataModule) -> dict[Split, CachedSamples]:
    """Return the samples of each split with the digests of their contents."""
    return {split: CachedSamples(indices, digests) for split, (indices, digests) in data.covered_samples().items()}


def check_fingerprint(directory: Path, cache_spec: CacheSpec, request: CacheRequest) -> None:
    """Check what no addition to a cache can change: teacher, numerics, data, views, target functions and storage types.

    Raises:
        UserError: If one of them differs. The message lists all differences by setting.
    """
    specs = cache_spec.tensors
    settings = {layer: request.settings_of(layer) for layer in (*request.target_settings, *request.targets)}
    different = [
        *differing_fields(
            cache_spec.fingerprint_fields,
            request.fingerprint_fields,
            any_memory_format=request.any_memory_format,
            layers=list(dict.fromkeys(each.layers for each in settings.values())),
        ),
        *differing_targets(specs, request.targets, settings),
        *differing_types(specs, _requested_types(request)),
    ]
    if different:
        raise UserError(
            f"teacher.cache.dir: the cache in {directory} does not match this config: {'; '.join(different)}. Restore these "
            f"settings, {_ANOTHER}"
        )


def _requested_types(request: CacheRequest) -> dict[str, str]:
    if request.dtype is None:
        return {}
    return {name: storage_type(request.dtype, is_logits=name == LOGITS) for name in request.tensors}


def storage_type(dtype: Any, *, is_logits: bool) -> Any:
    """Return the storage type of a tensor in a cache of the given type: logits are never int8."""
    return "float16" if is_logits and dtype == "int8" else dtype


def check_samples(directory: Path, split: Split, stored: CachedSamples, requested: CachedSamples) -> None:
    """Check that a cache covers samples, with the same images and labels.

    Raises:
        UserError: If samples are missing, or have other contents.
    """
    missing, changed = differing_samples(stored, requested)
    count, samples = len(requested.indices), f"{_SPLITS[split]} samples"
    if len(changed):
        raise UserError(
            f"teacher.cache.dir: the cache in {directory} was built from other data: {settings_of_contents(split)}: "
            f"{len(changed)} of {count} {samples} have another image or label than in the cache (samples {_listed(changed)}). "
            f"Restore the data, {_ANOTHER}"
        )
    if len(missing):
        settings = settings_of_samples(split)
        raise UserError(
            f"teacher.cache.dir: the cache in {directory} lacks {len(missing)} of {count} {samples} (samples "
            f"{_listed(missing)}), because it was built with another {settings}. Restore {settings}, {_ANOTHER}"
        )


def differing_samples(stored: CachedSamples, requested: CachedSamples) -> tuple[np.ndarray, np.ndarray]:
    """Compare samples by index and digest.

    Returns:
        (indices that are not stored, stored indices with another digest), int64 [n] each.
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
        UserError: If the cache lacks some of them, which a build adds.
    """
    missing = [
        f"the features of {layer} ({request.settings_of(layer).layers})"
        for layer in request.targets
        if layer not in cache_spec.tensors
    ]
    if cache_spec.views < request.views:
        last = request.views - 1
        numbers = f"view {last}" if last == cache_spec.views else f"views {cache_spec.views} to {last}"
        missing.append(f"{numbers} (data.views: {cache_spec.views} in the cache, {request.views} needed)")
    if missing:
        _refuse(directory, f"lacks {' and '.join(missing)}")


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
        cache_spec: Spec of the cache.
        files: Checksums of the manifest, by file name.
        splits: Splits to check.
        views: Number of views of the training samples to check.
        tensors: Tensors of the training samples to check.

    Raises:
        UserError: If a file is missing or damaged.
    """
    shards = [
        shard
        for split in splits
        for view in range(views if split in VIEWED_SPLITS else 1)
        for name in (tensors if split in VIEWED_SPLITS else (LOGITS,))
        for shard in cache_spec.shards(split, view, name)
    ]
    unlisted = [shard.name for shard in shards if shard.name not in files]
    if unlisted:
        _refuse(directory, f"is incomplete: {len(unlisted)} of {len(shards)} files are not built yet, such as {unlisted[0]}")
    damages = {
        shard.name: find_damage(directory, cache_spec, shard, checksum=files[shard.name], reads_data=False) for shard in shards
    }
    wrong = [f"{name} {damage}" for name, damage in damages.items() if damage is not None]
    if wrong:
        _refuse(directory, f"has missing or damaged files ({len(wrong)} of {len(shards)}): {'; '.join(wrong[:_LISTED])}")


def _refuse(directory: Path, problem: str) -> NoReturn:
    raise UserError(
        f"teacher.cache.dir: the cache in {directory} {problem}. Run {BUILD_COMMAND}, which writes only what is missing or "
        "damaged"
    )


def _listed(indices: np.ndarray) -> str:
    shown = ", ".join(str(index) for index in indices[:_LISTED].tolist())
    return f"{shown}, ..." if len(indices) > _LISTED else shown
