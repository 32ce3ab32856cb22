"""Item c, agreement of views made on the device with views made on the host, and of cached outputs with live outputs.

views/TRANSFORM    images and labels of the batches must be equal bit for bit
cached-live/TYPE   a cache of this storage type against the live teacher, with the same batch shape: largest difference
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.acceptance.guard import Cases
from benchmarks.acceptance.record import Figures, Setting
from benchmarks.caches import write_cache
from benchmarks.jobs import IMAGE_SIZE, Bench, Size, build_live_teacher, hybrid, open_bench
from kd_accel.cache.verify import largest_difference, tolerance
from kd_accel.config.schema import StorageType
from kd_accel.data.batches import BatchLoader
from kd_accel.data.dataset import MemoryImages
from kd_accel.data.loader import TrainLoader
from kd_accel.data.transforms import CutMix, MixUp, RandomCrop, RandomErasing, RandomHorizontalFlip, ViewTransform
from kd_accel.teacher.teacher import LiveTeacher

TRANSFORMS = {
    "none": (),
    "crop": (RandomCrop(padding=4),),
    "crop_flip": (RandomCrop(padding=4), RandomHorizontalFlip()),
    "crop_flip_erasing": (RandomCrop(padding=4), RandomHorizontalFlip(), RandomErasing(value=[1, 2, 3])),
    "crop_flip_mixup": (RandomCrop(padding=4), RandomHorizontalFlip(), MixUp()),
    "crop_flip_cutmix": (RandomCrop(padding=4), RandomHorizontalFlip(), CutMix(p=0.5)),
}
TYPES: tuple[StorageType, ...] = ("float32", "float16", "bfloat16", "int8")
_EPOCHS, _IMAGES = (0, 1, 7), 256


def build(setting: Setting, part: str) -> Cases:
    """Return the cases."""
    bench = open_bench(Size(setting.size(128, 4), 2))
    # Built once, by the first case that needs it.
    teacher = cache(partial(_live_teacher, bench))
    cases = {f"views/{name}": partial(views_agree, name, bench.device) for name in TRANSFORMS}
    return cases | {
        f"cached-live/{dtype}": partial(cached_and_live, bench, teacher, setting.scratch / dtype, dtype) for dtype in TYPES
    }


def views_agree(name: str, device: torch.device) -> Figures:
    """Make the same batches on the host and on the device, and count the values of images and labels that differ."""
    generator = np.random.default_rng(1)
    pixels = generator.integers(0, 256, (2 * _IMAGES, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    images = MemoryImages(pixels, generator.integers(0, 10, len(pixels)), [str(label) for label in range(10)])
    samples = np.sort(generator.choice(len(pixels), _IMAGES, replace=False))
    transform = ViewTransform(TRANSFORMS[name], IMAGE_SIZE).with_partners(samples)
    on_host, on_device = (
        TrainLoader(BatchLoader({"train": images}, transform), samples=samples, batch_size=64) for _ in range(2)
    )
    kept = torch.from_numpy(images.pixels(samples)).permute(0, 3, 1, 2)
    on_device.keep_images(kept.to(device, memory_format=torch.channels_last))
    differing = 0
    for epoch in _EPOCHS:
        for (expected,), (batch,) in zip(on_host.epoch(epoch), on_device.epoch(epoch), strict=True):
            differing += int((batch.images.cpu() != expected.images).sum()) + int((batch.labels.cpu() != expected.labels).sum())
    return {"ok": differing == 0, "differing_values": differing, "views": len(_EPOCHS), "images": _IMAGES}


def cached_and_live(bench: Bench, make_teacher: Callable[[], LiveTeacher], directory: Path, dtype: StorageType) -> Figures:
    """Write a cache, and compare its outputs with those of the live teacher, relative to the largest value of each tensor.

    On a CPU a float32 cache must be exact.
    """
    teacher = make_teacher()
    source = write_cache(bench, directory, teacher, views=1, dtype=dtype).source("train")
    shares = [(samples, 0) for samples in np.split(bench.samples, bench.size.steps)]
    differences = [
        largest_difference(source(batch), teacher(batch), source.ranges(batch)) for batch in bench.batches("train", shares)
    ]
    name, difference = max(differences, key=lambda named: named[1])
    is_exact = dtype == "float32" and bench.device.type == "cpu"
    allowed = 0.0 if is_exact else tolerance(dtype, "float32")
    return {"ok": difference <= allowed, "largest_difference": difference, "tensor": name}


def _live_teacher(bench: Bench) -> LiveTeacher:
    teacher = build_live_teacher(bench, hybrid()).live
    assert teacher is not None
    return teacher
