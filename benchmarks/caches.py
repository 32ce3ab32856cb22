"""A real cache of what the teacher of jobs.py says, written and opened by the program's own parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.jobs import CLASSES, STUDENT, TAPS, TEACHER, Bench, Features
from kd_accel.config import StorageType, TeacherConfig
from kd_accel.engine.cache_pass import blocks_of, run_pass
from kd_accel.models.layout import maps_layout
from kd_accel.teacher.cached import OpenCache, Wanted, open_cache, stored_type
from kd_accel.teacher.live import LiveTeacher
from kd_accel.teacher.store.layout import LOGITS, Plan, Split, TensorSpec, rows_in_a_shard
from kd_accel.teacher.store.manifest import CachedRows, flush_shards, write_manifest, write_plan, write_rows


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
    rows = _covered(bench)
    if bench.accelerator.is_main_process:
        plan = cache_plan(bench, views=views, features=features, dtype=dtype)
        write_rows(directory, rows)
        write_plan(directory, plan)
        write_manifest(directory, plan, fill_cache(bench, directory, plan, teacher))
    bench.accelerator.wait_for_everyone()
    taps = {} if features == "none" else TAPS
    wanted = Wanted(_identity(bench), rows=rows, views=views, taps=taps, projected={}, dtype=dtype)
    return open_cache(directory, wanted)


def fill_cache(bench: Bench, directory: Path, plan: Plan, teacher: LiveTeacher) -> dict[str, str]:
    """The pass of the teacher and the flush to the disk: views, answers, encoding, writing. Returns {file name: checksum}."""
    checksums = run_pass(
        blocks_of(plan.all_shards()),
        directory=directory,
        plan=plan,
        rows={"train": bench.rows},
        teacher=teacher,
        batches_of=bench.batches,
        advance=lambda rows: None,
    )
    flush_shards(directory, list(checksums))
    return checksums


def cache_plan(bench: Bench, *, views: int, features: Features = "projected", dtype: StorageType = "float16") -> Plan:
    """The shards of the default config, without a held-out split."""
    shapes = {"none": {}, "raw": TEACHER, "projected": STUDENT}[features]
    tensors = {LOGITS: TensorSpec((CLASSES,), stored_type(dtype, is_logits=True))}
    tensors |= {tap: TensorSpec(shape, dtype) for tap, shape in shapes.items()}
    batch_rows = bench.size.batch_size
    identity = _identity(bench)
    identity["data"] = {**identity["data"], "contents": {split: cached.digest for split, cached in _covered(bench).items()}}
    return Plan(
        identity=identity,
        rows={split: len(cached.rows) for split, cached in _covered(bench).items()},
        views=views,
        tensors=tensors,
        rows_per_shard=rows_in_a_shard(tensors, shard_mib=TeacherConfig().shard_mib, batch_rows=batch_rows),
        batch_rows=batch_rows,
    )


def _identity(bench: Bench) -> dict[str, dict[str, object]]:
    is_last = maps_layout(None, bench.form_device) == torch.channels_last
    return {"numeric": {"channels_last": is_last}, "data": {"train_size": bench.size.rows}}


def _covered(bench: Bench) -> dict[Split, CachedRows]:
    none = bench.rows[:0]
    rows: dict[Split, np.ndarray] = {"train": bench.rows, "val": none, "test": none}
    return {split: CachedRows(own, bench.images.digests(own)) for split, own in rows.items()}
