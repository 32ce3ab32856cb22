"""What a training step costs beside a bare PyTorch loop, and what a cache makes of distillation.

    python -m benchmarks.training --suite quick     plain / bare
    python -m benchmarks.training --suite cached    cached_logits / plain, cached_hybrid / plain, live_hybrid / limit

All cases train the same student (jobs.py says which) with fused SGD and Nesterov momentum. Those of this program go its whole
path: order of the rows, views (crop_flip), loading, normalisation, teacher, loss, metrics, learning rate, the line of metrics
at the end of a block. `cached_...` read a real cache, with another view in each block, so a block also pays for opening that
view, which in a training an epoch of hundreds of steps does. `bare` and `limit` (bare.py) do nothing but forward, backward and
step on normalised tensors in memory, the latter after a forward of the teacher.

One unit is an image; a block is an epoch of a few steps; the cases take turns. In each round all students are built anew: where
their weights happen to lie in memory makes up to 3 % of a step. Run it alone: on two cores any other load shows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.bare import bare_case, limit_case
from benchmarks.harness import Result, finish, measure_in_turns, suite_parser
from benchmarks.jobs import Bench, Size, build_job, epochs_of, hybrid, live_teacher, open_bench, training_config, write_cache
from kd_accel.config import DistillConfig
from kd_accel.types import SignalSource, no_signals

CACHED_VIEWS = 4
RATIOS = {
    "quick": [("plain", "bare")],
    "cached": [("cached_logits", "plain"), ("cached_hybrid", "plain"), ("live_hybrid", "limit")],
}
Cases = dict[str, Callable[[], float]]
BuildCases = Callable[[Path, int], Cases]
"""(directory of this round, blocks of each case) -> cases."""


def main() -> None:
    parser = suite_parser(__doc__, repeats=3)
    parser.add_argument("--suite", choices=list(RATIOS), default="quick")
    parser.add_argument("--rounds", type=int, default=3, help="how often the students are built anew")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = Size(arguments.batch_size, arguments.steps)
    with tempfile.TemporaryDirectory() as directory:
        build_cases = SUITES[arguments.suite](open_bench(size), Path(directory))
        rounds = [
            measure_in_turns(build_cases(Path(directory) / str(number), arguments.repeats), repeats=arguments.repeats)
            for number in range(arguments.rounds)
        ]
    rates = {name: [rate for measured in rounds for rate in measured[name]] for name in rounds[0]}
    notes = {"batch_size": size.batch_size, "steps_per_block": size.steps, "rounds": arguments.rounds}
    result = Result.of_repeats(f"training-{arguments.suite}", rates, notes=notes)
    for numerator, denominator in RATIOS[arguments.suite]:
        result.add_ratio(numerator, denominator)
    finish(result)


def quick_suite(bench: Bench, directory: Path) -> BuildCases:
    def build(directory: Path, repeats: int) -> Cases:
        return {"bare": bare_case(bench.device, bench.size), "plain": _program(bench, directory / "plain", repeats)}

    return build


def cached_suite(bench: Bench, directory: Path) -> BuildCases:
    teacher = live_teacher(bench)
    cache = write_cache(bench, directory / "cache", teacher, views=CACHED_VIEWS)
    distilled: dict[str, tuple[DistillConfig, SignalSource]] = {
        "cached_logits": (DistillConfig(), replace(cache, taps={}).source("train")),
        "cached_hybrid": (hybrid(), cache.source("train")),
        "live_hybrid": (hybrid(), teacher),
    }

    def build(directory: Path, repeats: int) -> Cases:
        programs = {
            name: _program(bench, directory / name, repeats, distill=distill, signals=signals)
            for name, (distill, signals) in distilled.items()
        }
        limit = limit_case(bench.device, bench.size)
        return {"plain": _program(bench, directory / "plain", repeats), **programs, "limit": limit}

    return build


def _program(
    bench: Bench,
    directory: Path,
    repeats: int,
    *,
    distill: DistillConfig | None = None,
    signals: SignalSource = no_signals,
) -> Callable[[], float]:
    """Epochs of the program's own loop, enough for all repeats."""
    directory.mkdir(parents=True)
    config = training_config(bench.size, epochs=repeats + 2, views=CACHED_VIEWS if distill else None, distill=distill)
    return epochs_of(build_job(bench, config, directory, signals=signals))


SUITES: dict[str, Callable[[Bench, Path], BuildCases]] = {"quick": quick_suite, "cached": cached_suite}


if __name__ == "__main__":
    main()
