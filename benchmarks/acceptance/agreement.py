"""Item c, answers: views that the device makes next to the host's, and answers from a cache next to live ones.

views/POLICY       the same, bit for bit
cached-live/TYPE   a cache of that type next to the live teacher at the same batch shape: largest difference
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.acceptance.guard import Cases
from benchmarks.acceptance.record import Figures, Setting
from benchmarks.caches import write_cache
from benchmarks.jobs import IMAGE_SIZE, Bench, Size, live_teacher, open_bench
from kd_accel.cache.compatibility import largest_difference, tolerance
from kd_accel.config.schema import Augment, StorageType
from kd_accel.data.transforms import ViewTransform
from kd_accel.teacher.teacher import LiveTeacher

POLICIES: tuple[Augment, ...] = ("none", "crop", "crop_flip")
TYPES: tuple[StorageType, ...] = ("float32", "float16", "bfloat16", "int8")
_VIEWS = (0, 1, 7)


def build(setting: Setting, part: str) -> Cases:
    bench = open_bench(Size(setting.size(128, 4), 2))
    teacher = functools.cache(partial(live_teacher, bench))
    cases = {f"views/{policy}": partial(views_agree, policy, bench.device) for policy in POLICIES}
    return cases | {
        f"cached-live/{dtype}": partial(cached_and_live, bench, teacher, setting.scratch / dtype, dtype) for dtype in TYPES
    }


def views_agree(policy: Augment, device: torch.device) -> Figures:
    transform = ViewTransform(policy, IMAGE_SIZE)
    generator = np.random.default_rng(1)
    pixels = generator.integers(0, 256, (256, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    samples = np.sort(generator.choice(50_000, len(pixels), replace=False))
    stored = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device, memory_format=torch.channels_last)
    differing = 0
    for view in _VIEWS:
        expected = torch.from_numpy(transform(pixels, samples, view)).permute(0, 3, 1, 2)
        differing += int((transform.on_device(stored, samples, view).cpu() != expected).sum())
    return {"ok": differing == 0, "differing_values": differing, "views": len(_VIEWS), "images": len(pixels)}


def cached_and_live(bench: Bench, teacher_of: Callable[[], LiveTeacher], directory: Path, dtype: StorageType) -> Figures:
    """Compare relative to the largest value of each tensor; on a CPU a float32 cache must be exact."""
    teacher = teacher_of()
    source = write_cache(bench, directory, teacher, views=1, dtype=dtype).source("train")
    shares = [(samples, 0) for samples in np.split(bench.samples, bench.size.steps)]
    found = [
        largest_difference(source(batch), teacher(batch), source.ranges(batch)) for batch in bench.batches("train", shares)
    ]
    name, difference = max(found, key=lambda one: one[1])
    is_exact = dtype == "float32" and bench.device.type == "cpu"
    allowed = 0.0 if is_exact else tolerance(dtype, "no")
    return {"ok": difference <= allowed, "largest_difference": difference, "tensor": name}
