"""Item g: compiled trainings in bf16, plain and with a live teacher, by the program's own command.

images_per_s is the median of the lines of metrics after the first one, which includes the compilation; start_s is the time of
the first line minus that of its steps at this rate. The compiler's cache is a new one for each, so it is empty; a trial has
one for both, since the compilation of its headers alone takes seconds.
"""

from __future__ import annotations

import json
import statistics
from functools import partial
from pathlib import Path

from benchmarks.acceptance.guard import Cases
from benchmarks.acceptance.record import Figures, Setting
from benchmarks.acceptance.runs import MANY_IMAGES, UNTRACKED, features_flag, networks, teacher_flags
from benchmarks.acceptance.starting import NotRun, Starter
from benchmarks.harness import has_compiler

LIMIT_S = 240.0


def build(setting: Setting, starter: Starter) -> Cases:
    """Build the cases."""
    student, teacher = networks(setting)
    features = features_flag(setting.size(4, 2), pca_images=setting.size(2048, 64))
    distilled = [*teacher_flags(setting, starter, teacher), features]
    flags = [
        *("train", *UNTRACKED, *MANY_IMAGES, f"--data.limit_train={setting.size(8192, 512)}", f"--model.arch={student}"),
        *(f"--train.max_steps={setting.size(120, 9)}", "--train.epochs=9"),
        *(f"--train.log_every_steps={setting.size(20, 3)}", "--train.precision=bf16", "--train.compile=true"),
        *("--optim.lr=0.01", "--checkpoint.every_epochs=null", *_equal_batches(setting.size(128, 8))),
    ]
    runs = {"plain": flags, "live_hybrid": [*flags, *distilled]}
    return {name: partial(_trained, setting, starter, name, argv) for name, argv in runs.items()}


def _trained(setting: Setting, starter: Starter, name: str, flags: list[str]) -> Figures:
    if setting.is_trial and not has_compiler():
        raise NotRun("no compiler")
    run_dir = setting.scratch / f"compiled-{name}"
    env = {"TORCHINDUCTOR_CACHE_DIR": str(setting.scratch / ("inductor" if setting.is_trial else f"inductor-{name}"))}
    starter.command(f"g-{name}", *flags, f"--run_dir={run_dir}", env=env).finish(LIMIT_S)
    first, *others = _rates(run_dir)
    rate, samples = statistics.median(others), setting.size(128, 8) * setting.size(20, 3)
    return {"images_per_s": round(rate, 1), "start_s": round(samples / first - samples / rate, 2), "lines": len(others)}


def _equal_batches(samples: int) -> list[str]:
    """Return flags with which the evaluation at the end needs no other shape to be compiled."""
    return [f"--train.batch_size={samples}", f"--train.eval_batch_size={samples}", f"--data.limit_test={samples}"]


def _rates(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["images_per_second"] for line in lines if line["split"] == "train"]
