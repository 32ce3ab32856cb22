"""What a cache is to hold: the plan that stands there, or a new one, with what a config asks for; its samples and projectors."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import kd_accel
from kd_accel.cache.compatibility import (
    refuse_other_fingerprint,
    refuse_other_samples,
    requested_tensors,
    stored_type,
)
from kd_accel.cache.manifest import (
    CachedSamples,
    find_manifest,
    find_spec,
    read_projectors,
    read_samples,
    refuse_other_owner,
    write_projectors,
    write_samples,
    write_spec,
)
from kd_accel.cache.spec import LOGITS, MAX_FILES, CacheSpec, Split, TensorSpec, samples_in_a_shard
from kd_accel.commands.cache_request import CacheSetup, covered_samples
from kd_accel.commands.teacher import (
    FrozenProjectors,
    fit_projectors,
    projectors_from,
)
from kd_accel.config.schema import StorageType
from kd_accel.data.splits import SplitSamples
from kd_accel.distributed import on_main_process
from kd_accel.errors import UserError
from kd_accel.io.files import readable_size
from kd_accel.io.hashing import tensors_digest


def find_own_spec(setup: CacheSetup) -> CacheSpec | None:
    """The plan that stands there, if it is one of this cache."""
    cache_spec = find_spec(setup.directory)
    if cache_spec is None:
        return None
    find_manifest(setup.directory, cache_spec)  # refuses what was tampered with, before anything is written
    refuse_other_fingerprint(setup.directory, cache_spec, setup.request)
    return cache_spec


def frozen_projectors(setup: CacheSetup, found: CacheSpec | None) -> FrozenProjectors:
    """The projectors that the cache has, and newly fitted ones for layers that it lacks."""
    kept, specs = {}, found.tensors if found else {}
    if found is not None:
        kept = projectors_from(on_main_process(setup.accelerator, lambda: _kept_projectors(setup.directory, found)))
    lacking = {layer: width for layer, width in setup.request.projected.items() if layer not in kept}
    _refuse_lost_projectors(setup.directory, specs, {*kept, *lacking})
    fitted = fit_projectors(setup.config, setup.data, setup.model, setup.normalize, lacking, setup.accelerator)
    for layer, module in fitted.modules.items():
        if layer in specs and specs[layer].projector != tensors_digest(module.state_dict()):
            raise UserError(
                f"teacher.cache_dir: targets.safetensors of {setup.directory} is damaged, and the PCA at {layer} fitted again "
                "here is not the same; build with the config and on the machine of the first build, or remove the directory "
                "and build it anew"
            )
    explained = {layer: spec.explained for layer, spec in specs.items() if spec.explained is not None}
    for notice in fitted.notices:
        setup.accelerator.print(notice)
    both = FrozenProjectors({**kept, **fitted.modules}, {**explained, **fitted.explained})
    return both.to(setup.accelerator.device)


def _refuse_lost_projectors(directory: Path, specs: Mapping[str, TensorSpec], at_hand: set[str]) -> None:
    lost = [layer for layer, spec in specs.items() if spec.projector is not None and layer not in at_hand]
    if lost:
        raise UserError(
            f"teacher.cache_dir: targets.safetensors of {directory} is missing or damaged, and this config does not ask for "
            f"all that it held ({', '.join(lost)}); build with a config that has these layers, which fits them again"
        )


def _kept_projectors(directory: Path, cache_spec: CacheSpec) -> dict[str, dict[str, torch.Tensor]]:
    try:
        return read_projectors(directory, cache_spec)
    except UserError:
        return {}


def write_requested_spec(
    setup: CacheSetup, found: CacheSpec | None, frozen: FrozenProjectors
) -> tuple[CacheSpec, dict[Split, np.ndarray]]:
    """The plan with what this config asks for, and the samples; both on the disk."""
    specs = _specs(setup, frozen, dtype=_storage_type(setup, found))
    if found is None:
        cache_spec, samples = _new_spec(setup, specs), dict(setup.request.samples)
        refuse_other_owner(setup.directory, cache_spec)
    else:
        cache_spec, samples = found.extended(views=setup.request.views, tensors=specs), _known_samples(setup, found)
    if found != cache_spec:
        _refuse_too_large(setup.directory, cache_spec)
    write_samples(setup.directory, samples)
    if frozen.modules:
        write_projectors(
            setup.directory,
            {
                layer: {name: value.cpu() for name, value in module.state_dict().items()}
                for layer, module in frozen.modules.items()
            },
        )
    write_spec(setup.directory, cache_spec)
    return cache_spec, {split: cached.samples for split, cached in samples.items()}


def _storage_type(setup: CacheSetup, found: CacheSpec | None) -> StorageType:
    """What the config says, else that of the cache which is there, else float16."""
    assert setup.config.teacher is not None
    stored = [spec.dtype for _, spec in sorted(found.tensors.items(), key=lambda item: item[0] == LOGITS)] if found else []
    return setup.config.teacher.dtype or (stored[0] if stored else "float16")


def _specs(setup: CacheSetup, frozen: FrozenProjectors, *, dtype: StorageType) -> dict[str, TensorSpec]:
    feature = setup.config.distill.feature if setup.config.distill else None
    specs = {LOGITS: TensorSpec((len(setup.data.label_names),), stored_type(dtype, is_logits=True))}
    for layer in requested_tensors(setup.request)[1:]:
        channels, *size = setup.pairs.shapes[layer]
        if layer not in setup.request.projected:
            specs[layer] = TensorSpec((channels, *size), dtype)
            continue
        assert feature is not None
        specs[layer] = TensorSpec(
            (setup.request.projected[layer], *size),
            dtype,
            projector=tensors_digest(frozen.modules[layer].state_dict()),
            raw_channels=channels,
            pca_images=feature.pca_images,
            explained=frozen.explained.get(layer),
        )
    return specs


def _new_spec(setup: CacheSetup, specs: Mapping[str, TensorSpec]) -> CacheSpec:
    config = setup.config
    assert config.teacher is not None
    samples = setup.request.samples
    batch_samples = config.teacher.cache_batch_size or config.train.batch_size // config.train.grad_accum_steps
    contents = {split: cached.digest for split, cached in samples.items()}
    return CacheSpec(
        fingerprint_fields={
            **setup.request.fingerprint_fields,
            "data": {**setup.request.fingerprint_fields["data"], "contents": contents},
        },
        samples={split: len(cached.samples) for split, cached in samples.items()},
        views=setup.request.views,
        tensors=dict(specs),
        samples_per_shard=samples_in_a_shard(specs, shard_mib=config.teacher.shard_mib, batch_samples=batch_samples),
        batch_samples=batch_samples,
        recorded={
            "processes": setup.accelerator.num_processes,
            "device": str(setup.accelerator.device),
            "threads": torch.get_num_threads(),
            "versions": {"kd_accel": kd_accel.__version__, "torch": torch.__version__},
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        },
    )


def _known_samples(setup: CacheSetup, found: CacheSpec) -> dict[Split, CachedSamples]:
    """The samples that the cache covers, which may be more than this config asks for; each must still be what it was."""
    try:
        stored = read_samples(setup.directory, found)
    except UserError:
        stored = dict(setup.request.samples)
        if {split: cached.digest for split, cached in stored.items()} != found.fingerprint_fields["data"]["contents"]:
            raise UserError(
                f"teacher.cache_dir: samples.safetensors of {setup.directory} is missing or damaged, and the samples of this config "
                "are not the ones that it held; build with the config of the first build, or name another cache_dir"
            ) from None
    for split, request in setup.request.samples.items():
        refuse_other_samples(setup.directory, split, stored[split], request)
    samples = {split: cached.samples for split, cached in stored.items()}
    for split, now in covered_samples(
        replace(setup.data, splits=SplitSamples(samples["train"], samples["val"], samples["test"]))
    ).items():
        refuse_other_samples(setup.directory, split, stored[split], now)
    return stored


def _refuse_too_large(directory: Path, cache_spec: CacheSpec) -> None:
    if cache_spec.num_files() > MAX_FILES:
        raise UserError(
            f"teacher.cache_dir: this cache would be {cache_spec.num_files()} files, and {MAX_FILES} are the most; raise "
            "teacher.shard_mib, or use fewer data.views"
        )
    there = sum(
        (directory / shard.name).stat().st_size for shard in cache_spec.all_shards() if (directory / shard.name).is_file()
    )
    needed, free = cache_spec.total_bytes() - there, shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"teacher.cache_dir: {directory} would need another {readable_size(needed)}, but {readable_size(free)} are free "
            "there; use fewer data.views, a smaller teacher.dtype, direction both, outputs mixed, or another disk"
        )
