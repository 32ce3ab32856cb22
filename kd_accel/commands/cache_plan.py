"""What a cache is to hold: the plan that stands there, or a new one, with what a config asks for; its rows and projectors."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import kd_accel
from kd_accel.commands.teacher import (
    FrozenProjectors,
    fit_projectors,
    projectors_from,
)
from kd_accel.commands.wanted import Asked, covered_rows
from kd_accel.config import StorageType
from kd_accel.data.cuts import Rows
from kd_accel.disk import readable_size
from kd_accel.engine.setup import on_main_process
from kd_accel.teacher.cached import (
    refuse_other_identity,
    refuse_other_rows,
    stored_type,
    wanted_tensors,
)
from kd_accel.teacher.identity import tensors_digest
from kd_accel.teacher.store.layout import LOGITS, MAX_FILES, Plan, Split, TensorSpec, rows_in_a_shard
from kd_accel.teacher.store.manifest import (
    CachedRows,
    find_manifest,
    find_plan,
    read_projectors,
    read_rows,
    refuse_other_owner,
    write_plan,
    write_projectors,
    write_rows,
)
from kd_accel.types import UserError


def find_own_plan(asked: Asked) -> Plan | None:
    """The plan that stands there, if it is one of this cache."""
    plan = find_plan(asked.directory)
    if plan is None:
        return None
    find_manifest(asked.directory, plan)  # refuses what was tampered with, before anything is written
    refuse_other_identity(asked.directory, plan, asked.wanted)
    return plan


def frozen_projectors(asked: Asked, found: Plan | None) -> FrozenProjectors:
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


def write_wanted_plan(asked: Asked, found: Plan | None, frozen: FrozenProjectors) -> tuple[Plan, dict[Split, np.ndarray]]:
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
    if plan.num_files() > MAX_FILES:
        raise UserError(
            f"teacher.cache_dir: this cache would be {plan.num_files()} files, and {MAX_FILES} are the most; raise "
            "teacher.shard_mib, or use fewer data.views"
        )
    there = sum((directory / shard.name).stat().st_size for shard in plan.all_shards() if (directory / shard.name).is_file())
    needed, free = plan.total_bytes() - there, shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"teacher.cache_dir: {directory} would need another {readable_size(needed)}, but {readable_size(free)} are free "
            "there; use fewer data.views, a smaller teacher.dtype, direction both, signals logits_cached, or another disk"
        )
