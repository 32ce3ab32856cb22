"""`kd-accel cache verify` and `info`: whether a cache is what was written, and what it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kd_accel.commands.cache import checked
from kd_accel.commands.teacher import FrozenProjectors, live_teacher, projectors_from
from kd_accel.commands.wanted import Asked, ask, cache_directory, refuse_other_answers, used_views
from kd_accel.config import RunConfig
from kd_accel.disk import readable_size
from kd_accel.engine.setup import leave_processes, patient_group, start_processes
from kd_accel.models.kernels import choose_kernels
from kd_accel.teacher.cached import OpenCache, refuse_lacking, refuse_other_identity, refuse_other_rows
from kd_accel.teacher.store.layout import SPLITS, Plan
from kd_accel.teacher.store.manifest import read_manifest, read_plan, read_projectors, read_rows, read_teacher_accuracy
from kd_accel.teacher.store.shards import damage
from kd_accel.types import UserError


def run_cache_verify(config: RunConfig, *, as_json: bool) -> None:
    """Check every byte, and let the teacher answer again for a few rows. Raises UserError when anything is wrong."""
    choose_kernels(deterministic=config.train.deterministic, tf32=config.train.tf32)
    accelerator = start_processes(config.train.precision, seed=config.seed, timeout_s=config.train.timeout_s)
    asked = ask(config, accelerator)
    plan = read_plan(asked.directory)
    refuse_other_identity(asked.directory, plan, asked.wanted)
    refuse_lacking(asked.directory, plan, replace(asked.wanted, views=used_views(config)))
    files = read_manifest(asked.directory, plan)
    wrong = _wrong_parts(asked.directory, plan)
    _, missing = checked(asked, plan, files, group=patient_group(accelerator))
    wrong |= {shard.name: damage(asked.directory, plan, shard, checksum=files.get(shard.name)) or "" for shard in missing}
    wrong |= {
        shard.name: "is not in manifest.json: its build has not ended"
        for shard in plan.all_shards()
        if shard.name not in files and shard.name not in wrong
    }
    difference = None if wrong else _answers_again(asked, plan)
    if accelerator.is_main_process:
        _print_report(asked.directory, plan, wrong, difference, as_json=as_json)
    leave_processes(accelerator)
    if wrong:
        raise UserError(
            f"teacher.cache_dir: {len(wrong)} of the files of {asked.directory} are wrong; run `kd-accel cache build` with the "
            "same config, which writes just those again"
        )


def run_cache_info(config: RunConfig, *, as_json: bool) -> None:
    """What a cache holds, whoever asks: nothing but its own files is read."""
    directory = cache_directory(config)
    plan = read_plan(directory)
    files = read_manifest(directory, plan)
    shards = list(plan.all_shards())
    about = {
        "directory": str(directory),
        "cache": plan.digest,
        "is_complete": all(shard.name in files for shard in shards),
        "files": len(shards),
        "bytes": plan.total_bytes(),
        "rows": plan.rows,
        "views": plan.views,
        "teacher_accuracy": read_teacher_accuracy(directory),
        "rows_per_shard": plan.rows_per_shard,
        "bytes_per_row_and_view": {
            **{name: spec.row_bytes for name, spec in plan.tensors.items()},
            "all": plan.row_bytes(),
            "all with raw features": sum(spec.raw_row_bytes for spec in plan.tensors.values()),
        },
        "tensors": {name: {**vars(spec), "shape": list(spec.shape)} for name, spec in plan.tensors.items()},
        "identity": plan.identity,
        "recorded": plan.recorded,
    }
    print(json.dumps(about, indent=2) if as_json else _described(about, plan))


def _wrong_parts(directory: Path, plan: Plan) -> dict[str, str]:
    """Damage of the files that are no shards."""
    wrong = {}
    for name, read in (("rows.safetensors", read_rows), ("projectors.safetensors", read_projectors)):
        try:
            read(directory, plan)
        except UserError as error:
            wrong[name] = str(error)
    return wrong


def _answers_again(asked: Asked, plan: Plan) -> float:
    """Raises UserError where the teacher says something else today."""
    rows = read_rows(asked.directory, plan)
    for split, wanted in asked.wanted.rows.items():
        refuse_other_rows(asked.directory, split, rows[split], wanted)
    cache = OpenCache(asked.directory, plan, rows, asked.wanted.taps)
    modules = projectors_from(read_projectors(asked.directory, plan))
    frozen = FrozenProjectors(modules).to(asked.accelerator.device)
    live = live_teacher(
        asked.config,
        asked.model,
        asked.normalize,
        asked.accelerator,
        taps=cache.taps,
        projectors=frozen.by_student_tap(cache.taps),
    )
    try:
        rank, device = asked.accelerator.process_index, asked.accelerator.device
        return refuse_other_answers(cache, live, asked.config, asked.data, rank=rank, device=device)
    finally:
        live.close()


def _print_report(directory: Path, plan: Plan, wrong: Mapping[str, str], difference: float | None, *, as_json: bool) -> None:
    shards = sum(1 for _ in plan.all_shards())
    if as_json:
        report = {
            "directory": str(directory),
            "cache": plan.digest,
            "is_whole": not wrong,
            "files": shards,
            "bytes": plan.total_bytes(),
            "wrong": dict(wrong),
            "largest_difference": difference,
        }
        print(json.dumps(report))
        return
    for name, reason in wrong.items():
        print(f"{name}: {reason}")
    if not wrong:
        print(
            f"{directory}: {shards} files, {readable_size(plan.total_bytes())}, every byte as written; a few rows answered "
            f"again by the teacher differ by {difference:.2g} of the largest value at most"
        )


def _described(about: Mapping[str, Any], plan: Plan) -> str:
    teacher, views = (plan.identity.get(name) for name in ("teacher", "views"))
    if not isinstance(teacher, dict):
        raise UserError(
            f"{about['directory']}/plan.json: is damaged (no teacher); run `kd-accel cache build` with the same config"
        )
    accuracy = about["teacher_accuracy"]
    lines = [
        f"{about['directory']}: {'complete' if about['is_complete'] else 'not complete'}, {about['files']} files, "
        f"{readable_size(about['bytes'])}",
        f"teacher {teacher.get('arch')} ({teacher.get('weights')}), views {views}",
        f"rows: {', '.join(f'{plan.rows[split]} {split}' for split in SPLITS)}; {plan.views} views of the training rows",
        *([] if accuracy is None else [f"the teacher's accuracy on the test rows is {100 * accuracy:.2f} %"]),
        "bytes per row and view:",
    ]
    for name, spec in plan.tensors.items():
        shape = "x".join(map(str, spec.shape))
        raw = f", PCA that keeps {spec.explained:.1%} (raw: {spec.raw_row_bytes})" if spec.projector and spec.explained else ""
        lines.append(f"  {name:12} {shape:>12} {spec.dtype:9} {spec.row_bytes:>8}{raw}")
    per_row = about["bytes_per_row_and_view"]
    lines.append(f"  {'all':12} {'':>12} {'':9} {per_row['all']:>8} (with raw features: {per_row['all with raw features']})")
    return "\n".join(lines)
