"""`kd-accel cache verify` and `info`: whether a cache is what was written, and what it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kd_accel.cache.compatibility import OpenCache, refuse_lacking, refuse_other_fingerprint, refuse_other_samples
from kd_accel.cache.manifest import read_manifest, read_projectors, read_samples, read_spec, read_teacher_accuracy
from kd_accel.cache.shard import damage
from kd_accel.cache.spec import SPLITS, CacheSpec
from kd_accel.commands.cache import checked
from kd_accel.commands.cache_request import CacheSetup, cache_directory, refuse_other_outputs, set_up_cache, used_views
from kd_accel.commands.teacher import FrozenProjectors, live_teacher, projectors_from
from kd_accel.config.schema import RunConfig
from kd_accel.distributed import leave_processes, patient_group, start_processes
from kd_accel.errors import UserError
from kd_accel.io.files import readable_size
from kd_accel.models.kernels import choose_kernels


def run_cache_verify(config: RunConfig, *, as_json: bool) -> None:
    """Check every byte, and let the teacher answer again for a few samples. Raises UserError when anything is wrong."""
    choose_kernels(deterministic=config.train.deterministic, tf32=config.train.tf32)
    accelerator = start_processes(config.train.precision, seed=config.seed, timeout_s=config.train.timeout_s)
    setup = set_up_cache(config, accelerator)
    cache_spec = read_spec(setup.directory)
    refuse_other_fingerprint(setup.directory, cache_spec, setup.request)
    refuse_lacking(setup.directory, cache_spec, replace(setup.request, views=used_views(config)))
    files = read_manifest(setup.directory, cache_spec)
    wrong = _wrong_parts(setup.directory, cache_spec)
    _, missing = checked(setup, cache_spec, files, group=patient_group(accelerator))
    wrong |= {shard.name: damage(setup.directory, cache_spec, shard, checksum=files.get(shard.name)) or "" for shard in missing}
    wrong |= {
        shard.name: "is not in manifest.json: its build has not ended"
        for shard in cache_spec.all_shards()
        if shard.name not in files and shard.name not in wrong
    }
    difference = None if wrong else _answers_again(setup, cache_spec)
    if accelerator.is_main_process:
        _print_report(setup.directory, cache_spec, wrong, difference, as_json=as_json)
    leave_processes(accelerator)
    if wrong:
        raise UserError(
            f"teacher.cache_dir: {len(wrong)} of the files of {setup.directory} are wrong; run `kd-accel cache build` with the "
            "same config, which writes just those again"
        )


def run_cache_info(config: RunConfig, *, as_json: bool) -> None:
    """What a cache holds, whoever asks: nothing but its own files is read."""
    directory = cache_directory(config)
    cache_spec = read_spec(directory)
    files = read_manifest(directory, cache_spec)
    shards = list(cache_spec.all_shards())
    about = {
        "directory": str(directory),
        "cache": cache_spec.digest,
        "is_complete": all(shard.name in files for shard in shards),
        "files": len(shards),
        "bytes": cache_spec.total_bytes(),
        "samples": cache_spec.samples,
        "views": cache_spec.views,
        "teacher_accuracy": read_teacher_accuracy(directory),
        "samples_per_shard": cache_spec.samples_per_shard,
        "bytes_per_sample_and_view": {
            **{name: spec.sample_bytes for name, spec in cache_spec.tensors.items()},
            "all": cache_spec.sample_bytes(),
            "all with raw features": sum(spec.raw_sample_bytes for spec in cache_spec.tensors.values()),
        },
        "tensors": {name: {**vars(spec), "shape": list(spec.shape)} for name, spec in cache_spec.tensors.items()},
        "fingerprint_fields": cache_spec.fingerprint_fields,
        "recorded": cache_spec.recorded,
    }
    print(json.dumps(about, indent=2) if as_json else _described(about, cache_spec))


def _wrong_parts(directory: Path, cache_spec: CacheSpec) -> dict[str, str]:
    """Damage of the files that are no shards."""
    wrong = {}
    for name, read in (("samples.safetensors", read_samples), ("targets.safetensors", read_projectors)):
        try:
            read(directory, cache_spec)
        except UserError as error:
            wrong[name] = str(error)
    return wrong


def _answers_again(setup: CacheSetup, cache_spec: CacheSpec) -> float:
    """Raises UserError where the teacher says something else today."""
    samples = read_samples(setup.directory, cache_spec)
    for split, request in setup.request.samples.items():
        refuse_other_samples(setup.directory, split, samples[split], request)
    cache = OpenCache(setup.directory, cache_spec, samples, setup.request.layers)
    modules = projectors_from(read_projectors(setup.directory, cache_spec))
    frozen = FrozenProjectors(modules).to(setup.accelerator.device)
    live = live_teacher(
        setup.config,
        setup.model,
        setup.normalize,
        setup.accelerator,
        layers=cache.layers,
        projectors=frozen.by_student_layer(cache.layers),
    )
    try:
        rank, device = setup.accelerator.process_index, setup.accelerator.device
        return refuse_other_outputs(cache, live, setup.config, setup.data, rank=rank, device=device)
    finally:
        live.close()


def _print_report(
    directory: Path, cache_spec: CacheSpec, wrong: Mapping[str, str], difference: float | None, *, as_json: bool
) -> None:
    shards = sum(1 for _ in cache_spec.all_shards())
    if as_json:
        report = {
            "directory": str(directory),
            "cache": cache_spec.digest,
            "is_whole": not wrong,
            "files": shards,
            "bytes": cache_spec.total_bytes(),
            "wrong": dict(wrong),
            "largest_difference": difference,
        }
        print(json.dumps(report))
        return
    for name, reason in wrong.items():
        print(f"{name}: {reason}")
    if not wrong:
        print(
            f"{directory}: {shards} files, {readable_size(cache_spec.total_bytes())}, every byte as written; a few samples answered "
            f"again by the teacher differ by {difference:.2g} of the largest value at most"
        )


def _described(about: Mapping[str, Any], cache_spec: CacheSpec) -> str:
    teacher, views = (cache_spec.fingerprint_fields.get(name) for name in ("teacher", "views"))
    if not isinstance(teacher, dict):
        raise UserError(
            f"{about['directory']}/spec.json: is damaged (no teacher); run `kd-accel cache build` with the same config"
        )
    accuracy = about["teacher_accuracy"]
    lines = [
        f"{about['directory']}: {'complete' if about['is_complete'] else 'not complete'}, {about['files']} files, "
        f"{readable_size(about['bytes'])}",
        f"teacher {teacher.get('arch')} ({teacher.get('weights')}), views {views}",
        f"samples: {', '.join(f'{cache_spec.samples[split]} {split}' for split in SPLITS)}; {cache_spec.views} views of the training samples",
        *([] if accuracy is None else [f"the teacher's accuracy on the test samples is {100 * accuracy:.2f} %"]),
        "bytes per sample and view:",
    ]
    for name, spec in cache_spec.tensors.items():
        shape = "x".join(map(str, spec.shape))
        raw = (
            f", PCA that keeps {spec.explained:.1%} (raw: {spec.raw_sample_bytes})" if spec.projector and spec.explained else ""
        )
        lines.append(f"  {name:12} {shape:>12} {spec.dtype:9} {spec.sample_bytes:>8}{raw}")
    per_sample = about["bytes_per_sample_and_view"]
    lines.append(
        f"  {'all':12} {'':>12} {'':9} {per_sample['all']:>8} (with raw features: {per_sample['all with raw features']})"
    )
    return "\n".join(lines)
