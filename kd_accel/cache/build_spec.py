"""Spec, samples and target functions of a build: contents of the existing cache, extended by the request."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import kd_accel
from kd_accel.cache.compatibility import CacheRequest, check_fingerprint, check_samples, covered_samples, storage_type
from kd_accel.cache.manifest import (
    CachedSamples,
    check_owner,
    find_manifest,
    find_spec,
    find_targets,
    read_samples,
    write_samples,
    write_spec,
    write_targets,
)
from kd_accel.cache.spec import LOGITS, MAX_FILES, CacheSpec, TensorSpec, samples_in_a_shard
from kd_accel.config.schema import StorageType
from kd_accel.data.datamodule import DataModule
from kd_accel.data.splits import Split, SplitSamples
from kd_accel.distributed import Accelerator, on_main_process
from kd_accel.errors import UserError
from kd_accel.io.files import readable_size
from kd_accel.io.hashing import tensors_digest
from kd_accel.losses.targets import TargetFunction
from kd_accel.models.feature_extractor import probe_layers
from kd_accel.models.preprocess import Normalize
from kd_accel.teacher.fitting import fit_notices, fit_targets

Samples = Mapping[Split, CachedSamples]


@dataclass(frozen=True)
class CacheBuild:
    """Parts of a build, on each of its processes.

    Attributes:
        directory: Directory of the cache.
        request: Contents that the cache must have after the build. Its target functions are fitted in place.
        data: Images and splits.
        network: The teacher's network on the device of this process.
        normalize: Module that turns uint8 images [B, 3, H, W] into the input of the network, which may have another size.
        accelerator: The launch's `Accelerator`.
        batch_samples: Samples in one forward of the teacher, for a new cache.
        shard_mib: Size of the largest tensor's files in MiB, for a new cache.
        is_compiled: Whether the network is compiled with torch.compile.
        is_graphed: Whether the forward of a network that is not compiled is replayed as a CUDA graph on a GPU.
    """

    directory: Path
    request: CacheRequest
    data: DataModule
    network: nn.Module
    normalize: Normalize
    accelerator: Accelerator
    batch_samples: int
    shard_mib: float = 64.0
    is_compiled: bool = False
    is_graphed: bool = True


def find_own_spec(build: CacheBuild) -> CacheSpec | None:
    """Read the spec of the existing cache.

    Returns:
        The spec; None if spec.json is missing or damaged.

    Raises:
        UserError: If the cache does not match the request, or has another version.
    """
    cache_spec = find_spec(build.directory)
    if cache_spec is None:
        return None
    # Raises for a manifest that lists paths outside the cache, before any file is changed.
    find_manifest(build.directory, cache_spec)
    check_fingerprint(build.directory, cache_spec, build.request)
    if cache_spec.samples.keys() != build.request.samples.keys():
        raise UserError(
            f"data.unlabeled: not set, but the cache in {build.directory} also holds outputs for such samples, which a build "
            "must be able to compute; set it as in the first build, or set another teacher.cache.dir"
        )
    return cache_spec


def prepare_targets(build: CacheBuild, found: CacheSpec | None) -> dict[str, TargetFunction]:
    """Restore the target functions of the existing cache, and fit the functions that the cache lacks.

    Args:
        build: Parts of the build.
        found: Spec of the existing cache; None for a new cache.

    Returns:
        Target functions on the device by the teacher's layer: of all layers of the request and of the existing cache.

    Raises:
        UserError: If targets.safetensors is missing or damaged, and its functions cannot be fitted again.
    """
    stored = {} if found is None else on_main_process(build.accelerator, lambda: find_targets(build.directory, found))
    specs = found.tensors if found else {}
    lost = [layer for layer in specs if layer != LOGITS and layer not in {*stored, *build.request.targets}]
    if lost:
        raise UserError(
            f"teacher.cache.dir: targets.safetensors in {build.directory} is missing or damaged, and distill.features of this "
            f"config lacks some of its layers ({', '.join(lost)}); run `kd-accel cache build` with a config that has these "
            "layers, which fits their targets again"
        )
    for layer in stored.keys() & build.request.targets.keys():
        build.request.targets[layer].load(stored[layer].tensors())
        build.request.targets[layer].explained = stored[layer].explained
    _fit(build, specs)
    targets = {**stored, **build.request.targets}
    return {layer: target.to(build.accelerator.device) for layer, target in targets.items()}


def _fit(build: CacheBuild, specs: Mapping[str, TensorSpec]) -> None:
    """Fit the functions that are not fitted yet, on the main process for any number of processes."""
    lacking = {layer: target for layer, target in build.request.targets.items() if not target.is_fitted}
    if not lacking:
        return

    def fit() -> dict[str, tuple[dict[str, Tensor], float | None]]:
        fit_targets(lacking, build.data, build.network, build.normalize, autocast=build.accelerator.autocast)
        return {
            layer: ({name: tensor.cpu() for name, tensor in target.tensors().items()}, target.explained)
            for layer, target in lacking.items()
        }

    for layer, (tensors, explained) in on_main_process(build.accelerator, fit).items():
        lacking[layer].load(tensors)
        lacking[layer].explained = explained
        if layer in specs and specs[layer].target_digest != tensors_digest(tensors):
            raise UserError(
                f"teacher.cache.dir: targets.safetensors in {build.directory} is missing or damaged, and fitting the target of "
                f"{layer} again gives other tensors; build with the config and on the machine of the first build, or remove "
                "the directory and build from scratch"
            )
    for notice in fit_notices(lacking, num_samples=len(build.data.training_samples)):
        build.accelerator.print(notice)


def write_requested_spec(
    build: CacheBuild, found: CacheSpec | None, targets: Mapping[str, TargetFunction]
) -> tuple[CacheSpec, Samples]:
    """Write spec, samples and target functions of the cache that the build produces.

    Args:
        build: Parts of the build.
        found: Spec of the existing cache; None for a new cache.
        targets: Fitted target functions by the teacher's layer.

    Returns:
        (spec, samples by split).

    Raises:
        UserError: If the directory holds another cache, the samples differ, or the disk has too little space.
    """
    specs = _tensor_specs(build, targets, dtype=_dtype(build, found))
    if found is None:
        cache_spec, samples = _new_spec(build, specs), build.request.samples
        check_owner(build.directory, cache_spec)
    else:
        cache_spec, samples = found.extended(views=build.request.views, tensors=specs), _stored_samples(build, found)
    if found != cache_spec:
        _check_size(build.directory, cache_spec)
    write_samples(build.directory, samples)
    write_targets(build.directory, targets)
    write_spec(build.directory, cache_spec)
    return cache_spec, samples


def _dtype(build: CacheBuild, found: CacheSpec | None) -> StorageType:
    """Return the requested storage type, else the type of the existing cache's features or logits, else float16."""
    stored = [spec.dtype for _, spec in sorted(found.tensors.items(), key=lambda item: item[0] == LOGITS)] if found else []
    return build.request.dtype or (stored[0] if stored else "float16")


def _tensor_specs(build: CacheBuild, targets: Mapping[str, TargetFunction], *, dtype: StorageType) -> dict[str, TensorSpec]:
    layers = list(build.request.targets)
    shapes = probe_layers(build.network, layers, image_size=build.normalize.output_size(build.data.transform.image_size))
    specs = {LOGITS: TensorSpec((len(build.data.label_names),), storage_type(dtype, is_logits=True))}
    for layer in layers:
        target = targets[layer]
        tensors = target.tensors()
        specs[layer] = TensorSpec(
            shape=target.output_shape(shapes[layer]),
            dtype=dtype,
            target=target.description(),
            target_digest=tensors_digest(tensors) if tensors else None,
            raw_channels=shapes[layer][0],
            explained=target.explained,
        )
    return specs


def _new_spec(build: CacheBuild, specs: Mapping[str, TensorSpec]) -> CacheSpec:
    fields, samples = build.request.fingerprint_fields, build.request.samples
    contents = {split: cached.digest for split, cached in samples.items()}
    return CacheSpec(
        fingerprint_fields={**fields, "data": {**fields["data"], "contents": contents}},
        samples={split: len(cached.indices) for split, cached in samples.items()},
        views=build.request.views,
        tensors=dict(specs),
        samples_per_shard=samples_in_a_shard(specs, shard_mib=build.shard_mib, batch_samples=build.batch_samples),
        batch_samples=build.batch_samples,
        recorded={
            "processes": build.accelerator.num_processes,
            "device": str(build.accelerator.device),
            "threads": torch.get_num_threads(),
            "versions": {"kd_accel": kd_accel.__version__, "torch": torch.__version__},
        },
    )


def _stored_samples(build: CacheBuild, found: CacheSpec) -> Samples:
    """Return the samples of the existing cache, which may be more than the request has, after a check of their contents."""
    try:
        stored: Samples = read_samples(build.directory, found)
    except UserError:
        stored = build.request.samples
        if {split: cached.digest for split, cached in stored.items()} != found.fingerprint_fields["data"]["contents"]:
            raise UserError(
                f"teacher.cache.dir: samples.safetensors in {build.directory} is missing or damaged, and this config has other "
                "samples than the cache; build with the data settings of the first build, or set another teacher.cache.dir"
            ) from None
    for split, requested in build.request.samples.items():
        check_samples(build.directory, split, stored[split], requested)
    indices = {split: cached.indices for split, cached in stored.items()}
    for split, current in covered_samples(replace(build.data, splits=SplitSamples(**indices))).items():
        check_samples(build.directory, split, stored[split], current)
    return stored


def _check_size(directory: Path, cache_spec: CacheSpec) -> None:
    if cache_spec.num_files() > MAX_FILES:
        raise UserError(
            f"teacher.cache.shard_mib: this cache would have {cache_spec.num_files()} files, but at most {MAX_FILES} are "
            "supported; increase teacher.cache.shard_mib, or decrease data.views"
        )
    paths = (directory / shard.name for shard in cache_spec.all_shards())
    present = sum(path.stat().st_size for path in paths if path.is_file())
    needed, free = cache_spec.total_bytes() - present, shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"teacher.cache.dir: the cache in {directory} needs another {readable_size(needed)}, but only "
            f"{readable_size(free)} are free; decrease data.views, set a smaller teacher.cache.dtype, direction both in "
            "distill.features.NAME.args, or teacher.outputs mixed, or use another disk"
        )
