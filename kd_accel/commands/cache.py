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

from kd_accel.cache.manifest import (
    find_manifest,
    flush_shards,
    lock_for_building,
    write_manifest,
)
from kd_accel.cache.reader import Reader
from kd_accel.cache.shard import damage, stored_checksum
from kd_accel.cache.spec import LOGITS, CacheSpec, Shard, Split
from kd_accel.cache.writer import Block, balanced_share, blocks_of, run_pass
from kd_accel.commands.cache_request import CacheSetup, cache_directory, set_up_cache
from kd_accel.commands.cache_specs import find_own_spec, frozen_projectors, write_requested_spec
from kd_accel.commands.teacher import (
    FrozenProjectors,
    live_teacher,
)
from kd_accel.config.schema import RunConfig
from kd_accel.data.datamodule import view_transform
from kd_accel.data.loader import load_batches
from kd_accel.distributed import (
    Accelerator,
    gathered,
    leave_processes,
    on_main_process,
    patient_group,
    peers_needed,
    start_processes,
)
from kd_accel.errors import UserError
from kd_accel.io.files import readable_size, remove_leftovers
from kd_accel.models.kernels import choose_kernels
from kd_accel.teacher.teacher import LiveTeacher
from kd_accel.training.progress import SampleProgress
from kd_accel.types import Batch

_TIMED_BATCHES = 2


def run_cache_build(config: RunConfig) -> None:
    """Write what the cache of this config lacks: all of it, further views or layers, or files that are damaged."""
    choose_kernels(deterministic=config.train.deterministic, tf32=config.train.tf32)
    accelerator = start_processes(config.train.precision, seed=config.seed, timeout_s=config.train.timeout_s)
    with ExitStack() as stack:
        stack.enter_context(peers_needed(accelerator, lambda: "while it built a cache"))
        _lock(cache_directory(config), accelerator, stack)
        setup = set_up_cache(config, accelerator)
        found = on_main_process(accelerator, lambda: find_own_spec(setup))
        frozen = frozen_projectors(setup, found)
        cache_spec, samples = on_main_process(accelerator, lambda: write_requested_spec(setup, found, frozen))
        manifest = on_main_process(accelerator, lambda: find_manifest(setup.directory, cache_spec))
        patient = patient_group(accelerator)
        whole, missing = checked(setup, cache_spec, manifest, group=patient)
        _flush(setup.directory, _unlisted(whole, manifest, accelerator))
        if missing:
            on_main_process(accelerator, lambda: remove_leftovers(setup.directory))
            whole |= _write(setup, cache_spec, frozen, samples, missing, group=patient)
        else:
            is_listed = manifest.keys() == whole.keys()
            remark = "nothing to do" if is_listed else "manifest.json written"
            accelerator.print(f"{setup.directory}: complete, {len(whole)} files checked; {remark}")
        on_main_process(accelerator, lambda: _finish(setup, cache_spec, samples["test"], whole))
    leave_processes(accelerator)


def _lock(directory: Path, accelerator: Accelerator, stack: ExitStack) -> None:
    """Rank 0 first, and its refusal is everybody's."""
    held: list[int] = []
    on_main_process(accelerator, lambda: held.append(lock_for_building(directory, 0)))
    if not accelerator.is_main_process:
        held.append(lock_for_building(directory, accelerator.process_index))
    stack.callback(os.close, held[0])


def checked(
    setup: CacheSetup, cache_spec: CacheSpec, manifest: Mapping[str, str], *, group: Any
) -> tuple[dict[str, str], list[Shard]]:
    """({file that is whole: its checksum}, files that are not), every byte read, each process a share of the files."""
    shards = list(cache_spec.all_shards())
    own: list[tuple[int, str | None]] = []
    for index in _own_share(
        [shard.samples * cache_spec.tensors[shard.tensor].sample_bytes for shard in shards], setup.accelerator
    ):
        shard = shards[index]
        is_whole = damage(setup.directory, cache_spec, shard, checksum=manifest.get(shard.name)) is None
        own.append((index, stored_checksum(setup.directory, cache_spec, shard) if is_whole else None))
    found = dict(gathered(own, group=group))
    whole = {shards[index].name: checksum for index, checksum in found.items() if checksum is not None}
    return whole, [shard for index, shard in enumerate(shards) if found[index] is None]


def _finish(setup: CacheSetup, cache_spec: CacheSpec, samples: np.ndarray, files: Mapping[str, str]) -> None:
    """Write the manifest, with the teacher's accuracy on the cached test samples, from the stored logits."""
    logits = Reader(setup.directory, cache_spec, "test", samples, (LOGITS,)).read(0, samples)[LOGITS].values
    accuracy = np.mean(logits.argmax(1).numpy() == setup.data.test.labels[samples])
    write_manifest(setup.directory, cache_spec, files, teacher_accuracy=float(accuracy))


def _write(
    setup: CacheSetup,
    cache_spec: CacheSpec,
    frozen: FrozenProjectors,
    samples: Mapping[Split, np.ndarray],
    missing: Sequence[Shard],
    *,
    group: Any,
) -> dict[str, str]:
    """Let the teacher answer for the blocks of this process, flush its files to the disk; returns the checksums of all."""
    accelerator = setup.accelerator
    blocks = blocks_of(missing)
    own = [blocks[index] for index in _own_share([block.samples for block in blocks], accelerator)]
    layers = {name: name for name in cache_spec.tensors if name != LOGITS and any(shard.tensor == name for shard in missing)}
    projectors = {layer: module for layer, module in frozen.modules.items() if layer in layers}
    live = live_teacher(setup.config, setup.model, setup.normalize, accelerator, layers=layers, projectors=projectors)
    try:
        _announce(setup, cache_spec, blocks, missing, live, samples)
        progress = SampleProgress(
            str(setup.directory), total_samples=sum(block.samples for block in own), is_main=accelerator.is_main_process
        )
        started_at = time.perf_counter()
        checksums = run_pass(
            own,
            directory=setup.directory,
            cache_spec=cache_spec,
            samples=samples,
            teacher=live,
            batches_of=partial(_batches, setup),
            advance=progress.advance,
        )
        progress.close()
        _flush(setup.directory, list(checksums))
        live.check_unchanged()
    finally:
        live.close()
    written = dict(gathered(list(checksums.items()), group=group))
    total = sum(block.samples for block in blocks)
    elapsed_s = time.perf_counter() - started_at
    accelerator.print(f"{setup.directory}: {total} samples in {elapsed_s:.0f} s ({total / elapsed_s:.0f} samples/s)")
    return written


def _own_share(sizes: Sequence[int], accelerator: Accelerator) -> list[int]:
    return balanced_share(sizes, rank=accelerator.process_index, world_size=accelerator.num_processes)


def _batches(setup: CacheSetup, split: Split, shares: Sequence[tuple[np.ndarray, int]]) -> Iterator[Batch]:
    is_train, data, config = split == "train", setup.data, setup.config
    batches = load_batches(
        data.test if split == "test" else data.train,
        view_transform(config.data) if is_train else None,
        shares,
        num_workers=config.data.num_workers,
        pin_memory=setup.accelerator.device.type == "cuda",
    )
    return (batch.to(setup.accelerator.device, non_blocking=True) for batch in batches)


def _announce(
    setup: CacheSetup,
    cache_spec: CacheSpec,
    blocks: Sequence[Block],
    missing: Sequence[Shard],
    live: LiveTeacher,
    samples: Mapping[Split, np.ndarray],
) -> None:
    """Before the work starts: how much, where to, how long."""
    accelerator = setup.accelerator
    sample = samples["train"][: cache_spec.batch_samples]
    ends = []
    for batch in _batches(setup, "train", [(sample, 0)] * (1 + _TIMED_BATCHES)):
        live(batch).logits.cpu()  # type: ignore[union-attr]
        ends.append(time.perf_counter())
    seconds = (ends[-1] - ends[0]) / _TIMED_BATCHES  # the first one warms up
    total = sum(block.samples for block in blocks)
    needed = sum(shard.samples * cache_spec.tensors[shard.tensor].sample_bytes for shard in missing)
    estimate_s = seconds / max(1, len(sample)) * total / accelerator.num_processes
    accelerator.print(
        f"{setup.directory}: {_per_sample(cache_spec)}; {cache_spec.views} views of {cache_spec.samples['train']} samples; {len(missing)} of "
        f"{sum(1 for _ in cache_spec.all_shards())} files to write, {readable_size(needed)} of {readable_size(cache_spec.total_bytes())}; "
        f"{readable_size(shutil.disk_usage(setup.directory).free)} free; about {estimate_s / 60:.1f} minutes"
    )


def _unlisted(whole: Mapping[str, str], manifest: Mapping[str, str], accelerator: Accelerator) -> list[str]:
    """This process's share of the files that a killed build has written, perhaps not to the disk itself."""
    return [name for name in whole if name not in manifest][accelerator.process_index :: accelerator.num_processes]


def _flush(directory: Path, names: list[str]) -> None:
    try:
        flush_shards(directory, names)
    except OSError as error:
        raise UserError(f"teacher.cache_dir: cannot write to {directory} ({error.strerror})") from None


def _per_sample(cache_spec: CacheSpec) -> str:
    parts = ", ".join(f"{name} {spec.sample_bytes}" for name, spec in cache_spec.tensors.items())
    return f"{cache_spec.sample_bytes()} bytes per sample and view ({parts})"
