"""Verification of a cache: every byte against its checksum, and a few samples recomputed by the live teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_accel.cache.manifest import read_manifest, read_samples, read_targets
from kd_accel.cache.reader import OpenCache
from kd_accel.cache.shard import RELATIVE_ERROR, find_damage, stored_checksum
from kd_accel.cache.spec import LOGITS, CacheSpec, Shard
from kd_accel.config.schema import Precision
from kd_accel.data.datamodule import DataModule
from kd_accel.data.hashing import hashed_order
from kd_accel.data.unlabeled import sample_name
from kd_accel.distributed import Accelerator, gathered
from kd_accel.errors import UserError
from kd_accel.teacher.teacher import LiveTeacher
from kd_accel.types import TeacherOutput

_PURPOSE = 41
_RECOMPUTED_SAMPLES = 8


def check_shards(
    directory: Path,
    cache_spec: CacheSpec,
    checksums: Mapping[str, str],
    *,
    accelerator: Accelerator | None = None,
    group: Any = None,
) -> tuple[dict[str, str], list[Shard]]:
    """Check every byte of all shards; each process reads a share of the files.

    Args:
        directory: Directory of the cache.
        cache_spec: Spec of the cache.
        checksums: Checksums of the manifest, by file name.
        accelerator: The launch's `Accelerator`, whose processes share the work and must all call this function; None = this
            process alone.
        group: Process group for the exchange, as `patient_group` returns it.

    Returns:
        ({name of an intact file: checksum}, shards that are missing or damaged), equal on all processes.
    """
    shards = list(cache_spec.all_shards())
    sizes = [shard.samples * cache_spec.tensors[shard.tensor].sample_bytes for shard in shards]
    own: list[tuple[int, str | None]] = []
    for number in own_share(sizes, accelerator):
        shard = shards[number]
        is_intact = find_damage(directory, cache_spec, shard, checksum=checksums.get(shard.name)) is None
        own.append((number, stored_checksum(directory, cache_spec, shard) if is_intact else None))
    found = dict(own if accelerator is None else gathered(own, group=group))
    intact = {shards[number].name: checksum for number, checksum in found.items() if checksum is not None}
    return intact, [shard for number, shard in enumerate(shards) if found[number] is None]


def own_share(sizes: Sequence[int], accelerator: Accelerator | None) -> list[int]:
    """Return the numbers of the pieces of work of this process; without an accelerator, of all pieces."""
    if accelerator is None:
        return list(range(len(sizes)))
    return balanced_share(sizes, rank=accelerator.process_index, world_size=accelerator.num_processes)


def balanced_share(sizes: Sequence[int], *, rank: int, world_size: int) -> list[int]:
    """Divide pieces of work evenly over processes: the largest piece first, each to the least loaded process.

    A view is often one full file and one short file. Assigned in turns, one of two processes would get all full files.

    Args:
        sizes: Size of each piece.
        rank: Rank of this process.
        world_size: Number of processes.

    Returns:
        Numbers of the pieces of this process, ascending.

    References:
        Graham, "Bounds on Multiprocessing Timing Anomalies", SIAM Journal on Applied Mathematics, 1969 (LPT rule).
    """
    loads = [0] * world_size
    own = []
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        taker = loads.index(min(loads))
        loads[taker] += sizes[number]
        if taker == rank:
            own.append(number)
    return sorted(own)


def find_damaged_files(
    directory: Path, cache_spec: CacheSpec, *, accelerator: Accelerator | None = None, group: Any = None
) -> dict[str, str]:
    """Check every byte of a cache: samples, target functions and shards.

    Args:
        directory: Directory of the cache.
        cache_spec: Spec of the cache.
        accelerator: As in `check_shards`.
        group: As in `check_shards`.

    Returns:
        {name of a file that is missing, damaged or not listed in the manifest: what is wrong with the file}.

    Raises:
        UserError: If manifest.json is damaged.
    """
    files = read_manifest(directory, cache_spec)
    wrong = {}
    for name, read in (("samples.safetensors", read_samples), ("targets.safetensors", read_targets)):
        try:
            read(directory, cache_spec)
        except UserError as error:
            wrong[name] = str(error)
    _, missing = check_shards(directory, cache_spec, files, accelerator=accelerator, group=group)
    wrong |= {shard.name: find_damage(directory, cache_spec, shard, checksum=files.get(shard.name)) or "" for shard in missing}
    unlisted = (shard.name for shard in cache_spec.all_shards() if shard.name not in files)
    return wrong | {name: "is not listed in manifest.json, which a build writes last" for name in unlisted if name not in wrong}


def refuse_other_outputs(
    cache: OpenCache,
    live: LiveTeacher,
    data: DataModule,
    *,
    epochs: int,
    precision: Precision,
    rank: int,
    device: torch.device,
) -> float:
    """Recompute a few samples of the first and the last view, and compare them with the cache.

    Args:
        cache: The cache.
        live: Teacher of the cache on the device, with the target functions of `cache.layers`.
        data: Data whose training samples the cache covers.
        epochs: Epochs of the training, which limit the number of views in use.
        precision: Precision of the teacher's forward.
        rank: Rank of this process; each rank recomputes other samples.
        device: Device of the teacher.

    Returns:
        The largest difference, relative to the largest magnitude of the tensor.

    Raises:
        UserError: If a difference is larger than rounding explains.
    """
    indices = drawn_samples(data.training_samples, rank=rank)
    source, worst = cache.source("train"), 0.0
    for view in sorted({0, min(epochs, data.num_views or epochs) - 1}):
        batch = data.view_batch(indices, view).to(device)
        name, difference = largest_difference(source(batch), live(batch), source.ranges(batch))
        allowed = tolerance(cache.cache_spec.tensors[name].dtype, precision)
        if not difference <= allowed:
            samples = ", ".join(map(sample_name, indices.tolist()))
            raise UserError(
                f"teacher.cache.dir: the cache in {cache.directory} differs from the teacher's outputs: {name} of samples "
                f"[{samples}] in view {view} differs by {difference:.2g} of its largest value, and rounding explains at "
                f"most {allowed:.2g}. Check the files with `kd-accel cache verify`; if they are intact, build the cache again "
                "in another teacher.cache.dir"
            )
        worst = max(worst, difference)
    return worst


def drawn_samples(indices: np.ndarray, *, rank: int) -> np.ndarray:
    """Draw the few of these indices that a rank recomputes, ascending."""
    return np.sort(hashed_order((_PURPOSE, rank), indices)[:_RECOMPUTED_SAMPLES])


def largest_difference(cached: TeacherOutput, live: TeacherOutput, ranges: Mapping[str, float]) -> tuple[str, float]:
    """Find the tensor in which two outputs differ most.

    Args:
        cached: Output read from a cache.
        live: Output of the live teacher.
        ranges: Smallest divisor by layer: a larger magnitude of the live tensor replaces it.

    Returns:
        (name of the tensor, largest difference relative to the largest magnitude of the live tensor). The difference is
        infinite for NaN and for other shapes.
    """
    assert cached.logits is not None and live.logits is not None
    pairs = {LOGITS: (cached.logits, live.logits)}
    pairs |= {layer: (feature, live.features[layer]) for layer, feature in cached.features.items()}
    differences = {name: _relative(stored, fresh.float(), ranges.get(name, 0.0)) for name, (stored, fresh) in pairs.items()}
    worst = max(differences, key=lambda name: differences[name])
    return worst, differences[worst]


def tolerance(dtype: str, precision: str) -> float:
    """Return the limit of `largest_difference` between a cache and a forward in another batch shape or on another device."""
    return 2 * RELATIVE_ERROR[dtype] + {"float32": 5e-3, "fp16": 2e-2, "bf16": 6e-2}[precision]


def _relative(stored: Tensor, fresh: Tensor, largest: float) -> float:
    if stored.shape != fresh.shape:
        return math.inf
    relative = (stored - fresh).abs().max() / fresh.abs().max().clamp(min=max(largest, 1e-12))
    return relative.nan_to_num(nan=math.inf).item()
