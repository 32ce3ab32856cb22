"""Description of a cache from its own files, for `kd-accel cache info`.

The description includes files that are missing or have another size than the spec prescribes. Shards are only looked up in
their directory (`stat`), never opened: `kd-accel cache verify` checks their contents. A cache with such files can still be
described, so `info` exits with 0, as `git status` does; `verify` fails.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_accel.cache.differences import describe_target, describe_views
from kd_accel.cache.manifest import read_manifest, read_spec, read_teacher_accuracy
from kd_accel.cache.shard import MISSING, find_size_damage
from kd_accel.cache.spec import CacheSpec, TensorSpec
from kd_accel.errors import UserError
from kd_accel.io.files import readable_size

_LISTED = 5


def cache_info(directory: Path) -> dict[str, Any]:
    """Describe a cache in plain values, ready for JSON.

    Returns:
        Contents, sizes and fingerprint fields of the cache, and its state: `is_complete`, whether the build has finished and no
        file is missing or of another size; `missing_files`, a list of names; `wrong_size_files`, {name: what is wrong with the
        file}; and `unlisted_files`, names of files that manifest.json does not list.

    Raises:
        UserError: If spec.json or manifest.json is missing, damaged or of another version.
    """
    cache_spec = read_spec(directory)
    files = read_manifest(directory, cache_spec)
    damages = find_size_damages(directory, cache_spec)
    unlisted = [shard.name for shard in cache_spec.all_shards() if shard.name not in files]
    rates = {name: spec.sample_bytes for name, spec in cache_spec.tensors.items()}
    raw_bytes = sum(spec.raw_sample_bytes for spec in cache_spec.tensors.values())
    return {
        "directory": str(directory),
        "fingerprint": cache_spec.fingerprint,
        "is_complete": not unlisted and not damages,
        "missing_files": [name for name, damage in damages.items() if damage == MISSING],
        "wrong_size_files": {name: damage for name, damage in damages.items() if damage != MISSING},
        "unlisted_files": unlisted,
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


def find_size_damages(directory: Path, cache_spec: CacheSpec) -> dict[str, str]:
    """Return {name: what is wrong} of the files that are missing, or whose size is not the one that follows from the spec."""
    records = ["samples.safetensors", *(["targets.safetensors"] if cache_spec.has_fitted_targets else [])]
    damages = {name: MISSING for name in records if not (directory / name).exists()}
    for shard in cache_spec.all_shards():
        damage = find_size_damage(directory, cache_spec, shard)
        if damage is not None:
            damages[shard.name] = damage
    return damages


def info_text(info: Mapping[str, Any], cache_spec: CacheSpec) -> str:
    """Format the result of `cache_info` for people.

    Args:
        info: Result of `cache_info`.
        cache_spec: Spec of the same cache.

    Raises:
        UserError: If the spec has no teacher or no views.
    """
    teacher, views = (_fields(info, cache_spec, name) for name in ("teacher", "views"))
    accuracy, rates = info["teacher_accuracy"], info["bytes_per_sample_and_view"]
    counts = ", ".join(f"{count} {split}" for split, count in cache_spec.samples.items())
    lines = [
        f"{info['directory']}: {'complete' if info['is_complete'] else 'not complete'}, {info['files']} files, "
        f"{readable_size(info['bytes'])}",
        *_problem_lines(info),
        f"teacher {teacher.get('arch') or 'of an unnamed architecture'}, weights {teacher.get('weights')}",
        f"data {describe_views(views)}",
        f"samples: {counts}; {cache_spec.views} views of the training samples",
        *([] if accuracy is None else [f"the teacher's accuracy on the test samples is {100 * accuracy:.2f} %"]),
        "bytes per sample and view:",
        *(_tensor_line(name, spec) for name, spec in cache_spec.tensors.items()),
        f"  {'all':12} {'':>12} {'':9} {rates['all']:>8} (with raw features: {rates['all with raw features']})",
    ]
    return "\n".join(lines)


def _fields(info: Mapping[str, Any], cache_spec: CacheSpec, name: str) -> dict[str, Any]:
    fields = cache_spec.fingerprint_fields.get(name)
    if not isinstance(fields, dict):
        raise UserError(f"{info['directory']}/spec.json: is damaged (no {name}); run `kd-accel cache build` again")
    return fields


def _problem_lines(info: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each kind of file that keeps a cache from being complete, and the remedy."""
    if info["is_complete"]:
        return
    missing, wrong, unlisted = info["missing_files"], info["wrong_size_files"], info["unlisted_files"]
    if missing:
        yield f"{_count(missing)} missing: {_first(missing, ', ')}"
    if wrong:
        yield f"{_count(wrong)} of another size: {_first([f'{name} {damage}' for name, damage in wrong.items()], '; ')}"
    if unlisted:
        yield f"{_count(unlisted)} not listed in manifest.json, which a build writes last"
    yield "run `kd-accel cache build` with the same config, which writes only what is missing or damaged"


def _count(files: Collection[str]) -> str:
    return f"{len(files)} file{'s' if len(files) > 1 else ''}"


def _first(items: Sequence[str], separator: str) -> str:
    return separator.join([*items[:_LISTED], *(["..."] if len(items) > _LISTED else [])])


def _tensor_line(name: str, spec: TensorSpec) -> str:
    share = f", keeps {spec.explained:.1%} of the variance" if spec.explained is not None else ""
    target = f" {describe_target(spec.target)}{share} (raw: {spec.raw_sample_bytes})" if spec.target else ""
    return f"  {name:12} {'x'.join(map(str, spec.shape)):>12} {spec.dtype:9} {spec.sample_bytes:>8}{target}"
