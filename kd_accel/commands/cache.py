"""`kd-accel cache build`: the teacher answers once, and what it said is kept."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kd_accel.commands.cache_plan import find_own_plan, frozen_projectors, write_wanted_plan
from kd_accel.commands.data import view_function
from kd_accel.commands.teacher import (
    FrozenProjectors,
    live_teacher,
)
from kd_accel.commands.wanted import Asked, ask, cache_directory
from kd_accel.config import RunConfig
from kd_accel.data.loader import load_batches
from kd_accel.disk import readable_size, remove_leftovers
from kd_accel.engine.cache_pass import Block, balanced_share, blocks_of, run_pass
from kd_accel.engine.progress import RowProgress
from kd_accel.engine.setup import (
    Accelerator,
    gathered,
    leave_processes,
    on_main_process,
    patient_group,
    peers_needed,
    start_processes,
)
from kd_accel.models.kernels import choose_kernels
from kd_accel.teacher.live import LiveTeacher
from kd_accel.teacher.store.layout import LOGITS, Plan, Shard, Split
from kd_accel.teacher.store.manifest import (
    find_manifest,
    flush_shards,
    lock_for_building,
    write_manifest,
)
from kd_accel.teacher.store.reader import Reader
from kd_accel.teacher.store.shards import damage, stored_checksum
from kd_accel.types import Batch, UserError

_TIMED_BATCHES = 2


def run_cache_build(config: RunConfig) -> None:
    """Write what the cache of this config lacks: all of it, further views or taps, or files that are damaged."""
    choose_kernels(deterministic=config.train.deterministic, tf32=config.train.tf32)
    accelerator = start_processes(config.train.precision, seed=config.seed, timeout_s=config.train.timeout_s)
    with ExitStack() as stack:
        stack.enter_context(peers_needed(accelerator, lambda: "while it built a cache"))
        _lock(cache_directory(config), accelerator, stack)
        asked = ask(config, accelerator)
        found = on_main_process(accelerator, lambda: find_own_plan(asked))
        frozen = frozen_projectors(asked, found)
        plan, rows = on_main_process(accelerator, lambda: write_wanted_plan(asked, found, frozen))
        manifest = on_main_process(accelerator, lambda: find_manifest(asked.directory, plan))
        patient = patient_group(accelerator)
        whole, missing = checked(asked, plan, manifest, group=patient)
        _flush(asked.directory, _unlisted(whole, manifest, accelerator))
        if missing:
            on_main_process(accelerator, lambda: remove_leftovers(asked.directory))
            whole |= _write(asked, plan, frozen, rows, missing, group=patient)
        else:
            is_listed = manifest.keys() == whole.keys()
            remark = "nothing to do" if is_listed else "manifest.json written"
            accelerator.print(f"{asked.directory}: complete, {len(whole)} files checked; {remark}")
        on_main_process(accelerator, lambda: _finish(asked, plan, rows["test"], whole))
    leave_processes(accelerator)


def _lock(directory: Path, accelerator: Accelerator, stack: ExitStack) -> None:
    """Rank 0 first, and its refusal is everybody's."""
    held: list[int] = []
    on_main_process(accelerator, lambda: held.append(lock_for_building(directory, 0)))
    if not accelerator.is_main_process:
        held.append(lock_for_building(directory, accelerator.process_index))
    stack.callback(os.close, held[0])


def checked(asked: Asked, plan: Plan, manifest: Mapping[str, str], *, group: Any) -> tuple[dict[str, str], list[Shard]]:
    """({file that is whole: its checksum}, files that are not), every byte read, each process a share of the files."""
    shards = list(plan.all_shards())
    own: list[tuple[int, str | None]] = []
    for index in _own_share([shard.rows * plan.tensors[shard.tensor].row_bytes for shard in shards], asked.accelerator):
        shard = shards[index]
        is_whole = damage(asked.directory, plan, shard, checksum=manifest.get(shard.name)) is None
        own.append((index, stored_checksum(asked.directory, plan, shard) if is_whole else None))
    found = dict(gathered(own, group=group))
    whole = {shards[index].name: checksum for index, checksum in found.items() if checksum is not None}
    return whole, [shard for index, shard in enumerate(shards) if found[index] is None]


def _finish(asked: Asked, plan: Plan, rows: np.ndarray, files: Mapping[str, str]) -> None:
    """Write the manifest, with the teacher's accuracy on the cached test rows, from the stored logits."""
    logits = Reader(asked.directory, plan, "test", rows, (LOGITS,)).read(0, rows)[LOGITS].values
    accuracy = np.mean(logits.argmax(1).numpy() == asked.data.test.labels[rows])
    write_manifest(asked.directory, plan, files, teacher_accuracy=float(accuracy))


def _write(
    asked: Asked,
    plan: Plan,
    frozen: FrozenProjectors,
    rows: Mapping[Split, np.ndarray],
    missing: Sequence[Shard],
    *,
    group: Any,
) -> dict[str, str]:
    """Let the teacher answer for the blocks of this process, flush its files to the disk; returns the checksums of all."""
    accelerator = asked.accelerator
    blocks = blocks_of(missing)
    own = [blocks[index] for index in _own_share([block.rows for block in blocks], accelerator)]
    taps = {name: name for name in plan.tensors if name != LOGITS and any(shard.tensor == name for shard in missing)}
    projectors = {tap: module for tap, module in frozen.modules.items() if tap in taps}
    live = live_teacher(asked.config, asked.model, asked.normalize, accelerator, taps=taps, projectors=projectors)
    try:
        _announce(asked, plan, blocks, missing, live, rows)
        progress = RowProgress(
            str(asked.directory), total_rows=sum(block.rows for block in own), is_main=accelerator.is_main_process
        )
        started_at = time.perf_counter()
        checksums = run_pass(
            own,
            directory=asked.directory,
            plan=plan,
            rows=rows,
            teacher=live,
            batches_of=partial(_batches, asked),
            advance=progress.advance,
        )
        progress.close()
        _flush(asked.directory, list(checksums))
        live.check_unchanged()
    finally:
        live.close()
    written = dict(gathered(list(checksums.items()), group=group))
    total = sum(block.rows for block in blocks)
    elapsed_s = time.perf_counter() - started_at
    accelerator.print(f"{asked.directory}: {total} rows in {elapsed_s:.0f} s ({total / elapsed_s:.0f} rows/s)")
    return written


def _own_share(sizes: Sequence[int], accelerator: Accelerator) -> list[int]:
    return balanced_share(sizes, rank=accelerator.process_index, world_size=accelerator.num_processes)


def _batches(asked: Asked, split: Split, shares: Sequence[tuple[np.ndarray, int]]) -> Iterator[Batch]:
    is_train, data, config = split == "train", asked.data, asked.config
    batches = load_batches(
        data.test if split == "test" else data.train,
        view_function(config.data) if is_train else None,
        shares,
        num_workers=config.data.num_workers,
        pin_memory=asked.accelerator.device.type == "cuda",
    )
    return (batch.to(asked.accelerator.device, non_blocking=True) for batch in batches)


def _announce(
    asked: Asked,
    plan: Plan,
    blocks: Sequence[Block],
    missing: Sequence[Shard],
    live: LiveTeacher,
    rows: Mapping[Split, np.ndarray],
) -> None:
    """Before the work starts: how much, where to, how long."""
    accelerator = asked.accelerator
    sample = rows["train"][: plan.batch_rows]
    ends = []
    for batch in _batches(asked, "train", [(sample, 0)] * (1 + _TIMED_BATCHES)):
        live(batch).logits.cpu()  # type: ignore[union-attr]
        ends.append(time.perf_counter())
    seconds = (ends[-1] - ends[0]) / _TIMED_BATCHES  # the first one warms up
    total = sum(block.rows for block in blocks)
    needed = sum(shard.rows * plan.tensors[shard.tensor].row_bytes for shard in missing)
    estimate_s = seconds / max(1, len(sample)) * total / accelerator.num_processes
    accelerator.print(
        f"{asked.directory}: {_per_row(plan)}; {plan.views} views of {plan.rows['train']} rows; {len(missing)} of "
        f"{sum(1 for _ in plan.all_shards())} files to write, {readable_size(needed)} of {readable_size(plan.total_bytes())}; "
        f"{readable_size(shutil.disk_usage(asked.directory).free)} free; about {estimate_s / 60:.1f} minutes"
    )


def _unlisted(whole: Mapping[str, str], manifest: Mapping[str, str], accelerator: Accelerator) -> list[str]:
    """This process's share of the files that a killed build has written, perhaps not to the disk itself."""
    return [name for name in whole if name not in manifest][accelerator.process_index :: accelerator.num_processes]


def _flush(directory: Path, names: list[str]) -> None:
    try:
        flush_shards(directory, names)
    except OSError as error:
        raise UserError(f"teacher.cache_dir: cannot write to {directory} ({error.strerror})") from None


def _per_row(plan: Plan) -> str:
    parts = ", ".join(f"{name} {spec.row_bytes}" for name, spec in plan.tensors.items())
    return f"{plan.row_bytes()} bytes per row and view ({parts})"
