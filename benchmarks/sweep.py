"""Training time of ten students that share one cache: `python -m benchmarks.sweep`.

Each student (ResNet-18, see jobs.py) is built from scratch and trained for `--epochs` epochs, with the same number of views:
    plain    on labels alone
    cached   hybrid distillation, with logits and features from one cache
    live     hybrid distillation, with the teacher (ResNet-50) in each step
    build    `cache build` without its fixed costs, flushed to disk; measured in each turn, counted once in a sweep
Fixed costs do not depend on samples and views and are not included: the fit of the PCA (2,048 images and an eigendecomposition,
once per cache), and the check of a few samples at each start. The cache is read from the page cache.

The cases take turns, with one student of each case in a turn. The result is the median in seconds. The ratios are of times
(lower is better): `sweep/plain` = (one build + all cached students) / all plain students, `live/plain` = all live students /
all plain students. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.caches import fill_cache, write_cache, write_cache_spec
from benchmarks.harness import Result, benchmark_parser, finish
from benchmarks.jobs import (
    PLAIN,
    Bench,
    Size,
    build_live_teacher,
    build_training,
    epochs_of,
    hybrid,
    open_bench,
    with_settings,
)
from kd_accel.builders.teacher import TeacherSetup
from kd_accel.teacher.teacher import LiveTeacher


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--students", type=int, default=10, help="students of each case (default: 10)")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of a student, and views (default: 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench, epochs = open_bench(Size(arguments.batch_size, arguments.steps)), arguments.epochs
    live = build_live_teacher(bench, hybrid())
    assert live.live is not None
    teacher = live.live
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        cached = replace(live, source=write_cache(bench, directory / "cache", teacher, views=epochs).source("train"))
        cases: dict[str, Callable[[Path], None]] = {
            "plain": lambda case_dir: _train(bench, case_dir, epochs, None),
            "cached": lambda case_dir: _train(bench, case_dir, epochs, cached),
            "live": lambda case_dir: _train(bench, case_dir, epochs, live),
            "build": lambda case_dir: _build(bench, case_dir, epochs, teacher),
        }
        seconds: dict[str, list[float]] = {case: [] for case in cases}
        for turn in range(arguments.students + 1):
            for case, run in cases.items():
                case_dir = directory / f"{case}-{turn}"
                case_dir.mkdir()
                started_at = time.perf_counter()
                run(case_dir)
                # The first turn is the warm-up.
                if turn > 0:
                    seconds[case].append(time.perf_counter() - started_at)
                shutil.rmtree(case_dir)
    notes = {
        "students": arguments.students,
        "epochs": epochs,
        "samples": bench.size.samples,
        "batch_size": arguments.batch_size,
    }
    result = Result.of_repeats("sweep", seconds, notes=notes, unit="s")
    build_s = statistics.median(seconds["build"])
    result.ratios["sweep/plain"] = (build_s + sum(seconds["cached"])) / sum(seconds["plain"])
    result.ratios["live/plain"] = sum(seconds["live"]) / sum(seconds["plain"])
    finish(result)


def _train(bench: Bench, directory: Path, epochs: int, teacher: TeacherSetup | None) -> None:
    config = with_settings(hybrid() if teacher else PLAIN, data={"views": epochs}, train={"epochs": epochs})
    epoch = epochs_of(build_training(bench, config, directory, teacher=teacher))
    for _ in range(epochs):
        epoch()


def _build(bench: Bench, directory: Path, views: int, teacher: LiveTeacher) -> None:
    fill_cache(bench, directory, write_cache_spec(bench, directory, teacher, views=views), teacher)


if __name__ == "__main__":
    main()
