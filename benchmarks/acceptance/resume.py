"""Item e: exact resume with deterministic kernels, and losses or gradients that are not finite.

resume/PRECISION      20 steps of ResNet-18 with a live ResNet-50, its features and a moving average, against 10 + 10 steps:
                      the models must be equal byte for byte
logits/PRECISION      the logits of one sample are NaN in step 5: the training must stop with a message that names the term, the
                      rank, the sample and the step
gradient/bf16         the gradient is NaN in step 5 although the loss is finite: as above, and the message names the parameter
overflow/fp16         with fp16 such a gradient is an overflow: the loss scaler must skip the step, and the training must finish
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.acceptance.guard import Cases
from benchmarks.acceptance.plan import RESUME, RESUME_FP16
from benchmarks.acceptance.record import Figures, Setting
from benchmarks.acceptance.runs import (
    IMAGES,
    SYNTHETIC,
    UNTRACKED,
    features_flag,
    losses,
    metrics,
    model_bytes,
    networks,
    teacher_flags,
)
from benchmarks.acceptance.starting import Started, Starter

FAULTY_STEP = 5
_USER_ERROR = 2
"""Exit code of a training that ends with a `UserError`."""
_LIMIT_S = 120.0
_MESSAGES = {
    "logits": rf"loss term ce is not finite on rank 0 \(the student's logits of sample \d+\) at step {FAULTY_STEP}: [^\n]*",
    "gradient": rf"the gradient of \S+ is not finite \(rank 0 had samples [^)]*\) at step {FAULTY_STEP}: [^\n]*",
}


def build(setting: Setting, starter: Starter) -> Cases:
    """Start all commands that do not need a checkpoint, and return the cases."""
    kinds: dict[str, Callable[..., Callable[[], Figures]]] = {
        "resume": _resume,
        "logits": _nan,
        "gradient": _nan,
        "overflow": _overflow,
    }
    names = [*RESUME, *(() if setting.is_trial else RESUME_FP16)]
    return {name: kinds[name.split("/")[0]](name, setting, starter) for name in names}


def _resume(name: str, setting: Setting, starter: Starter) -> Callable[[], Figures]:
    """Start the uninterrupted training and the first half of the resumed one.

    The flags exercise all that a checkpoint restores: momentum, moving average, projectors, the position in an epoch.
    """
    directory, precision = setting.scratch / name, name.split("/")[1]
    student, teacher = networks(setting)
    flags = [
        *("train", *UNTRACKED, *IMAGES, "--data.limit_train=1664", f"--model.arch={student}"),
        *teacher_flags(setting, starter, teacher),
        features_flag(2, pca_images=setting.size(640, 64)),
        *("--optim.lr=0.01", "--optim.nesterov=true", "--optim.clip_norm=5", "--train.ema_decay=0.9"),
        *(f"--train.batch_size={setting.size(128, 32)}", "--train.max_steps=20", "--train.epochs=20"),
        *("--train.log_every_steps=3", "--train.deterministic=true", f"--train.precision={precision}"),
    ]
    label = name.replace("/", "-")
    uninterrupted = starter.command(f"e-{label}-uninterrupted", *flags, f"--run_dir={directory / 'uninterrupted'}")
    resumed = [*flags, f"--run_dir={directory / 'resumed'}"]
    first = starter.command(f"e-{label}-first", *resumed, "--checkpoint.stop_after_steps=10")
    return partial(_compare, directory, uninterrupted, first, partial(starter.command, f"e-{label}-second", *resumed))


def _compare(directory: Path, uninterrupted: Started, first: Started, start_second: Callable[[], Started]) -> Figures:
    expected, resumed = directory / "uninterrupted", directory / "resumed"
    first.finish(_LIMIT_S)
    assert not (resumed / "summary.json").exists(), "the first half has finished the training"
    start_second().finish(_LIMIT_S)
    uninterrupted.finish(_LIMIT_S)
    same_bytes = model_bytes(expected) == model_bytes(resumed)
    same_metrics = metrics(expected) == metrics(resumed)
    return {
        "ok": same_bytes and same_metrics,
        "same_bytes": same_bytes,
        "same_metrics": same_metrics,
        "steps": metrics(resumed)[-1]["step"],
    }


def _start_faulty(name: str, setting: Setting, starter: Starter, fault: str) -> tuple[Path, Started]:
    """Start a training with a fault, `logits` or `gradient`; return (run directory, process)."""
    run_dir, precision = setting.scratch / name, name.split("/")[1]
    flags = [
        *("train", *UNTRACKED, *IMAGES, "--data.limit_train=320", f"--model.arch={SYNTHETIC}:faulty_student"),
        *("--optim.lr=0.05", "--train.batch_size=32", "--train.max_steps=10", f"--train.precision={precision}"),
        *("--train.log_every_steps=1", "--checkpoint.every_steps=2", f"--run_dir={run_dir}"),
    ]
    env = {"KD_FAULT_NAN_AT": f"{fault}:{FAULTY_STEP}"}
    return run_dir, starter.command(f"e-{name.replace('/', '-')}", *flags, env=env)


def _nan(name: str, setting: Setting, starter: Starter) -> Callable[[], Figures]:
    fault = name.split("/")[0]
    run_dir, started = _start_faulty(name, setting, starter, fault)
    return partial(_check_message, fault, run_dir, started)


def _check_message(fault: str, run_dir: Path, started: Started) -> Figures:
    """Check that a training stopped with one message, and that its last checkpoint is that of the step before the fault."""
    printed = started.finish(_LIMIT_S, code=_USER_ERROR)
    messages = re.findall(_MESSAGES[fault], printed)
    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir() if not path.name.startswith("."))
    passed = len(messages) == 1 and "Traceback" not in printed and kept[-1:] == [f"step-{FAULTY_STEP - 1:08d}"]
    return {"ok": passed, "message": messages[:1], "exit_code": _USER_ERROR, "newest_checkpoint": kept[-1:]}


def _overflow(name: str, setting: Setting, starter: Starter) -> Callable[[], Figures]:
    run_dir, started = _start_faulty(name, setting, starter, "gradient")
    return partial(_check_skipped_step, run_dir, started)


def _check_skipped_step(run_dir: Path, started: Started) -> Figures:
    """Check that a training finished with one overflow and finite losses."""
    started.finish(_LIMIT_S)
    overflowed = {line["step"]: line["overflowed_steps"] for line in metrics(run_dir) if line["split"] == "train"}
    steps = json.loads((run_dir / "summary.json").read_text())["steps"]
    are_finite = all(map(math.isfinite, losses(run_dir)))
    return {"ok": overflowed[FAULTY_STEP] == 1 and steps == 10 and are_finite, "overflowed": overflowed, "steps": steps}
