"""Item e: exact resume with deterministic kernels, and numbers that are not finite.

resume/PRECISION      20 steps of ResNet-18 with a live ResNet-50, its features and a moving average, against 10 and 10: bytes
logits/PRECISION      logits of one sample of step 5 are NaN: the training stops and names term, rank, sample and step
gradient/bf16         the gradient of step 5 is NaN behind a finite loss: the same, with the parameter
overflow/fp16         the same is an overflow under fp16: the loss scaler skips the step, and the training finishes
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.acceptance.guard import Cases
from benchmarks.acceptance.plan import BROKEN, BROKEN_FP16
from benchmarks.acceptance.record import Figures, Setting
from benchmarks.acceptance.runs import (
    IMAGES,
    OWN,
    UNTRACKED,
    features_flag,
    losses,
    metrics,
    model_bytes,
    networks,
    teacher_flags,
)
from benchmarks.acceptance.starting import Started, Starter

BROKEN_STEP = 5
_REFUSED = 2
_LIMIT_S = 120.0
_MESSAGES = {
    "logits": rf"loss term ce is not finite on rank 0 \(the student's logits of sample \d+\) at step {BROKEN_STEP}: [^\n]*",
    "gradient": rf"the gradient of \S+ is not finite \(rank 0 had samples [^)]*\) at step {BROKEN_STEP}: [^\n]*",
}


def build(setting: Setting, starter: Starter) -> Cases:
    """Start all first halves and broken runs at once."""
    kinds: dict[str, Callable[..., Callable[[], Figures]]] = {
        "resume": _resume,
        "logits": _refused,
        "gradient": _refused,
        "overflow": _overflow,
    }
    names = [*BROKEN, *(() if setting.is_trial else BROKEN_FP16)]
    return {name: kinds[name.split("/")[0]](name, setting, starter) for name in names}


def _resume(name: str, setting: Setting, starter: Starter) -> Callable[[], Figures]:
    """Train with all that a checkpoint must restore: momentum, average, projectors, the position in an epoch."""
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
    straight = starter.command(f"e-{label}-straight", *flags, f"--run_dir={directory / 'straight'}")
    halves = [*flags, f"--run_dir={directory / 'halves'}"]
    first = starter.command(f"e-{label}-first", *halves, "--checkpoint.stop_after_steps=10")
    return partial(_same_bytes, directory, straight, first, partial(starter.command, f"e-{label}-second", *halves))


def _same_bytes(directory: Path, straight: Started, first: Started, second: Callable[[], Started]) -> Figures:
    first.finish(_LIMIT_S)
    assert not (directory / "halves/summary.json").exists(), "the first half has run to the end"
    second().finish(_LIMIT_S)
    straight.finish(_LIMIT_S)
    runs = [directory / name for name in ("straight", "halves")]
    is_same = model_bytes(runs[0]) == model_bytes(runs[1])
    are_equal = metrics(runs[0]) == metrics(runs[1])
    return {
        "ok": is_same and are_equal,
        "same_bytes": is_same,
        "same_metrics": are_equal,
        "steps": metrics(runs[1])[-1]["step"],
    }


def _broken_run(name: str, setting: Setting, starter: Starter, breaks: str) -> tuple[Path, Started]:
    run_dir, precision = setting.scratch / name, name.split("/")[1]
    flags = [
        *("train", *UNTRACKED, *IMAGES, "--data.limit_train=320", f"--model.arch={OWN}:disturbed", "--optim.lr=0.05"),
        *("--train.batch_size=32", "--train.max_steps=10", "--train.log_every_steps=1", "--checkpoint.every_steps=2"),
        *(f"--train.precision={precision}", f"--run_dir={run_dir}"),
    ]
    env = {"KD_ACCEPTANCE_BREAKS": f"{breaks}:{BROKEN_STEP}"}
    return run_dir, starter.command(f"e-{name.replace('/', '-')}", *flags, env=env)


def _refused(name: str, setting: Setting, starter: Starter) -> Callable[[], Figures]:
    kind = name.split("/")[0]
    run_dir, started = _broken_run(name, setting, starter, kind)
    return partial(_stops_with_one_paragraph, kind, run_dir, started)


def _stops_with_one_paragraph(kind: str, run_dir: Path, started: Started) -> Figures:
    printed = started.finish(_LIMIT_S, code=_REFUSED)
    messages = re.findall(_MESSAGES[kind], printed)
    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir() if not path.name.startswith("."))
    is_ok = len(messages) == 1 and "Traceback" not in printed and kept[-1:] == [f"step-{BROKEN_STEP - 1:08d}"]
    return {"ok": is_ok, "message": messages[:1], "exit_code": _REFUSED, "newest_checkpoint": kept[-1:]}


def _overflow(name: str, setting: Setting, starter: Starter) -> Callable[[], Figures]:
    run_dir, started = _broken_run(name, setting, starter, "gradient")
    return partial(_step_is_skipped, run_dir, started)


def _step_is_skipped(run_dir: Path, started: Started) -> Figures:
    started.finish(_LIMIT_S)
    overflowed = {line["step"]: line["overflowed_steps"] for line in metrics(run_dir) if line["split"] == "train"}
    steps = json.loads((run_dir / "summary.json").read_text())["steps"]
    are_finite = all(map(math.isfinite, losses(run_dir)))
    return {"ok": overflowed[BROKEN_STEP] == 1 and steps == 10 and are_finite, "overflowed": overflowed, "steps": steps}
