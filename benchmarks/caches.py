"""Cache of the outputs of the teacher of jobs.py, written and opened by kd_accel."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.jobs import Bench
from kd_accel.cache.build_spec import CacheBuild, write_requested_spec
from kd_accel.cache.compatibility import CacheRequest, covered_samples, data_fields
from kd_accel.cache.manifest import flush_shards, write_manifest
from kd_accel.cache.reader import OpenCache, open_cache
from kd_accel.cache.spec import CacheSpec
from kd_accel.cache.writer import blocks_of, write_blocks
from kd_accel.config.schema import StorageType
from kd_accel.models.inference import image_memory_format
from kd_accel.teacher.teacher import LiveTeacher


def write_cache(
    bench: Bench, directory: Path, teacher: LiveTeacher, *, views: int, dtype: StorageType = "float16"
) -> OpenCache:
    """Write a complete cache from one process, and open it as a training does.

    Args:
        bench: Processes and images.
        directory: Directory of the cache, created if it does not exist.
        teacher: The live teacher, with the target functions.
        views: Views of each sample.
        dtype: Storage type of the outputs.
    """
    if bench.accelerator.is_main_process:
        cache_spec = write_cache_spec(bench, directory, teacher, views=views, dtype=dtype)
        write_manifest(directory, cache_spec, fill_cache(bench, directory, cache_spec, teacher))
    bench.accelerator.wait_for_everyone()
    return open_cache(directory, _request(bench, teacher, views=views, dtype=dtype))


def write_cache_spec(
    bench: Bench,
    directory: Path,
    teacher: LiveTeacher,
    *,
    views: int,
    dtype: StorageType = "float16",
    shard_mib: float = 64.0,
) -> CacheSpec:
    """Write the files that describe a cache without held-out samples, and return its spec. Arguments as in `CacheBuild`."""
    directory.mkdir(parents=True, exist_ok=True)
    build = CacheBuild(
        directory,
        _request(bench, teacher, views=views, dtype=dtype),
        bench.data(views),
        teacher.network,
        teacher.normalize,
        bench.accelerator,
        batch_samples=bench.size.batch_size,
        shard_mib=shard_mib,
    )
    with bench.accelerator.autocast():
        cache_spec, _ = write_requested_spec(build, None, teacher.targets)
    return cache_spec


def fill_cache(bench: Bench, directory: Path, cache_spec: CacheSpec, teacher: LiveTeacher) -> dict[str, str]:
    """Write the shards of all views, and flush them to disk.

    Returns:
        {file name: checksum}.
    """
    checksums = write_blocks(
        blocks_of(cache_spec.all_shards()),
        directory=directory,
        cache_spec=cache_spec,
        samples=covered_samples(bench.data()),
        teacher=teacher,
        batches=bench.batches,
        advance=lambda samples: None,
    )
    flush_shards(directory, list(checksums))
    return checksums


def _request(bench: Bench, teacher: LiveTeacher, *, views: int, dtype: StorageType) -> CacheRequest:
    data = bench.data(views)
    channels_last = image_memory_format(None, bench.kernel_device) == torch.channels_last
    fields = {"teacher": {}, "numerics": {"channels_last": channels_last}, **data_fields(data)}
    return CacheRequest(fields, covered_samples(data), views, teacher.targets, dtype)
