"""`kd-accel cache build`: the teacher answers once, and what it said is kept."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import kd_accel
from kd_accel.commands.data import Data, load_data, num_views, view_function
from kd_accel.commands.networks import build_network
from kd_accel.commands.teacher import (
    FrozenProjectors,
    TapPairs,
    TeacherNetwork,
    fit_projectors,
    live_teacher,
    load_teacher,
    pair_taps,
    projectors_from,
    ready_teacher,
)
from kd_accel.commands.wanted import covered_rows, wanted_from_cache
from kd_accel.config import RunConfig, StorageType
from kd_accel.data.cuts import Rows
from kd_accel.data.loader import load_batches
from kd_accel.disk import remove_leftovers
from kd_accel.engine.cache_pass import Block, blocks_of, run_pass
from kd_accel.engine.progress import RowProgress
from kd_accel.engine.setup import Accelerator, gathered, leave_processes, on_main_process, set_kernel_choice, start_processes
from kd_accel.models.preprocess import Normalize
from kd_accel.teacher.cached import (
    Wanted,
    refuse_other_identity,
    refuse_other_rows,
    stored_type,
    wanted_tensors,
)
from kd_accel.teacher.identity import tensors_digest
from kd_accel.teacher.live import LiveTeacher
from kd_accel.teacher.store.layout import LOGITS, Plan, Shard, Split, TensorSpec, rows_in_a_shard
from kd_accel.teacher.store.manifest import (
    CachedRows,
    find_manifest,
    find_plan,
    flush_shards,
    lock_for_building,
    read_projectors,
    read_rows,
    refuse_other_owner,
    write_manifest,
    write_plan,
    write_projectors,
    write_rows,
)
from kd_accel.teacher.store.shards import damage, stored_checksum
from kd_accel.types import Batch, UserError

_TIMED_BATCHES = 2


@dataclass(frozen=True)
class Asked:
    """A config's cache, and the teacher who answers for it."""

    config: RunConfig
    directory: Path
    data: Data
    teacher: TeacherNetwork
    model: torch.nn.Module
    normalize: Normalize
    pairs: TapPairs
    wanted: Wanted
    accelerator: Accelerator


def run_cache_build(config: RunConfig) -> None:
    """Write what the cache of this config lacks: all of it, further views or taps, or files that are damaged."""
    set_kernel_choice(config.train)
    accelerator = start_processes(config.train.precision, seed=config.seed)
    with ExitStack() as stack:
        _lock(cache_directory(config), accelerator, stack)
        asked = ask(config, accelerator)
        found = on_main_process(accelerator, lambda: _found(asked))
        frozen = _frozen(asked, found)
        plan, rows = on_main_process(accelerator, lambda: _planned(asked, found, frozen))
        manifest = on_main_process(accelerator, lambda: find_manifest(asked.directory, plan))
        whole, missing = checked(asked, plan, manifest)
        if missing:
            on_main_process(accelerator, lambda: remove_leftovers(asked.directory))
            whole |= _write(asked, plan, frozen, rows, missing)
        else:
            is_listed = manifest.keys() == whole.keys()
            remark = "nothing to do" if is_listed else "manifest.json written"
            accelerator.print(f"{asked.directory}: complete, {len(whole)} files checked; {remark}")
        new = [name for name in whole if name not in manifest] + [shard.name for shard in missing]
        on_main_process(accelerator, lambda: _finish(asked.directory, plan, whole, new))
    leave_processes(accelerator)


def cache_directory(config: RunConfig) -> Path:
    if config.teacher is None or config.teacher.signals == "live" or config.teacher.cache_dir is None:
        raise UserError(
            "teacher.signals: this config uses no cache; set teacher.signals to cached or logits_cached, and teacher.cache_dir"
        )
    return Path(config.teacher.cache_dir)


def _lock(directory: Path, accelerator: Accelerator, stack: ExitStack) -> None:
    """Rank 0 first, and its refusal is everybody's."""
    held: list[int] = []
    on_main_process(accelerator, lambda: held.append(lock_for_building(directory, 0)))
    if not accelerator.is_main_process:
        held.append(lock_for_building(directory, accelerator.process_index))
    stack.callback(os.close, held[0])


def ask(config: RunConfig, accelerator: Accelerator) -> Asked:
    assert config.teacher is not None
    directory = cache_directory(config)
    data = load_data(config.data)
    network, _ = build_network(config, data)
    teacher = load_teacher(config.teacher, data)
    pairs = pair_taps(config, network, teacher.model) if config.teacher.signals == "cached" else TapPairs()
    views = num_views(config.data)
    assert views is not None, "checked by checks.problems"
    wanted = wanted_from_cache(config, data, teacher, pairs, views=views)
    model, normalize = ready_teacher(config, teacher, accelerator)
    return Asked(config, directory, data, teacher, model, normalize, pairs, wanted, accelerator)


def _found(asked: Asked) -> Plan | None:
    """The plan that stands there, if it is one of this cache."""
    plan = find_plan(asked.directory)
    if plan is None:
        return None
    find_manifest(asked.directory, plan)  # refuses what was tampered with, before anything is written
    refuse_other_identity(asked.directory, plan, asked.wanted)
    return plan


def _frozen(asked: Asked, found: Plan | None) -> FrozenProjectors:
    """The projectors that the cache has, and newly fitted ones for taps that it lacks."""
    kept, specs = {}, found.tensors if found else {}
    if found is not None:
        kept = projectors_from(on_main_process(asked.accelerator, lambda: _kept_projectors(asked.directory, found)))
    lacking = {tap: width for tap, width in asked.wanted.projected.items() if tap not in kept}
    _refuse_lost_projectors(asked.directory, specs, {*kept, *lacking})
    fitted = fit_projectors(asked.config, asked.data, asked.model, asked.normalize, lacking, asked.accelerator)
    for tap, module in fitted.modules.items():
        if tap in specs and specs[tap].projector != tensors_digest(module.state_dict()):
            raise UserError(
                f"teacher.cache_dir: projectors.safetensors of {asked.directory} is damaged, and the PCA at {tap} fitted again "
                "here is not the same; build with the config and on the machine of the first build, or remove the directory "
                "and build it anew"
            )
    explained = {tap: spec.explained for tap, spec in specs.items() if spec.explained is not None}
    for notice in fitted.notices:
        asked.accelerator.print(notice)
    both = FrozenProjectors({**kept, **fitted.modules}, {**explained, **fitted.explained})
    return both.to(asked.accelerator.device)


def _refuse_lost_projectors(directory: Path, specs: Mapping[str, TensorSpec], at_hand: set[str]) -> None:
    lost = [tap for tap, spec in specs.items() if spec.projector is not None and tap not in at_hand]
    if lost:
        raise UserError(
            f"teacher.cache_dir: projectors.safetensors of {directory} is missing or damaged, and this config does not ask for "
            f"all that it held ({', '.join(lost)}); build with a config that has these taps, which fits them again"
        )


def _kept_projectors(directory: Path, plan: Plan) -> dict[str, dict[str, torch.Tensor]]:
    try:
        return read_projectors(directory, plan)
    except UserError:
        return {}


def _planned(asked: Asked, found: Plan | None, frozen: FrozenProjectors) -> tuple[Plan, dict[Split, np.ndarray]]:
    """The plan with what this config asks for, and the rows; both on the disk."""
    specs = _specs(asked, frozen, dtype=_storage_type(asked, found))
    if found is None:
        plan, rows = _new_plan(asked, specs), dict(asked.wanted.rows)
        refuse_other_owner(asked.directory, plan)
    else:
        plan, rows = found.extended(views=asked.wanted.views, tensors=specs), _known_rows(asked, found)
    if found != plan:
        _refuse_too_large(asked.directory, plan)
    write_rows(asked.directory, rows)
    if frozen.modules:
        write_projectors(
            asked.directory,
            {tap: {name: value.cpu() for name, value in module.state_dict().items()} for tap, module in frozen.modules.items()},
        )
    write_plan(asked.directory, plan)
    return plan, {split: cached.rows for split, cached in rows.items()}


def _storage_type(asked: Asked, found: Plan | None) -> StorageType:
    """What the config says, else that of the cache which is there, else float16."""
    assert asked.config.teacher is not None
    stored = [spec.dtype for _, spec in sorted(found.tensors.items(), key=lambda item: item[0] == LOGITS)] if found else []
    return asked.config.teacher.dtype or (stored[0] if stored else "float16")


def _specs(asked: Asked, frozen: FrozenProjectors, *, dtype: StorageType) -> dict[str, TensorSpec]:
    feature = asked.config.distill.feature if asked.config.distill else None
    specs = {LOGITS: TensorSpec((len(asked.data.label_names),), stored_type(dtype, is_logits=True))}
    for tap in wanted_tensors(asked.wanted)[1:]:
        channels, *size = asked.pairs.shapes[tap]
        if tap not in asked.wanted.projected:
            specs[tap] = TensorSpec((channels, *size), dtype)
            continue
        assert feature is not None
        specs[tap] = TensorSpec(
            (asked.wanted.projected[tap], *size),
            dtype,
            projector=tensors_digest(frozen.modules[tap].state_dict()),
            raw_channels=channels,
            pca_images=feature.pca_images,
            explained=frozen.explained.get(tap),
        )
    return specs


def _new_plan(asked: Asked, specs: Mapping[str, TensorSpec]) -> Plan:
    config = asked.config
    assert config.teacher is not None
    rows = asked.wanted.rows
    batch_rows = config.teacher.cache_batch_size or config.train.batch_size // config.train.grad_accum_steps
    contents = {split: cached.digest for split, cached in rows.items()}
    return Plan(
        identity={**asked.wanted.identity, "data": {**asked.wanted.identity["data"], "contents": contents}},
        rows={split: len(cached.rows) for split, cached in rows.items()},
        views=asked.wanted.views,
        tensors=dict(specs),
        rows_per_shard=rows_in_a_shard(specs, shard_mib=config.teacher.shard_mib, batch_rows=batch_rows),
        batch_rows=batch_rows,
        recorded={
            "processes": asked.accelerator.num_processes,
            "device": str(asked.accelerator.device),
            "threads": torch.get_num_threads(),
            "versions": {"kd_accel": kd_accel.__version__, "torch": torch.__version__},
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        },
    )


def _known_rows(asked: Asked, found: Plan) -> dict[Split, CachedRows]:
    """The rows that the cache covers, which may be more than this config asks for; each must still be what it was."""
    try:
        stored = read_rows(asked.directory, found)
    except UserError:
        stored = dict(asked.wanted.rows)
        if {split: cached.digest for split, cached in stored.items()} != found.identity["data"]["contents"]:
            raise UserError(
                f"teacher.cache_dir: rows.safetensors of {asked.directory} is missing or damaged, and the rows of this config "
                "are not the ones that it held; build with the config of the first build, or name another cache_dir"
            ) from None
    for split, wanted in asked.wanted.rows.items():
        refuse_other_rows(asked.directory, split, stored[split], wanted)
    rows = {split: cached.rows for split, cached in stored.items()}
    for split, now in covered_rows(replace(asked.data, rows=Rows(rows["train"], rows["val"], rows["test"]))).items():
        refuse_other_rows(asked.directory, split, stored[split], now)
    return stored


def _refuse_too_large(directory: Path, plan: Plan) -> None:
    there = sum((directory / shard.name).stat().st_size for shard in plan.all_shards() if (directory / shard.name).is_file())
    needed, free = plan.total_bytes() - there, shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"teacher.cache_dir: {directory} would need another {readable_size(needed)}, but {readable_size(free)} are free "
            "there; use fewer data.views, a smaller teacher.dtype, direction both, signals logits_cached, or another disk"
        )


def checked(asked: Asked, plan: Plan, manifest: Mapping[str, str]) -> tuple[dict[str, str], list[Shard]]:
    """({file that is whole: its checksum}, files that are not), every byte read, each process a share of the files."""
    shards = list(plan.all_shards())
    rank, processes = asked.accelerator.process_index, asked.accelerator.num_processes
    own: list[tuple[int, str | None]] = []
    for index in range(rank, len(shards), processes):
        shard = shards[index]
        is_whole = damage(asked.directory, plan, shard, checksum=manifest.get(shard.name)) is None
        own.append((index, stored_checksum(asked.directory, plan, shard) if is_whole else None))
    found = dict(gathered(own))
    whole = {shards[index].name: checksum for index, checksum in found.items() if checksum is not None}
    return whole, [shard for index, shard in enumerate(shards) if found[index] is None]


def _write(
    asked: Asked,
    plan: Plan,
    frozen: FrozenProjectors,
    rows: Mapping[Split, np.ndarray],
    missing: Sequence[Shard],
) -> dict[str, str]:
    """Let the teacher answer for the blocks of this process; returns the checksums of all."""
    accelerator = asked.accelerator
    blocks = blocks_of(missing)
    own = blocks[accelerator.process_index :: accelerator.num_processes]
    taps = {name: name for name in plan.tensors if name != LOGITS and any(shard.tensor == name for shard in missing)}
    projectors = {tap: module for tap, module in frozen.modules.items() if tap in taps}
    live = live_teacher(asked.config, asked.model, asked.normalize, accelerator, taps=taps, projectors=projectors)
    try:
        _announce(asked, plan, blocks, missing, live, rows)
        progress = RowProgress(
            str(asked.directory), total_rows=sum(block.place[3] for block in own), is_main=accelerator.is_main_process
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
        live.check_unchanged()
    finally:
        live.close()
    written = dict(gathered(list(checksums.items())))
    total = sum(block.place[3] for block in blocks)
    elapsed_s = time.perf_counter() - started_at
    accelerator.print(f"{asked.directory}: {total} rows in {elapsed_s:.0f} s ({total / elapsed_s:.0f} rows/s)")
    return written


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
    total = sum(block.place[3] for block in blocks)
    needed = sum(shard.rows * plan.tensors[shard.tensor].row_bytes for shard in missing)
    estimate_s = seconds / max(1, len(sample)) * total / accelerator.num_processes
    accelerator.print(
        f"{asked.directory}: {_per_row(plan)}; {plan.views} views of {plan.rows['train']} rows; {len(missing)} of "
        f"{sum(1 for _ in plan.all_shards())} files to write, {readable_size(needed)} of {readable_size(plan.total_bytes())}; "
        f"{readable_size(shutil.disk_usage(asked.directory).free)} free; about {estimate_s / 60:.1f} minutes"
    )


def _finish(directory: Path, plan: Plan, checksums: Mapping[str, str], written: list[str]) -> None:
    try:
        flush_shards(directory, written)
    except OSError as error:
        raise UserError(f"teacher.cache_dir: cannot write to {directory} ({error.strerror})") from None
    write_manifest(directory, plan, checksums)


def _per_row(plan: Plan) -> str:
    parts = ", ".join(f"{name} {spec.row_bytes}" for name, spec in plan.tensors.items())
    return f"{plan.row_bytes()} bytes per row and view ({parts})"


def readable_size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
