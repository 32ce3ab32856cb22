"""One pass of a teacher over views of samples, by all processes, into the files of a cache.

In: what is missing. Out: files, each written once and whole. Work is cut into blocks, the samples of one file; a process that is
killed loses the block it is at. What is in a file does not depend on who writes it: batches are cut from the block, always as
long as the plan says (the last one of a block is filled up with its own last sample), so no kernel sees another shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kd_accel.cache.codec import encode
from kd_accel.cache.shard import write_shard
from kd_accel.cache.spec import LOGITS, CacheSpec, Shard, Split
from kd_accel.errors import UserError
from kd_accel.types import Batch, TeacherOutput, TeacherSource

BatchesOf = Callable[[Split, Sequence[tuple[np.ndarray, int]]], Iterator[Batch]]
"""(split, [(samples, view), ...]) -> the batches, on the teacher's device."""


@dataclass(frozen=True)
class Block:
    """Samples of one split and view, and the files that lack them."""

    shards: tuple[Shard, ...]

    @property
    def place(self) -> tuple[Split, int, int, int]:
        """(split, view, first sample, samples)."""
        shard = self.shards[0]
        return shard.split, shard.view, shard.first, shard.samples

    @property
    def samples(self) -> int:
        return self.shards[0].samples


def blocks_of(shards: Iterable[Shard]) -> list[Block]:
    """Missing files, those of the same samples together: the teacher answers once for all of them."""
    together: dict[tuple[str, int, int], list[Shard]] = {}
    for shard in shards:
        together.setdefault((shard.split, shard.view, shard.first), []).append(shard)
    return [Block(tuple(group)) for group in together.values()]


def balanced_share(sizes: Sequence[int], *, rank: int, world_size: int) -> list[int]:
    """Which of the pieces of work a process takes, ascending, so that all have about as much: the largest go first.

    A view is often one full file and a short one; dealt out in turns, one of two processes would get all the full ones.
    """
    loads = [0] * world_size
    own = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        taker = loads.index(min(loads))
        loads[taker] += sizes[index]
        if taker == rank:
            own.append(index)
    return sorted(own)


def run_pass(
    blocks: Sequence[Block],
    *,
    directory: Path,
    cache_spec: CacheSpec,
    samples: Mapping[Split, np.ndarray],
    teacher: TeacherSource,
    batches_of: BatchesOf,
    advance: Callable[[int], None],
) -> dict[str, str]:
    """Write the files of these blocks, one block after the other. Returns {file name: checksum of its data}.

    samples: int64, ascending, those that each split covers. teacher: features by the teacher's layer. advance: told how many samples
    are done. Raises UserError where the disk refuses; what was whole before stays.
    """
    checksums: dict[str, str] = {}
    for split, group in _by_split(blocks):
        cuts = [_cut(cache_spec, samples[split], block) for block in group]
        batches = batches_of(split, [share for shares, _ in cuts for share in shares])
        for block, (shares, last) in zip(group, cuts, strict=True):
            parts: dict[str, list[Tensor]] = {shard.tensor: [] for shard in block.shards}
            for index in range(len(shares)):
                batch = next(batches)
                kept = last if index == len(shares) - 1 else len(batch.samples)
                _collect(parts, teacher(batch), kept)
                advance(kept)
            checksums |= _write(directory, cache_spec, block, parts)
    return checksums


def _by_split(blocks: Sequence[Block]) -> Iterator[tuple[Split, list[Block]]]:
    splits = dict.fromkeys(block.place[0] for block in blocks)
    return ((split, [block for block in blocks if block.place[0] == split]) for split in splits)


def _cut(cache_spec: CacheSpec, samples: np.ndarray, block: Block) -> tuple[list[tuple[np.ndarray, int]], int]:
    """(samples and view of each batch of a block, how many samples of the last one are no filling)."""
    _, view, first, count = block.place
    own = samples[first : first + count]
    missing = -count % cache_spec.batch_samples
    filled = np.concatenate([own, np.repeat(own[-1:], missing)])
    shares = [(part, view) for part in np.split(filled, len(filled) // cache_spec.batch_samples)]
    return shares, cache_spec.batch_samples - missing


def _collect(parts: dict[str, list[Tensor]], teacher_output: TeacherOutput, kept: int) -> None:
    assert teacher_output.logits is not None
    for tensor, collected in parts.items():
        values = teacher_output.logits if tensor == LOGITS else teacher_output.features[tensor]
        collected.append(values[:kept].float().cpu())


def _write(directory: Path, cache_spec: CacheSpec, block: Block, parts: dict[str, list[Tensor]]) -> dict[str, str]:
    checksums = {}
    for shard in block.shards:
        values, scale = encode(torch.cat(parts[shard.tensor]), cache_spec.tensors[shard.tensor].dtype, name=shard.tensor)
        try:
            checksums[shard.name] = write_shard(directory, cache_spec, shard, values, scale)
        except OSError as error:
            raise UserError(
                f"teacher.cache_dir: cannot write {directory / shard.name} ({error.strerror}); make room or see that it may be "
                "written, and start the build again: it goes on with the files that are whole"
            ) from None
    return checksums
