"""`kd-accel cache build`, `verify` and `info`: start the processes, call the builders, print."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kd_accel.builders.cache import cache_directory
from kd_accel.builders.cache_build import VerifiedCache, build_cache_of, verify_cache_of
from kd_accel.cache.compatibility import describe_target
from kd_accel.cache.manifest import read_manifest, read_spec, read_teacher_accuracy
from kd_accel.cache.spec import SPLITS, CacheSpec, TensorSpec
from kd_accel.config.schema import RunConfig
from kd_accel.distributed import Accelerator, leave_processes, peers_needed, start_processes
from kd_accel.errors import UserError
from kd_accel.io.files import readable_size
from kd_accel.models.inference import choose_kernels


def run_cache_build(config: RunConfig) -> None:
    """Write what the cache of a config lacks: all of it, further views or layers, or files that are damaged."""
    accelerator = _start(config)
    with peers_needed(accelerator, lambda: "during the build of a cache"):
        build_cache_of(config, accelerator)
    leave_processes(accelerator)


def run_cache_verify(config: RunConfig, *, as_json: bool) -> None:
    """Check every byte of a cache, and recompute a few samples with the teacher. Raises UserError if anything is wrong."""
    accelerator = _start(config)
    result = verify_cache_of(config, accelerator)
    accelerator.print(json.dumps(_verify_report(result)) if as_json else _verify_text(result))
    leave_processes(accelerator)
    if result.wrong:
        raise UserError(
            f"teacher.cache.dir: {len(result.wrong)} of the files of {result.directory} are damaged; run `kd-accel cache "
            "build` with the same config, which writes only those again"
        )


def run_cache_info(config: RunConfig, *, as_json: bool) -> None:
    """Print what a cache holds. Reads nothing but the files of the cache."""
    directory = cache_directory(config)
    cache_spec = read_spec(directory)
    files = read_manifest(directory, cache_spec)
    rates = {name: spec.sample_bytes for name, spec in cache_spec.tensors.items()}
    raw_bytes = sum(spec.raw_sample_bytes for spec in cache_spec.tensors.values())
    info = {
        "directory": str(directory),
        "fingerprint": cache_spec.fingerprint,
        "is_complete": all(shard.name in files for shard in cache_spec.all_shards()),
        "files": cache_spec.num_files(),
        "bytes": cache_spec.total_bytes(),
        "samples": cache_spec.samples,
        "views": cache_spec.views,
        "teacher_accuracy": read_teacher_accuracy(directory),
        "samples_per_shard": cache_spec.samples_per_shard,
        "bytes_per_sample_and_view": {**rates, "all": cache_spec.sample_bytes(), "all with raw features": raw_bytes},
        "tensors": {name: {**vars(spec), "shape": list(spec.shape)} for name, spec in cache_spec.tensors.items()},
        "fingerprint_fields": cache_spec.fingerprint_fields,
        "recorded": cache_spec.recorded,
    }
    print(json.dumps(info, indent=2) if as_json else info_text(info, cache_spec))


def _start(config: RunConfig) -> Accelerator:
    cache_directory(config)
    choose_kernels(deterministic=config.train.deterministic, tf32=config.train.tf32)
    return start_processes(config.train.precision, seed=config.seed, timeout_s=config.train.timeout_s)


def _verify_report(result: VerifiedCache) -> dict[str, Any]:
    return {
        **{"directory": str(result.directory), "fingerprint": result.cache_spec.fingerprint, "is_intact": not result.wrong},
        **{"files": result.cache_spec.num_files(), "bytes": result.cache_spec.total_bytes()},
        "wrong": result.wrong,
        "largest_difference": result.largest_difference,
    }


def _verify_text(result: VerifiedCache) -> str:
    if result.wrong:
        return "\n".join(f"{name}: {reason}" for name, reason in result.wrong.items())
    files, size = result.cache_spec.num_files(), readable_size(result.cache_spec.total_bytes())
    return (
        f"{result.directory}: {files} files, {size}, every byte matches its checksum; a few samples recomputed by the teacher "
        f"differ by at most {result.largest_difference:.2g} of the largest value"
    )


def info_text(info: Mapping[str, Any], cache_spec: CacheSpec) -> str:
    """Format the result of `cache info` for people. Raises UserError for a spec without a teacher."""
    teacher, views = (cache_spec.fingerprint_fields.get(name) for name in ("teacher", "views"))
    if not isinstance(teacher, dict):
        raise UserError(f"{info['directory']}/spec.json: is damaged (no teacher); run `kd-accel cache build` again")
    accuracy, rates = info["teacher_accuracy"], info["bytes_per_sample_and_view"]
    counts = ", ".join(f"{cache_spec.samples[split]} {split}" for split in SPLITS)
    lines = [
        f"{info['directory']}: {'complete' if info['is_complete'] else 'not complete'}, {info['files']} files, "
        f"{readable_size(info['bytes'])}",
        f"teacher {teacher.get('arch')} ({teacher.get('weights')}), views {views}",
        f"samples: {counts}; {cache_spec.views} views of the training samples",
        *([] if accuracy is None else [f"the teacher's accuracy on the test samples is {100 * accuracy:.2f} %"]),
        "bytes per sample and view:",
        *(_tensor_line(name, spec) for name, spec in cache_spec.tensors.items()),
        f"  {'all':12} {'':>12} {'':9} {rates['all']:>8} (with raw features: {rates['all with raw features']})",
    ]
    return "\n".join(lines)


def _tensor_line(name: str, spec: TensorSpec) -> str:
    share = f", keeps {spec.explained:.1%} of the variance" if spec.explained is not None else ""
    target = f" {describe_target(spec.target)}{share} (raw: {spec.raw_sample_bytes})" if spec.target else ""
    return f"  {name:12} {'x'.join(map(str, spec.shape)):>12} {spec.dtype:9} {spec.sample_bytes:>8}{target}"
