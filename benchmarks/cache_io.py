"""What a cache costs to read and to build: `python -m benchmarks.cache_io`.

Reading: batches of 256 random rows out of 50,000 (7,680 float16 values each, what direction `both` keeps of ResNet-50 at
32x32), into a buffer that is there, page cache warm.
    reader          the program's Reader, shards of 48 MiB mapped into memory
    index_select    torch.index_select from one tensor in memory: all that this hardware can gather
    files           one torch.save file per row, torch.load and copy: what many a training does (fewer rows: it is slow)
Building: ResNet-50 over a block of 32x32 images (jobs.py).
    build           the program's pass: views, normalisation, teacher, projection, encoding, checksums, files, flush
    forward         the teacher and the projection alone, over the same views, which lie normalised in memory

One unit is a row. The cases of each half take turns. Run it alone: on two cores any other load shows.
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
from benchmarks.caches import cache_plan, fill_cache
from benchmarks.harness import Result, finish, measure_in_turns, suite_parser
from benchmarks.jobs import Bench, Size, live_teacher, normalization, open_bench
from kd_accel.teacher.store.layout import Plan, TensorSpec, rows_in_a_shard
from kd_accel.teacher.store.reader import Reader
from kd_accel.teacher.store.shards import write_shard

TENSOR, VALUES = "features", 7680
SHARD_MIB = 48
BATCH_ROWS = 256
READING_TURNS = 5
"""Turns of the reading cases for one of the building cases: they take a tenth of the time."""

Cases = dict[str, Callable[[], float]]


def main() -> None:
    parser = suite_parser(__doc__, repeats=9)
    parser.add_argument("--rows", type=int, default=50_000, help="rows to read from; fewer for a trial of the suite")
    parser.add_argument("--file_rows", type=int, default=512, help="rows that have a file of their own")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as directory:
        reading = reading_cases(Path(directory) / "reading", rows=arguments.rows, file_rows=arguments.file_rows)
        rates = measure_in_turns(reading, repeats=READING_TURNS * arguments.repeats)
        del reading
        bench = open_bench(Size(arguments.batch_size, arguments.steps))
        rates |= measure_in_turns(building_cases(bench, Path(directory)), repeats=arguments.repeats)
    notes = {"rows": arguments.rows, "row_bytes": 2 * VALUES, "file_rows": arguments.file_rows, "built_rows": bench.size.rows}
    result = Result.of_repeats("cache-io", rates, notes=notes)
    for numerator, denominator in (("reader", "index_select"), ("reader", "files"), ("build", "forward")):
        result.add_ratio(numerator, denominator)
    finish(result)


def reading_cases(directory: Path, *, rows: int, file_rows: int) -> Cases:
    """Each call is an epoch: all rows in a random order, the same for the first two; the last has fewer."""
    plan = reading_plan(rows)
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((rows, VALUES), dtype=np.float32)).half()
    write_values(directory, plan, values)
    write_files(directory, values[:file_rows])
    order, few = _random_batches(rows), _random_batches(min(rows, file_rows))
    return {
        "index_select": index_select_case(values, order),
        "reader": reader_case(directory, plan, order),
        "files": files_case(directory, few),
    }


def reading_plan(rows: int) -> Plan:
    tensors = {TENSOR: TensorSpec((VALUES,), "float16")}
    per_shard = rows_in_a_shard(tensors, shard_mib=SHARD_MIB, batch_rows=BATCH_ROWS)
    covered = {"train": rows, "val": 0, "test": 0}
    return Plan({}, rows=covered, views=1, tensors=tensors, rows_per_shard=per_shard, batch_rows=BATCH_ROWS)


def write_values(directory: Path, plan: Plan, values: Tensor) -> None:
    for shard in plan.shards("train", 0, TENSOR):
        write_shard(directory, plan, shard, values[shard.first : shard.first + shard.rows], None)


def write_files(directory: Path, values: Tensor) -> None:
    for row, value in enumerate(values):
        torch.save(value.clone(), directory / f"{row}.pt")  # a clone: torch.save writes all that a slice is cut from


def reader_case(directory: Path, plan: Plan, order: list[np.ndarray]) -> Callable[[], float]:
    reader = Reader(directory, plan, "train", np.arange(plan.rows["train"]), [TENSOR])
    buffer = _buffer()

    def block() -> float:
        for rows in order:
            reader.read_into(0, rows, TENSOR, buffer[: len(rows)])
        return sum(map(len, order))

    return block


def index_select_case(values: Tensor, order: list[np.ndarray]) -> Callable[[], float]:
    buffer = _buffer()

    def block() -> float:
        for rows in order:
            torch.index_select(values, 0, torch.from_numpy(rows), out=buffer[: len(rows)])
        return sum(map(len, order))

    return block


def files_case(directory: Path, order: list[np.ndarray]) -> Callable[[], float]:
    buffer = _buffer()

    def block() -> float:
        for rows in order:
            for index, row in enumerate(rows.tolist()):
                buffer[index].copy_(torch.load(directory / f"{row}.pt", weights_only=True))
        return sum(map(len, order))

    return block


def building_cases(bench: Bench, directory: Path) -> Cases:
    """Each call is a block of rows in view 0."""
    plan, teacher, count = cache_plan(bench, views=1), live_teacher(bench), itertools.count()
    normalize = normalization(bench.device)
    shares = [(share, 0) for share in np.split(bench.rows, bench.size.steps)]
    images = [normalize(batch.images) for batch in bench.batches("train", shares)]

    def build() -> float:
        fill_cache(bench, directory / f"built-{next(count)}", plan, teacher)  # a new directory: no file is replaced
        return bench.size.rows

    return {"forward": forward_case(bench.device, images), "build": build}


def _buffer() -> Tensor:
    return torch.empty(BATCH_ROWS, VALUES, dtype=torch.float16)


def _random_batches(rows: int) -> list[np.ndarray]:
    order = np.random.default_rng(1).permutation(rows)
    return [order[first : first + BATCH_ROWS] for first in range(0, rows, BATCH_ROWS)]


if __name__ == "__main__":
    main()
