"""Build of a cache: one pass of the teacher over all missing files, shared by all processes.

The work is divided into blocks. A block has the samples of one file, and the missing files of all tensors for these samples.
The content of a file does not depend on the process that writes it: batches are taken from one block and always have the batch
size of the spec (the last batch is padded with the block's last sample), so every kernel runs on the same shapes.

Threads encode, check, write and flush the files of a block while the teacher computes the next one. So a process holds the
outputs of two blocks on the teacher's device, in the storage type; int8 is held in float32, and twice in the block that is
written. A process that is killed loses the incomplete files of both blocks; the next build keeps every complete file.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_accel.cache.build_spec import CacheBuild, Samples, find_own_spec, prepare_targets, write_requested_spec
from kd_accel.cache.manifest import CachedSamples, find_manifest, flush_shards, lock_for_building, write_manifest
from kd_accel.cache.reader import Reader
from kd_accel.cache.shard import TORCH_TYPE, encode, read_rows, value_range, write_shard
from kd_accel.cache.spec import LOGITS, CacheSpec, Shard
from kd_accel.cache.verify import check_shards, drawn_samples, largest_difference, own_share, tolerance
from kd_accel.data.splits import Split
from kd_accel.distributed import Accelerator, gathered, on_main_process, patient_group
from kd_accel.errors import UserError
from kd_accel.io.files import flush, readable_size, remove_leftovers
from kd_accel.losses.targets import TargetFunction
from kd_accel.models.feature_extractor import compile_with_hooks
from kd_accel.teacher.graphed import GraphedTeacher
from kd_accel.teacher.teacher import LiveTeacher
from kd_accel.types import Batch, TeacherOutput, TeacherSource

_TIMED_BATCHES = 2
_WRITERS = 4
"""Threads that write files."""

Batches = Callable[[Split, Sequence[tuple[np.ndarray, int]]], Iterator[Batch]]
"""Function (split, [(indices, view), ...]) -> one batch for each pair, on the teacher's device."""

OpenProgress = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Function (number of samples of this process) -> context of a function that is called with the number of samples just done."""


@dataclass(frozen=True)
class Block:
    """Samples of one split and view, and their missing files, which are filled from the same forwards of the teacher."""

    shards: tuple[Shard, ...]

    @property
    def split(self) -> Split:
        """Split of the samples."""
        return self.shards[0].split

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.shards[0].samples


@contextmanager
def locked_for_building(directory: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold the lock of a cache on every process, rank 0 first.

    Raises:
        UserError: If another build is running, or the directory cannot be created or modified; on every process.
    """
    held: list[int] = []
    on_main_process(accelerator, lambda: held.append(lock_for_building(directory, 0)))
    if not accelerator.is_main_process:
        held.append(lock_for_building(directory, accelerator.process_index))
    try:
        yield
    finally:
        os.close(held[0])


@contextmanager
def no_progress(total_samples: int) -> Iterator[Callable[[int], None]]:
    """Show no progress."""
    yield lambda samples: None


def build_cache(build: CacheBuild, *, progress: OpenProgress = no_progress) -> None:
    """Write what a cache lacks: all files, further views or layers, or damaged files.

    Every process must call this function, and hold the lock.

    Args:
        build: Parts of the build.
        progress: Display of the progress of this process.

    Raises:
        UserError: If the directory holds another cache, or a file cannot be written; complete files are kept.
    """
    accelerator, directory = build.accelerator, build.directory
    found = on_main_process(accelerator, lambda: find_own_spec(build))
    targets = prepare_targets(build, found)
    cache_spec, samples = on_main_process(accelerator, lambda: write_requested_spec(build, found, targets))
    manifest = on_main_process(accelerator, lambda: find_manifest(directory, cache_spec))
    group = patient_group(accelerator)
    intact, missing = check_shards(directory, cache_spec, manifest, accelerator=accelerator, group=group)
    _flush(directory, _unlisted(intact, manifest, accelerator))
    on_main_process(accelerator, lambda: _refuse_other_teacher(build, cache_spec, samples, intact, targets))
    if missing:
        on_main_process(accelerator, lambda: remove_leftovers(directory))
        intact |= _write_missing(build, cache_spec, samples, missing, targets, progress, group=group)
    else:
        remark = "nothing to do" if manifest.keys() == intact.keys() else "manifest.json written again"
        accelerator.print(f"{directory}: complete, {len(intact)} files checked; {remark}")
    on_main_process(accelerator, lambda: _write_manifest(build, cache_spec, samples["test"], intact))


def _refuse_other_teacher(
    build: CacheBuild,
    cache_spec: CacheSpec,
    samples: Samples,
    intact: Mapping[str, str],
    targets: Mapping[str, TargetFunction],
) -> None:
    """Raise UserError if the teacher computes other outputs than those of the first samples with existing files.

    The fingerprint has weights and settings of the network, but not its code.
    """
    blocks = blocks_of(shard for shard in cache_spec.all_shards() if shard.name in intact)
    block = next((each for each in blocks if each.shards[0].tensor == LOGITS), None)
    if block is None:
        return
    first = block.shards[0]
    indices = samples[block.split].indices[first.first : first.first + block.samples]
    drawn = drawn_samples(indices, rank=0)
    rows = np.searchsorted(indices, drawn).tolist()
    stored = {shard.tensor: read_rows(build.directory, cache_spec, shard, rows) for shard in block.shards}
    own = {layer: target for layer, target in targets.items() if layer in stored}
    image_size, device = build.data.transform.image_size, build.accelerator.device
    live = LiveTeacher(build.network, build.normalize, targets=own, autocast=build.accelerator.autocast, image_size=image_size)
    try:
        fresh = live(next(_batches(build, block.split, [(drawn, first.view)])))
    finally:
        live.close()
    held = TeacherOutput(stored[LOGITS].to(device), {layer: stored[layer].to(device) for layer in own})
    ranges = {shard.tensor: value_range(build.directory, cache_spec, shard) for shard in block.shards}
    name, difference = largest_difference(held, fresh, ranges)
    allowed = tolerance(cache_spec.tensors[name].dtype, cache_spec.fingerprint_fields["numerics"]["precision"])
    if not difference <= allowed:
        raise UserError(
            f"teacher.cache.dir: the teacher computes other {name} than {build.directory} holds for view {first.view} of the "
            f"{block.split} samples: they differ by {difference:.2g} of the largest value, and rounding explains at most "
            f"{allowed:.2g}. Weights and settings are equal, so the code of its network, a library or a file has changed: "
            "check the files with `kd-accel cache verify`, or build in another directory"
        )


def _write_missing(
    build: CacheBuild,
    cache_spec: CacheSpec,
    samples: Samples,
    missing: Sequence[Shard],
    targets: Mapping[str, TargetFunction],
    progress: OpenProgress,
    *,
    group: Any,
) -> dict[str, str]:
    """Run the teacher over this process's share of the missing blocks, and return the checksums of all processes."""
    accelerator, blocks = build.accelerator, blocks_of(missing)
    own = [blocks[number] for number in own_share([block.samples for block in blocks], accelerator)]
    layers = {shard.tensor for shard in missing} - {LOGITS}
    live = LiveTeacher(
        build.network,
        build.normalize,
        targets={layer: target for layer, target in targets.items() if layer in layers},
        autocast=accelerator.autocast,
        image_size=build.data.transform.image_size,
    )
    if build.is_compiled:
        compile_with_hooks(live.network)
    try:
        _announce(build, cache_spec, samples["train"].indices, missing, live)
        started_at = time.perf_counter()
        with progress(sum(block.samples for block in own)) as advance:
            checksums = write_blocks(
                own,
                directory=build.directory,
                cache_spec=cache_spec,
                samples=samples,
                teacher=_graphed(live, build),
                batches=partial(_batches, build),
                advance=advance,
            )
        _flush(build.directory, list(checksums))
        live.check_unchanged()
    finally:
        live.close()
    checksums = dict(gathered(list(checksums.items()), group=group))
    total, elapsed_s = sum(block.samples for block in blocks), time.perf_counter() - started_at
    accelerator.print(f"{build.directory}: {total} samples in {elapsed_s:.0f} s ({total / elapsed_s:.0f} samples/s)")
    return checksums


def _graphed(live: LiveTeacher, build: CacheBuild) -> TeacherSource:
    """Return the teacher, whose forward is replayed as a CUDA graph where that is possible."""
    is_possible = build.accelerator.device.type == "cuda" and not build.is_compiled
    return GraphedTeacher(live, build.accelerator.print) if build.is_graphed and is_possible else live


def _write_manifest(build: CacheBuild, cache_spec: CacheSpec, test: CachedSamples, files: Mapping[str, str]) -> None:
    """Write the manifest, with the teacher's accuracy on the cached test samples, computed from the stored logits."""
    accuracy, indices = None, test.indices
    if (build.data.test.labels[indices] >= 0).any():
        logits = Reader(build.directory, cache_spec, "test", indices, (LOGITS,)).read(0, indices)[LOGITS].values
        accuracy = float(np.mean(logits.argmax(1).numpy() == build.data.test.labels[indices]))
    write_manifest(build.directory, cache_spec, files, teacher_accuracy=accuracy)


def blocks_of(shards: Iterable[Shard]) -> list[Block]:
    """Group files by their samples."""
    groups: dict[tuple[str, int, int], list[Shard]] = {}
    for shard in shards:
        groups.setdefault((shard.split, shard.view, shard.first), []).append(shard)
    return [Block(tuple(group)) for group in groups.values()]


def write_blocks(
    blocks: Sequence[Block],
    *,
    directory: Path,
    cache_spec: CacheSpec,
    samples: Samples,
    teacher: TeacherSource,
    batches: Batches,
    advance: Callable[[int], None],
) -> dict[str, str]:
    """Compute blocks one after the other, and write the files of each while the next one is computed.

    Args:
        blocks: The blocks.
        directory: Directory of the cache.
        cache_spec: Spec of the cache.
        samples: Samples that the cache covers, by split.
        teacher: Source of the outputs, with the features of all missing layers.
        batches: Function that creates the batches.
        advance: Function that is called with the number of samples just done.

    Returns:
        {file name: checksum of the data}.

    Raises:
        UserError: If a file cannot be written, or an output cannot be stored; complete files are kept.
    """
    checksums: dict[str, str] = {}
    writing: dict[str, Future[str]] = {}
    # Leaving the context waits for the files that are being written, also after an error.
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="cache") as threads:
        for outputs in _compute_blocks(blocks, cache_spec, samples, teacher, batches, advance):
            checksums |= _finish(writing)
            writing = {
                shard.name: threads.submit(_write_file, directory, cache_spec, shard, values)
                for shard, values in outputs.items()
            }
        checksums |= _finish(writing)
    return checksums


def _compute_blocks(
    blocks: Sequence[Block],
    cache_spec: CacheSpec,
    samples: Samples,
    teacher: TeacherSource,
    batches: Batches,
    advance: Callable[[int], None],
) -> Iterator[dict[Shard, Tensor]]:
    """Yield the outputs for the files of each block, on the teacher's device."""
    for split in dict.fromkeys(block.split for block in blocks):
        group = [block for block in blocks if block.split == split]
        shares = [_shares(cache_spec, samples[split].indices, block) for block in group]
        batch_iterator = batches(split, [share for part in shares for share in part])
        for block in group:
            outputs: dict[Shard, Tensor] = {}
            for first in range(0, block.samples, cache_spec.batch_samples):
                kept = min(cache_spec.batch_samples, block.samples - first)
                _store(outputs, block, cache_spec, teacher(next(batch_iterator)), slice(first, first + kept))
                advance(kept)
            yield outputs


def _shares(cache_spec: CacheSpec, indices: np.ndarray, block: Block) -> list[tuple[np.ndarray, int]]:
    """Return (indices, view) of each batch of a block; the last batch is padded with the block's last sample."""
    shard, length = block.shards[0], cache_spec.batch_samples
    own = indices[shard.first : shard.first + shard.samples]
    padded = np.concatenate([own, np.repeat(own[-1:], -len(own) % length)])
    return [(part, shard.view) for part in np.split(padded, len(padded) // length)]


def _store(outputs: dict[Shard, Tensor], block: Block, cache_spec: CacheSpec, output: TeacherOutput, rows: slice) -> None:
    """Store the output for a batch in the rows of each file, cast to the storage type; int8 is encoded with all rows."""
    assert output.logits is not None
    for shard in block.shards:
        values = output.logits if shard.tensor == LOGITS else output.features[shard.tensor]
        spec = cache_spec.tensors[shard.tensor]
        if shard not in outputs:
            dtype = torch.float32 if spec.is_scaled else TORCH_TYPE[spec.dtype]
            outputs[shard] = torch.empty((shard.samples, *spec.shape), dtype=dtype, device=values.device)
        assert values.shape[1:] == spec.shape, values.shape
        outputs[shard][rows] = values[: rows.stop - rows.start]


def _write_file(directory: Path, cache_spec: CacheSpec, shard: Shard, values: Tensor) -> str:
    """Encode the values of a file on their device, copy them to the host, write and flush them; return the checksum."""
    # All threads use the default stream of a GPU, so that these kernels start after those that compute the values.
    stored, scale = encode(values, cache_spec.tensors[shard.tensor].dtype, name=shard.tensor)
    try:
        checksum = write_shard(directory, cache_spec, shard, _on_host(stored), scale if scale is None else scale.cpu())
        flush(directory / shard.name)  # while the teacher computes; `flush_shards` then has little left to do
    except OSError as error:
        raise UserError(
            f"teacher.cache.dir: cannot write {directory / shard.name} ({error.strerror}); free disk space or check "
            "permissions, then run `kd-accel cache build` again, which keeps the complete files"
        ) from None
    return checksum


def _on_host(values: Tensor) -> Tensor:
    """Copy values from a GPU to page-locked memory, which a GPU writes faster than other memory."""
    return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values) if values.is_cuda else values


def _finish(writing: Mapping[str, Future[str]]) -> dict[str, str]:
    """Wait until files are written, and return their checksums by name. Raises UserError if one could not be written."""
    return {name: checksum.result() for name, checksum in writing.items()}


def _batches(build: CacheBuild, split: Split, shares: Sequence[tuple[np.ndarray, int]]) -> Iterator[Batch]:
    device = build.accelerator.device
    batches = build.data.batches(split, shares, pin_memory=device.type == "cuda")
    return (batch.to(device, non_blocking=True) for batch in batches)


def _announce(build: CacheBuild, cache_spec: CacheSpec, train: np.ndarray, missing: Sequence[Shard], live: LiveTeacher) -> None:
    """Print the size of the files to write and an estimate of the time, before the work starts."""
    drawn = train[: cache_spec.batch_samples]
    ends = []
    for batch in _batches(build, "train", [(drawn, 0)] * (1 + _TIMED_BATCHES)):
        output = live(batch)
        assert output.logits is not None
        output.logits.cpu()  # synchronizes the device
        ends.append(time.perf_counter())
    batch_s = (ends[-1] - ends[0]) / _TIMED_BATCHES  # the first batch is a warm-up
    total = sum(block.samples for block in blocks_of(missing))
    needed = sum(shard.samples * cache_spec.tensors[shard.tensor].sample_bytes for shard in missing)
    estimate_s = batch_s / max(1, len(drawn)) * total / build.accelerator.num_processes
    tensors = ", ".join(f"{name} {spec.sample_bytes}" for name, spec in cache_spec.tensors.items())
    build.accelerator.print(
        f"{build.directory}: {cache_spec.sample_bytes()} bytes per sample and view ({tensors}); {cache_spec.views} views of "
        f"{cache_spec.viewed_samples()} samples; {len(missing)} of {cache_spec.num_files()} files to write, "
        f"{readable_size(needed)} of {readable_size(cache_spec.total_bytes())}; "
        f"{readable_size(shutil.disk_usage(build.directory).free)} free; about {estimate_s / 60:.1f} minutes"
    )


def _unlisted(intact: Mapping[str, str], manifest: Mapping[str, str], accelerator: Accelerator) -> list[str]:
    """Return this process's share of the files of a killed build, which may not have been flushed to the disk."""
    return [name for name in intact if name not in manifest][accelerator.process_index :: accelerator.num_processes]


def _flush(directory: Path, names: list[str]) -> None:
    try:
        flush_shards(directory, names)
    except OSError as error:
        raise UserError(
            f"teacher.cache.dir: cannot write to {directory} ({error.strerror}); free disk space, then run `kd-accel cache "
            "build` again"
        ) from None
