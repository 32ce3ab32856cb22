"""Item g: trainings in bf16 with torch.compile, on labels alone and with a live teacher.

images_per_s  median of the lines of metrics after the first line, which includes the compilation
start_s       time of the steps of the first line, minus their time at this rate

Both share a cache of compiled kernels, which is empty at first: the second training compiles only what the first one has not.
"""

from __future__ import annotations

import statistics
from functools import partial

from benchmarks.acceptance.guard import Cases
from benchmarks.acceptance.record import Figures, Setting
from benchmarks.acceptance.runs import MANY_IMAGES, UNTRACKED, features_flag, networks, teacher_flags
from benchmarks.acceptance.starting import NotRun, Starter
from benchmarks.harness import has_compiler, training_rates

_LIMIT_S = 240.0


def build(setting: Setting, starter: Starter) -> Cases:
    """Return the cases."""
    student, teacher = networks(setting)
    features = features_flag(setting.size(4, 2), pca_images=setting.size(2048, 64))
    distilled = [*teacher_flags(setting, starter, teacher), features]
    flags = [
        *("train", *UNTRACKED, *MANY_IMAGES, f"--data.limit_train={setting.size(8192, 512)}", f"--model.arch={student}"),
        *(f"--train.max_steps={setting.size(80, 9)}", "--train.epochs=9"),
        *(f"--train.log_every_steps={setting.size(20, 3)}", "--train.precision=bf16", "--train.compile=true"),
        *("--optim.lr=0.01", "--checkpoint.every_epochs=null", *_equal_batches(setting.size(128, 8))),
    ]
    runs = {"plain": flags, "live_hybrid": [*flags, *distilled]}
    return {name: partial(_train, setting, starter, name, argv) for name, argv in runs.items()}


def _train(setting: Setting, starter: Starter, name: str, flags: list[str]) -> Figures:
    if setting.is_trial and not has_compiler():
        raise NotRun("no compiler")
    run_dir = setting.scratch / f"compiled-{name}"
    env = {"TORCHINDUCTOR_CACHE_DIR": str(setting.scratch / "inductor")}
    starter.command(f"g-{name}", *flags, f"--run_dir={run_dir}", env=env).finish(_LIMIT_S)
    first, *warm = training_rates(run_dir)
    rate, samples = statistics.median(warm), setting.size(128, 8) * setting.size(20, 3)
    return {"images_per_s": round(rate, 1), "start_s": round(samples / first - samples / rate, 2), "lines": len(warm)}


def _equal_batches(samples: int) -> list[str]:
    """Return flags that give training and evaluation the same batch shape, so that only one is compiled."""
    return [f"--train.batch_size={samples}", f"--train.eval_batch_size={samples}", f"--data.limit_test={samples}"]
