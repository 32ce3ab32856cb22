"""Item f: `cache build`, `cache verify` and a second `cache build`, for the logits and features of ResNet-50.

forward      images/s of the teacher's forward alone (benchmarks/bare.py), eager as in a build, for each batch size of a build
build        images/s that the command prints: forward, views and the writing of all files, where each view counts as an image;
             the ratio to the forward of the same batch size; the time of the command
build-1024   the same with batches of 1,024, in another cache
verify       checksums of all files, and some outputs computed again: largest difference, relative to the largest value
rebuild      must find a complete cache
"""

from __future__ import annotations

import json
import re
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.acceptance.guard import Cases
from benchmarks.acceptance.record import Figures, Setting
from benchmarks.acceptance.runs import MANY_IMAGES, UNTRACKED, features_flag, teacher_flags
from benchmarks.acceptance.starting import Starter

_LIMIT_S = 120.0
_FORWARD_REPEATS = 5
_VIEWS = {"build": 4, "build-1024": 8}
"""{case: views of 8,192 samples, a few seconds of work}."""


def build(setting: Setting, starter: Starter) -> Cases:
    """Return the cases, which must run in this order."""
    batch_sizes = {"build": setting.size(128, 16), "build-1024": setting.size(1024, 32)}
    flags = [
        *(*UNTRACKED, *MANY_IMAGES, f"--data.limit_train={setting.size(8192, 64)}", "--model.arch=torchvision/resnet18"),
        *(*teacher_flags(setting, starter, "torchvision/resnet50"), "--teacher.outputs=cached"),
        features_flag(setting.size(4, 2), pca_images=setting.size(2048, 64)),
    ]
    argv = {
        name: [
            *(*flags, f"--teacher.cache.dir={setting.scratch / f'cache-{samples}'}"),
            *(f"--train.batch_size={samples}", f"--data.views={setting.size(_VIEWS[name], 1)}"),
        ]
        for name, samples in batch_sizes.items()
    }
    forward: dict[str, float] = {}
    return {
        "forward": partial(_forward, setting, starter, list(batch_sizes.values()), forward),
        **{name: partial(_build, starter, name, argv[name], forward, samples) for name, samples in batch_sizes.items()},
        "verify": partial(_verify, starter, argv["build"]),
        "rebuild": partial(_rebuild, starter, argv["build"]),
    }


def measure_forward(batch_sizes: list[int], *, samples: int, path: Path) -> None:
    """Measure the forward of ResNet-50 with four projected features, and write {batch size: images/s} to a file.

    Args:
        batch_sizes: Images in a forward.
        samples: Images in a block, at least one batch.
        path: File of the result.
    """
    from benchmarks.bare import forward_case, random_batches
    from benchmarks.harness import measure_in_turns
    from benchmarks.jobs import Size, open_bench

    cases = {}
    for batch_size in batch_sizes:
        bench = open_bench(Size(batch_size, max(1, samples // batch_size)))
        cases[str(batch_size)] = forward_case(bench, [images for images, _ in random_batches(bench)])
    rates = measure_in_turns(cases, repeats=_FORWARD_REPEATS)
    path.write_text(json.dumps({name: statistics.median(values) for name, values in rates.items()}))


def _forward(setting: Setting, starter: Starter, batch_sizes: list[int], forward: dict[str, float]) -> Figures:
    """Measure the forward alone, and add its images/s to `forward`, by batch size."""
    path = setting.scratch / "forward.json"
    samples = setting.size(4096, 16)
    starter.start("f-forward", partial(measure_forward, batch_sizes, samples=samples, path=path)).finish(_LIMIT_S)
    forward.update(json.loads(path.read_text()))
    return {"cases": {name: {"images_per_s": round(rate)} for name, rate in forward.items()}}


def _build(starter: Starter, name: str, flags: list[str], forward: dict[str, float], batch_size: int) -> Figures:
    started_at = time.monotonic()
    printed = starter.command(f"f-{name}", "cache", "build", *flags).finish(_LIMIT_S)
    command_s = time.monotonic() - started_at
    samples, rate = re.findall(r": (\d+) samples in \d+ s \((\d+) samples/s\)", printed)[-1]
    figures = {"images_per_s": int(rate), "images": int(samples), "command_s": round(command_s, 2), "batch_size": batch_size}
    alone = forward.get(str(batch_size))
    return figures | {"build/forward": None if alone is None else round(int(rate) / alone, 4)}


def _verify(starter: Starter, flags: list[str]) -> Figures:
    report = _last_object(starter.command("f-verify", "cache", "verify", "--json", *flags).finish(_LIMIT_S))
    return {"ok": report["is_intact"], **{name: report[name] for name in ("largest_difference", "files", "bytes")}}


def _rebuild(starter: Starter, flags: list[str]) -> Figures:
    printed = starter.command("f-rebuild", "cache", "build", *flags).finish(_LIMIT_S)
    return {"ok": "nothing to do" in printed}


def _last_object(printed: str) -> dict[str, Any]:
    return json.loads([line for line in printed.splitlines() if line.startswith("{")][-1])
