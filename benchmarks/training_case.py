"""Cases of `benchmarks.training`, in the processes of one launch; rank 0 prints a line of JSON.

    python -m benchmarks.training_case --cases plain bare
    accelerate launch --num_processes 2 ... -m benchmarks.training_case     (benchmarks.training does it)

A case is built from scratch for each round and gives images per second of each of its blocks, over all processes. Of the
program's own cases one more block is recorded by torch.profiler, for the share that each part of a step takes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.bare import LIMITS, limit_case
from benchmarks.caches import write_cache
from benchmarks.harness import measure_in_turns, suite_parser
from benchmarks.jobs import (
    PLAIN,
    Bench,
    Size,
    build_live_teacher,
    build_training,
    distilled,
    epochs_of,
    hybrid,
    open_bench,
    with_settings,
)
from kd_accel.builders.teacher import TeacherSetup
from kd_accel.config.schema import CacheConfig, DistillConfig, RunConfig, StorageType
from kd_accel.profiling import range_shares
from kd_accel.training.trainer import Trainer

CACHED_VIEWS = 4
BLOCK = "block"
Cases = dict[str, Callable[[], float]]


def cached(config: RunConfig, dtype: StorageType = "float16") -> RunConfig:
    """Return the same distillation from a cache."""
    return with_settings(config, teacher={"outputs": "cached", "cache": CacheConfig(dtype=dtype)})


_LOGITS, _UP, _DOWN = distilled(DistillConfig()), hybrid("student_to_teacher"), hybrid("teacher_to_student")
PROGRAMS = {
    "plain": PLAIN,
    "live_logits": _LOGITS,
    "live_hybrid": hybrid(),
    "cached_logits": cached(_LOGITS),
    "cached_hybrid": cached(hybrid()),
    "live_hybrid_student_to_teacher": _UP,
    "live_hybrid_teacher_to_student": _DOWN,
    "cached_hybrid_student_to_teacher": cached(_UP),
    "cached_hybrid_teacher_to_student": cached(_DOWN),
    "cached_hybrid_int8": cached(hybrid(), "int8"),
    "plain_clipped": with_settings(PLAIN, optim={"clip_norm": 1.0}),
    "plain_averaged": with_settings(PLAIN, train={"ema_decay": 0.999}),
    "plain_on_host": PLAIN,
}
"""Ways of training, as configs. plain_on_host: images and views on the host even with a GPU."""


class Programs:
    """Builder of this program's trainings; teachers and caches are made at their first use and shared.

    Args:
        bench: of the trainings.
        directory: of the caches.
        views: of the distilled trainings.
    """

    def __init__(self, bench: Bench, directory: Path, *, views: int = CACHED_VIEWS) -> None:
        self._bench, self._directory, self._views = bench, directory, views
        self._setups: dict[str, TeacherSetup] = {}

    def case(self, name: str, directory: Path, *, blocks: int) -> Callable[[], float]:
        """Return the epochs of a training, up to `blocks` of them, as a case."""
        return epochs_of(self.training(name, directory, blocks=blocks))

    def training(self, name: str, directory: Path, *, blocks: int) -> Trainer:
        """Build a training of `blocks` epochs at its first step. directory: made for its lines of metrics."""
        config = with_settings(PROGRAMS[name], train={"epochs": blocks})
        teacher = None
        if config.teacher is not None:
            config = with_settings(config, data={"views": self._views})
            teacher = self._teacher(config)
        return build_training(self._bench, config, directory, teacher=teacher, keeps_images_on_host=name == "plain_on_host")

    def _teacher(self, config: RunConfig) -> TeacherSetup:
        """Return the teacher of a config, live or from a cache; the settings that decide it are the key."""
        assert config.teacher is not None and config.distill is not None
        key = f"{config.teacher.model_dump_json()} {config.distill.model_dump_json()}"
        if key not in self._setups:
            self._setups[key] = (
                self._cached(config) if config.teacher.outputs == "cached" else build_live_teacher(self._bench, config)
            )
        return self._setups[key]

    def _cached(self, config: RunConfig) -> TeacherSetup:
        """Write a cache by the live teacher of the same config, and read from it."""
        assert config.teacher is not None
        live = self._teacher(with_settings(config, teacher={"outputs": "live", "cache": CacheConfig()}))
        assert live.live is not None
        directory = self._directory / f"cache-{len(self._setups)}"
        dtype = config.teacher.cache.dtype or "float16"
        cache = write_cache(self._bench, directory, live.live, views=self._views, dtype=dtype)
        return TeacherSetup(cache.source("train"), cache.source, live.fingerprint, live.target_shapes, cache.digest)


def main() -> None:
    parser = suite_parser(__doc__, repeats=9, steps=4)
    parser.add_argument("--cases", nargs="+", choices=[*PROGRAMS, *LIMITS], default=[*PROGRAMS, *LIMITS])
    parser.add_argument("--rounds", type=int, default=3, help="how often the students are built from scratch")
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
    """Build programs and limits by name."""
    return {
        name: programs.case(name, directory / name, blocks=blocks) if name in PROGRAMS else limit_case(LIMITS[name], bench)
        for name in names
    }


def _shares(case: Callable[[], float]) -> dict[str, float]:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler, record_function(BLOCK):
        case()
    step_ms, shares = range_shares(profiler.events(), whole=BLOCK)
    return {"step_ms": round(step_ms, 2), **{name: round(share, 4) for name, share in shares.items()}}


def _shared(directory: str) -> Path:
    """Return rank 0's directory on all ranks."""
    names = [directory]
    broadcast_object_list(names)
    return Path(names[0])


if __name__ == "__main__":
    main()
