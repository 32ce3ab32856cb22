"""Item f: `cache build`, `cache verify` and a second `cache build`, for the logits and features of ResNet-50.

build    images/s of the teacher's forward and the writing, where each view counts as an image, and the time of the command
verify   checksums of all files, and some outputs computed again: largest difference, relative to the largest value
rebuild  must find a complete cache
"""

from __future__ import annotations

import json
import re
import time
from functools import partial
from typing import Any

from benchmarks.acceptance.guard import Cases
from benchmarks.acceptance.record import Figures, Setting
from benchmarks.acceptance.runs import MANY_IMAGES, UNTRACKED, features_flag, teacher_flags
from benchmarks.acceptance.starting import Starter

_LIMIT_S = 120.0


def build(setting: Setting, starter: Starter) -> Cases:
    """Return the cases, which must run in this order."""
    directory = setting.scratch / "cache"
    samples = setting.size(8192, 64)
    flags = [
        *(*UNTRACKED, *MANY_IMAGES, f"--data.limit_train={samples}", f"--data.views={setting.size(2, 1)}"),
        *("--model.arch=torchvision/resnet18", *teacher_flags(setting, starter, "torchvision/resnet50")),
        *("--teacher.outputs=cached", f"--teacher.cache.dir={directory}", f"--train.batch_size={setting.size(128, 16)}"),
        features_flag(setting.size(4, 2), pca_images=setting.size(2048, 64)),
    ]
    return {
        "build": partial(_build, starter, flags),
        "verify": partial(_verify, starter, flags),
        "rebuild": partial(_rebuild, starter, flags),
    }


def _build(starter: Starter, flags: list[str]) -> Figures:
    started_at = time.monotonic()
    printed = starter.command("f-build", "cache", "build", *flags).finish(_LIMIT_S)
    command_s = time.monotonic() - started_at
    samples, rate = re.findall(r": (\d+) samples in \d+ s \((\d+) samples/s\)", printed)[-1]
    return {"images_per_s": int(rate), "images": int(samples), "command_s": round(command_s, 2)}


def _verify(starter: Starter, flags: list[str]) -> Figures:
    report = _last_object(starter.command("f-verify", "cache", "verify", "--json", *flags).finish(_LIMIT_S))
    return {"ok": report["is_intact"], **{name: report[name] for name in ("largest_difference", "files", "bytes")}}


def _rebuild(starter: Starter, flags: list[str]) -> Figures:
    printed = starter.command("f-rebuild", "cache", "build", *flags).finish(_LIMIT_S)
    return {"ok": "nothing to do" in printed}


def _last_object(printed: str) -> dict[str, Any]:
    return json.loads([line for line in printed.splitlines() if line.startswith("{")][-1])
