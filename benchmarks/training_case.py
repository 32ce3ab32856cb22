"""Cases of `benchmarks.training`, in the processes of one launch; rank 0 prints the result as a line of JSON.

    python -m benchmarks.training_case --cases plain bare
    accelerate launch --num_processes 2 ... -m benchmarks.training_case     (started by benchmarks.training)

Each round builds all cases from scratch and measures images/s of each block, over all processes. For the trainings by kd_accel
one more block is recorded by torch.profiler, which gives the share of each part in a step.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.bare import LIMITS, limit_case
from benchmarks.caches import write_cache
from benchmarks.harness import benchmark_parser, measure_in_turns
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


def cached(config: RunConfig, dtype: StorageType = "float16") -> RunConfig:
    """Return the config of the same distillation with cached outputs. dtype: storage type of the cache."""
    return with_settings(config, teacher={"outputs": "cached", "cache": CacheConfig(dtype=dtype)})


_LOGITS = distilled(DistillConfig())
_TO_TEACHER, _TO_STUDENT = hybrid("student_to_teacher"), hybrid("teacher_to_student")
TRAININGS = {
    "plain": PLAIN,
    "live_logits": _LOGITS,
    "live_hybrid": hybrid(),
    "cached_logits": cached(_LOGITS),
    "cached_hybrid": cached(hybrid()),
    "live_hybrid_student_to_teacher": _TO_TEACHER,
    "live_hybrid_teacher_to_student": _TO_STUDENT,
    "cached_hybrid_student_to_teacher": cached(_TO_TEACHER),
    "cached_hybrid_teacher_to_student": cached(_TO_STUDENT),
    "cached_hybrid_int8": cached(hybrid(), "int8"),
    "plain_clipped": with_settings(PLAIN, optim={"clip_norm": 1.0}),
    "plain_averaged": with_settings(PLAIN, train={"ema_decay": 0.999}),
    "plain_on_host": PLAIN,
}
"""{case: config}. The images and views of plain_on_host stay on the host, even with a GPU."""


class CaseBuilder:
    """Builder of cases: trainings by kd_accel, and limits. Teachers and caches are made at their first use and shared.

    Args:
        bench: Processes, precision and images of the cases.
        directory: Directory of the caches.
        views: Views of each sample in a distillation by kd_accel.
    """

    def __init__(self, bench: Bench, directory: Path, *, views: int = CACHED_VIEWS) -> None:
        self._bench, self._directory, self._views = bench, directory, views
        self._setups: dict[str, TeacherSetup] = {}

    def case(self, name: str, directory: Path, *, blocks: int) -> Callable[[], float]:
        """Return a case by its name in TRAININGS or LIMITS.

        Args:
            name: Name of the case.
            directory: Run directory of a training, created if it does not exist.
            blocks: Largest number of calls of a training; each call runs an epoch.
        """
        if name in LIMITS:
            return limit_case(LIMITS[name], self._bench)
        return epochs_of(self.training(name, directory, blocks=blocks))

    def training(self, name: str, directory: Path, *, blocks: int) -> Trainer:
        """Build the trainer of `blocks` epochs of a training. directory: run directory, created if it does not exist."""
        config = with_settings(TRAININGS[name], train={"epochs": blocks})
        teacher = None
        if config.teacher is not None:
            config = with_settings(config, data={"views": self._views})
            teacher = self.teacher(config)
        return build_training(self._bench, config, directory, teacher=teacher, keeps_images_on_host=name == "plain_on_host")

    def teacher(self, config: RunConfig) -> TeacherSetup:
        """Return the live or cached teacher of a config."""
        assert config.teacher is not None and config.distill is not None
        key = f"{config.teacher.model_dump_json()} {config.distill.model_dump_json()}"
        if key not in self._setups:
            self._setups[key] = (
                self._cached(config) if config.teacher.outputs == "cached" else build_live_teacher(self._bench, config)
            )
        return self._setups[key]

    def _cached(self, config: RunConfig) -> TeacherSetup:
        """Build a cache with the live teacher of the same config, and return a teacher that reads the cache."""
        assert config.teacher is not None
        live = self.teacher(with_settings(config, teacher={"outputs": "live", "cache": CacheConfig()}))
        assert live.live is not None
        directory = self._directory / f"cache-{len(self._setups)}"
        dtype = config.teacher.cache.dtype or "float16"
        cache = write_cache(self._bench, directory, live.live, views=self._views, dtype=dtype)
        return TeacherSetup(
            cache.source("train", keeps_views=True), cache.source, live.fingerprint, live.target_shapes, cache.digest
        )


def main() -> None:
    parser = benchmark_parser(__doc__, repeats=9, steps=4)
    names = [*TRAININGS, *LIMITS]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, help="cases to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="number of times that all cases are built (default: 3)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench = open_bench(Size(arguments.batch_size, arguments.steps))
    with tempfile.TemporaryDirectory() as temporary:
        directory = _same_on_all_ranks(temporary)
        builder = CaseBuilder(bench, directory)
        rates: dict[str, list[float]] = {name: [] for name in arguments.cases}
        for number in range(arguments.rounds):
            run_dirs = {name: directory / str(number) / name for name in arguments.cases}
            blocks = arguments.repeats + 2
            cases = {name: builder.case(name, run_dir, blocks=blocks) for name, run_dir in run_dirs.items()}
            for name, measured in measure_in_turns(cases, repeats=arguments.repeats).items():
                rates[name] += measured
        shares = {name: _shares(case, steps=bench.size.steps) for name, case in cases.items() if name in TRAININGS}
        # The directory must exist until the last rank has finished.
        bench.accelerator.wait_for_everyone()
    if bench.accelerator.is_main_process:
        print(json.dumps({"rates": rates, "shares": shares}))


def _shares(case: Callable[[], float], *, steps: int) -> dict[str, float]:
    """Run a block of `steps` under torch.profiler; return {"step_ms": ..., part: share of the step}."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler, record_function(BLOCK):
        case()
    step_ms, shares = range_shares(profiler.events(), total_prefix=BLOCK, steps=steps)
    return {"step_ms": round(step_ms, 2), **{name: round(share, 4) for name, share in shares.items()}}


def _same_on_all_ranks(directory: str) -> Path:
    """Return the directory of rank 0 on all ranks."""
    names = [directory]
    broadcast_object_list(names)
    return Path(names[0])


if __name__ == "__main__":
    main()
