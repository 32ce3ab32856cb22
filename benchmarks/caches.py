"""A real cache of what the teacher of jobs.py says, written and opened by the program's own parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.jobs import CLASSES, LAYERS, STUDENT, TEACHER, Bench, Features
from kd_accel.cache.compatibility import CacheRequest, OpenCache, open_cache, stored_type
from kd_accel.cache.manifest import CachedSamples, flush_shards, write_manifest, write_samples, write_spec
from kd_accel.cache.spec import LOGITS, CacheSpec, Split, TensorSpec, samples_in_a_shard
from kd_accel.cache.writer import blocks_of, run_pass
from kd_accel.config.schema import StorageType, TeacherConfig
from kd_accel.models.inference import image_memory_format
from kd_accel.teacher.teacher import LiveTeacher


def write_cache(
    bench: Bench,
    directory: Path,
    teacher: LiveTeacher,
    *,
    views: int,
    features: Features = "projected",
    dtype: StorageType = "float16",
) -> OpenCache:
    """What `kd-accel cache build` leaves, written by one process, opened as a training opens it."""
    samples = _covered(bench)
    if bench.accelerator.is_main_process:
        cache_spec = cache_specs(bench, views=views, features=features, dtype=dtype)
        write_samples(directory, samples)
        write_spec(directory, cache_spec)
        write_manifest(directory, cache_spec, fill_cache(bench, directory, cache_spec, teacher))
    bench.accelerator.wait_for_everyone()
    layers = {} if features == "none" else LAYERS
    request = CacheRequest(_identity(bench), samples=samples, views=views, layers=layers, projected={}, dtype=dtype)
    return open_cache(directory, request)


def fill_cache(bench: Bench, directory: Path, cache_spec: CacheSpec, teacher: LiveTeacher) -> dict[str, str]:
    """The pass of the teacher and the flush to the disk: views, answers, encoding, writing. Returns {file name: checksum}."""
    checksums = run_pass(
        blocks_of(cache_spec.all_shards()),
        directory=directory,
        cache_spec=cache_spec,
        samples={"train": bench.samples},
        teacher=teacher,
        batches_of=bench.batches,
        advance=lambda samples: None,
    )
    flush_shards(directory, list(checksums))
    return checksums


def cache_specs(bench: Bench, *, views: int, features: Features = "projected", dtype: StorageType = "float16") -> CacheSpec:
    """The shards of the default config, without a held-out split."""
    shapes = {"none": {}, "raw": TEACHER, "projected": STUDENT}[features]
    tensors = {LOGITS: TensorSpec((CLASSES,), stored_type(dtype, is_logits=True))}
    tensors |= {layer: TensorSpec(shape, dtype) for layer, shape in shapes.items()}
    batch_samples = bench.size.batch_size
    fingerprint_fields = _identity(bench)
    fingerprint_fields["data"] = {
        **fingerprint_fields["data"],
        "contents": {split: cached.digest for split, cached in _covered(bench).items()},
    }
    return CacheSpec(
        fingerprint_fields=fingerprint_fields,
        samples={split: len(cached.samples) for split, cached in _covered(bench).items()},
        views=views,
        tensors=tensors,
        samples_per_shard=samples_in_a_shard(tensors, shard_mib=TeacherConfig().shard_mib, batch_samples=batch_samples),
        batch_samples=batch_samples,
    )


def _identity(bench: Bench) -> dict[str, dict[str, object]]:
    is_last = image_memory_format(None, bench.form_device) == torch.channels_last
    return {"numeric": {"channels_last": is_last}, "data": {"train_size": bench.size.samples}}


def _covered(bench: Bench) -> dict[Split, CachedSamples]:
    none = bench.samples[:0]
    samples: dict[Split, np.ndarray] = {"train": bench.samples, "val": none, "test": none}
    return {split: CachedSamples(own, bench.images.digests(own)) for split, own in samples.items()}
