"""The cases of `benchmarks.training`, in the processes of one launch; rank 0 prints a line of JSON.

    python -m benchmarks.training_case --cases plain bare
    accelerate launch --num_processes 2 ... -m benchmarks.training_case     (benchmarks.training does it)

A case is built anew for each round and gives images per second of each of its blocks, over all processes. Of the program's own
cases one more block is recorded by torch.profiler, for the share that each part of a step takes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import broadcast_object_list
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.bare import LIMITS, limit_case
from benchmarks.caches import write_cache
from benchmarks.harness import measure_in_turns, suite_parser
from benchmarks.jobs import (
    Bench,
    Features,
    Size,
    build_job,
    epochs_of,
    hybrid,
    live_teacher,
    open_bench,
    training_config,
)
from kd_accel.config.schema import DistillConfig, StorageType
from kd_accel.models.feature_extractor import compile_with_hooks
from kd_accel.training.job import Job
from kd_accel.training.profile import range_shares
from kd_accel.types import TeacherSource, no_teacher

CACHED_VIEWS = 4
BLOCK = "block"
Cases = dict[str, Callable[[], float]]


@dataclass(frozen=True)
class Program:
    """One way of training. distill: None = on labels alone. features: what the teacher gives beside its logits.

    dtype: of the cache. clip_norm, ema_decay: as in a config. on_host: images and views, where they could be on a GPU.
    """

    distill: DistillConfig | None = None
    outputs: Literal["live", "cached"] = "live"
    features: Features = "none"
    dtype: StorageType = "float16"
    clip_norm: float | None = None
    ema_decay: float | None = None
    on_host: bool = False


_HYBRID = Program(hybrid(), features="projected")
_UP = Program(hybrid("student_to_teacher"), features="raw")
_DOWN = Program(hybrid("teacher_to_student"), features="projected")

PROGRAMS = {
    "plain": Program(),
    "live_logits": Program(DistillConfig()),
    "live_hybrid": _HYBRID,
    "cached_logits": Program(DistillConfig(), "cached"),
    "cached_hybrid": replace(_HYBRID, outputs="cached"),
    "live_hybrid_student_to_teacher": _UP,
    "live_hybrid_teacher_to_student": _DOWN,
    "cached_hybrid_student_to_teacher": replace(_UP, outputs="cached"),
    "cached_hybrid_teacher_to_student": replace(_DOWN, outputs="cached"),
    "cached_hybrid_int8": replace(_HYBRID, outputs="cached", dtype="int8"),
    "plain_clipped": Program(clip_norm=1.0),
    "plain_averaged": Program(ema_decay=0.999),
    "plain_on_host": Program(on_host=True),
}


class Programs:
    """Builds trainings of this program; teachers and caches are made once, when one is asked for."""

    def __init__(self, bench: Bench, directory: Path, *, views: int = CACHED_VIEWS, compiles: bool = False) -> None:
        self._bench, self._directory, self._views, self._compiles = bench, directory, views, compiles
        self._outputs = cache(self._make_outputs)
        self._teacher = cache(lambda features: live_teacher(bench, features))

    def case(self, name: str, directory: Path, *, blocks: int) -> Callable[[], float]:
        """Epochs of the program's own loop, up to `blocks` of them."""
        return epochs_of(self.job(name, directory, blocks=blocks))

    def job(self, name: str, directory: Path, *, blocks: int) -> Job:
        """A training of `blocks` epochs at its first step. directory: made for its lines of metrics."""
        program = PROGRAMS[name]
        directory.mkdir(parents=True, exist_ok=True)
        views = self._views if program.distill else None
        config = training_config(self._bench.size, epochs=blocks, views=views, distill=program.distill)
        config = replace(
            config,
            train=replace(config.train, compile=self._compiles, ema_decay=program.ema_decay),
            optim=replace(config.optim, clip_norm=program.clip_norm),
        )
        outputs = self._outputs(program.outputs, program.features, program.dtype) if program.distill else no_teacher
        return build_job(self._bench, config, directory, teacher=outputs, keeps_images_on_host=program.on_host)

    def _make_outputs(self, kind: str, features: Features, dtype: StorageType) -> TeacherSource:
        if kind == "live":
            if not self._compiles:
                return self._teacher(features)
            teacher = live_teacher(self._bench, features)
            compile_with_hooks(teacher.model)
            return teacher
        place, writer = self._directory / f"cache-{features}-{dtype}", self._teacher(features)
        cache = write_cache(self._bench, place, writer, views=self._views, features=features, dtype=dtype)
        return cache.source("train")


def main() -> None:
    parser = suite_parser(__doc__, repeats=9, steps=4)
    parser.add_argument("--cases", nargs="+", choices=[*PROGRAMS, *LIMITS], default=[*PROGRAMS, *LIMITS])
    parser.add_argument("--rounds", type=int, default=3, help="how often the students are built anew")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench = open_bench(Size(arguments.batch_size, arguments.steps))
    with tempfile.TemporaryDirectory() as own:
        directory = _shared(own)
        programs = Programs(bench, directory)
        rates: dict[str, list[float]] = {name: [] for name in arguments.cases}
        for number in range(arguments.rounds):
            cases = build_cases(bench, programs, arguments.cases, directory / str(number), blocks=arguments.repeats + 2)
            for name, measured in measure_in_turns(cases, repeats=arguments.repeats).items():
                rates[name] += measured
        shares = {name: _shares(case) for name, case in cases.items() if name in PROGRAMS}
        bench.accelerator.wait_for_everyone()
    if bench.accelerator.is_main_process:
        print(json.dumps({"rates": rates, "shares": shares}))


def build_cases(bench: Bench, programs: Programs, names: Sequence[str], directory: Path, *, blocks: int) -> Cases:
    world_size = bench.accelerator.num_processes
    return {
        name: programs.case(name, directory / name, blocks=blocks)
        if name in PROGRAMS
        else limit_case(LIMITS[name], bench.device, bench.size, world_size=world_size)
        for name in names
    }


def _shares(case: Callable[[], float]) -> dict[str, float]:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler, record_function(BLOCK):
        case()
    step_ms, shares = range_shares(profiler.events(), whole=BLOCK)
    return {"step_ms": round(step_ms, 2), **{name: round(share, 4) for name, share in shares.items()}}


def _shared(directory: str) -> Path:
    """Rank 0's."""
    names = [directory]
    broadcast_object_list(names)
    return Path(names[0])


if __name__ == "__main__":
    main()
