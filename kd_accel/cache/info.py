"""Description of a cache from its own files: what `kd-accel cache info` prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_accel.cache.compatibility import describe_target
from kd_accel.cache.manifest import read_manifest, read_spec, read_teacher_accuracy
from kd_accel.cache.spec import SPLITS, CacheSpec, TensorSpec
from kd_accel.errors import UserError
from kd_accel.io.files import readable_size


def cache_info(directory: Path) -> dict[str, Any]:
    """Describe a cache in plain values, ready for JSON. Raises UserError if the directory holds none, or a damaged one."""
    cache_spec = read_spec(directory)
    files = read_manifest(directory, cache_spec)
    rates = {name: spec.sample_bytes for name, spec in cache_spec.tensors.items()}
    raw_bytes = sum(spec.raw_sample_bytes for spec in cache_spec.tensors.values())
    return {
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
