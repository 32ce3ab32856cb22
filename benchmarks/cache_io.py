"""Speed of reading and building a cache: `python -m benchmarks.cache_io`.

Reading: batches of 256 random samples out of 50,000, with a warm page cache. A sample has 7,680 float16 values, the features of
ResNet-50 at 32x32 with direction `both`.
    reader          the Reader of kd_accel, on shards of 48 MiB that are mapped into memory; each batch in new memory
    index_select    torch.index_select on one tensor in memory, into an allocated buffer
    files           torch.load of one file per sample, and a copy; on fewer samples, because it is slow
Building: ResNet-50 on 32x32 images (jobs.py), with files of at most 2 MiB, so that there are four blocks.
    build           `cache build`: views, normalization, teacher, projection, encoding, checksums, files, flush to disk
    forward         teacher and projection alone, on the same views, normalized in advance and held in memory

The result is samples/s. The cases of reading take turns, as do those of building. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.bare import forward_case
from benchmarks.caches import fill_cache, write_cache_spec
from benchmarks.harness import Result, benchmark_parser, finish, measure_in_turns
from benchmarks.jobs import Bench, Size, build_live_teacher, hybrid, open_bench
from kd_accel.cache.reader import Reader
from kd_accel.cache.shard import write_shard
from kd_accel.cache.spec import CacheSpec, TensorSpec, samples_in_a_shard
from kd_accel.data.splits import Split

TENSOR, VALUES = "features", 7680
SHARD_MIB = 48
BUILT_SHARD_MIB = 2
BATCH_SAMPLES = 256
READING_TURNS = 5
"""Turns of the reading cases per turn of the building cases, which take ten times as long."""

Cases = dict[str, Callable[[], float]]


def main() -> None:
    parser = benchmark_parser(__doc__, repeats=9)
    parser.add_argument("--samples", type=int, default=50_000, help="samples of the cache that is read (default: 50000)")
    parser.add_argument("--file_samples", type=int, default=512, help="samples of the case `files` (default: 512)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as directory:
        reading = reading_cases(Path(directory) / "reading", samples=arguments.samples, file_samples=arguments.file_samples)
        rates = measure_in_turns(reading, repeats=READING_TURNS * arguments.repeats)
        del reading
        bench = open_bench(Size(arguments.batch_size, arguments.steps))
        rates |= measure_in_turns(building_cases(bench, Path(directory)), repeats=arguments.repeats)
    notes = {
        "samples": arguments.samples,
        "sample_bytes": 2 * VALUES,
        "file_samples": arguments.file_samples,
        "built_samples": bench.size.samples,
    }
    result = Result.of_repeats("cache-io", rates, notes=notes, unit="samples/s")
    for numerator, denominator in (("reader", "index_select"), ("reader", "files"), ("build", "forward")):
        result.add_ratio(numerator, denominator)
    finish(result)


def reading_cases(directory: Path, *, samples: int, file_samples: int) -> Cases:
    """Return the reading cases; a call reads all samples in a random order, and `files` the first `file_samples`.

    Args:
        directory: Directory for the cache and the files.
        samples: Number of samples.
        file_samples: Number of samples with a file.
    """
    cache_spec = reading_spec(samples)
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((samples, VALUES), dtype=np.float32)).half()
    write_values(directory, cache_spec, values)
    write_files(directory, values[:file_samples])
    order, few = _random_batches(samples), _random_batches(min(samples, file_samples))
    return {
        "index_select": index_select_case(values, order),
        "reader": reader_case(directory, cache_spec, order),
        "files": files_case(directory, few),
    }


def reading_spec(samples: int) -> CacheSpec:
    """Return the spec of a cache with one tensor and one view."""
    tensors = {TENSOR: TensorSpec((VALUES,), "float16")}
    per_shard = samples_in_a_shard(tensors, shard_mib=SHARD_MIB, batch_samples=BATCH_SAMPLES)
    covered: dict[Split, int] = {"train": samples, "val": 0, "test": 0}
    return CacheSpec({}, samples=covered, views=1, tensors=tensors, samples_per_shard=per_shard, batch_samples=BATCH_SAMPLES)


def write_values(directory: Path, cache_spec: CacheSpec, values: Tensor) -> None:
    """Write the shards of a cache. values: [N, VALUES]."""
    for shard in cache_spec.shards("train", 0, TENSOR):
        write_shard(directory, cache_spec, shard, values[shard.first : shard.first + shard.samples], None)


def write_files(directory: Path, values: Tensor) -> None:
    """Write a file for each sample. values: [N, VALUES]."""
    for sample, value in enumerate(values):
        # Without the clone torch.save writes the complete storage of which the sample is a slice.
        torch.save(value.clone(), directory / f"{sample}.pt")


def reader_case(directory: Path, cache_spec: CacheSpec, order: list[np.ndarray]) -> Callable[[], float]:
    """Return the case `reader`. order: sample indices of each batch."""
    reader = Reader(directory, cache_spec, "train", np.arange(cache_spec.samples["train"]), [TENSOR])

    def block() -> float:
        for samples in order:
            reader.read(0, samples)
        return sum(map(len, order))

    return block


def index_select_case(values: Tensor, order: list[np.ndarray]) -> Callable[[], float]:
    """Return the case `index_select`. order: sample indices of each batch."""
    buffer = _buffer()

    def block() -> float:
        for samples in order:
            torch.index_select(values, 0, torch.from_numpy(samples), out=buffer[: len(samples)])
        return sum(map(len, order))

    return block


def files_case(directory: Path, order: list[np.ndarray]) -> Callable[[], float]:
    """Return the case `files`. order: sample indices of each batch."""
    buffer = _buffer()

    def block() -> float:
        for samples in order:
            for index, sample in enumerate(samples.tolist()):
                buffer[index].copy_(torch.load(directory / f"{sample}.pt", weights_only=True))
        return sum(map(len, order))

    return block


def building_cases(bench: Bench, directory: Path) -> Cases:
    """Return the building cases; a call processes view 0 of all samples."""
    teacher, count = build_live_teacher(bench, hybrid()).live, itertools.count()
    assert teacher is not None
    cache_spec = write_cache_spec(bench, directory / "spec", teacher, views=1, shard_mib=BUILT_SHARD_MIB)
    shares = [(share, 0) for share in np.split(bench.samples, bench.size.steps)]
    images = [teacher.normalize(batch.images) for batch in bench.batches("train", shares)]

    def build() -> float:
        # A new directory in each call, so that no file is replaced.
        fill_cache(bench, directory / f"built-{next(count)}", cache_spec, teacher)
        return bench.size.samples

    return {"forward": forward_case(bench, images), "build": build}


def _buffer() -> Tensor:
    return torch.empty(BATCH_SAMPLES, VALUES, dtype=torch.float16)


def _random_batches(samples: int) -> list[np.ndarray]:
    order = np.random.default_rng(1).permutation(samples)
    return [order[first : first + BATCH_SAMPLES] for first in range(0, samples, BATCH_SAMPLES)]


if __name__ == "__main__":
    main()
