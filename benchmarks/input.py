"""Speed of the input pipeline: `python -m benchmarks.input`.

The first four cases produce batches of 128 normalized float images with their labels, from the same 1,024 images of 32x32
pixels, in one process without workers and with `--threads` threads. All but `gather` crop and flip at random.
    loader          the loader of kd_accel: views of a batch at once, from uint8 pixels in memory
    v2              PIL images, torchvision.transforms.v2 on each image, and a DataLoader: the typical pipeline
    with_transform  Hugging Face `datasets`: encoded images, decoded and transformed one by one in `with_transform`
    gather          a gather from one uint8 tensor in memory, and the normalization: the limit of the hardware
    student         training steps of the student (ResNet-18), to show the share of the loader in a step. With a GPU this
                    training makes its views on the GPU, and `loader` is the case of data sets that do not fit on the GPU.

`--size 224` measures the decoding of photos instead (`benchmarks/photos.py`).

The result is images/s; a block is an epoch; the cases take turns. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset as HuggingFaceDataset
from torch.utils.data import DataLoader

from benchmarks.harness import Result, benchmark_parser, finish, measure_in_turns
from benchmarks.jobs import MEAN, PLAIN, STD, Bench, Size, build_training, epochs_of, open_bench, with_settings
from benchmarks.photos import PHOTO_SIZES, photo_cases
from benchmarks.pil_images import PilImages, crop_flip_transform, pil_images
from kd_accel.models.preprocess import Normalize

FAST_EPOCHS = 20
"""Epochs in a block of the cases whose epoch takes milliseconds."""


def main() -> None:
    parser = benchmark_parser(__doc__, repeats=9)
    parser.add_argument("--size", type=int, help="side of images that are cut from JPEG photos, in pixels")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.size is not None:
        measure_photos(arguments)
        return
    bench = open_bench(Size(arguments.batch_size, arguments.steps))
    with tempfile.TemporaryDirectory() as directory:
        rates = measure_in_turns(cases(bench, Path(directory), arguments.repeats), repeats=arguments.repeats)
    result = Result.of_repeats("input", rates, notes={"batch_size": arguments.batch_size, "steps_per_block": arguments.steps})
    for numerator, denominator in (("loader", "v2"), ("loader", "with_transform"), ("loader", "gather"), ("loader", "student")):
        result.add_ratio(numerator, denominator)
    finish(result)


def measure_photos(arguments: argparse.Namespace) -> None:
    """Measure the cases of `benchmarks/photos.py`."""
    sizes = {"image_size": arguments.size, "batch_size": arguments.batch_size, "steps": arguments.steps}
    with tempfile.TemporaryDirectory() as directory:
        rates = measure_in_turns(photo_cases(Path(directory), **sizes), repeats=arguments.repeats)
    result = Result.of_repeats("input-photos", rates, notes=sizes)
    for width, height in PHOTO_SIZES:
        for kind in ("v2_tensor", "v2_pil"):
            result.add_ratio(f"loader/{width}x{height}", f"{kind}/{width}x{height}")
    finish(result)


def cases(bench: Bench, directory: Path, repeats: int) -> dict[str, Callable[[], float]]:
    """Return the cases. directory: run directory of the student."""
    pixels = bench.images.pixels(bench.samples)
    config = with_settings(PLAIN, train={"epochs": repeats + 1})
    return {
        "loader": _loader(bench),
        "v2": _v2(bench),
        "with_transform": _with_transform(bench),
        "gather": _gather(bench, torch.from_numpy(pixels).permute(0, 3, 1, 2)),
        "student": epochs_of(build_training(bench, config, directory)),
    }


def _loader(bench: Bench) -> Callable[[], float]:
    loader = bench.data().train_loader(batch_size=bench.size.batch_size)
    normalize, epochs = Normalize(MEAN, STD, memory_format=torch.contiguous_format), iter(range(1 << 30))

    def block() -> float:
        for _ in range(FAST_EPOCHS):
            for micro_batches in loader.epoch(next(epochs)):
                for batch in micro_batches:
                    normalize(batch.images)
        return FAST_EPOCHS * bench.size.samples

    return block


def _gather(bench: Bench, stored: torch.Tensor) -> Callable[[], float]:
    normalize, labels = Normalize(MEAN, STD, memory_format=torch.contiguous_format), torch.from_numpy(bench.images.labels)

    def block() -> float:
        for _ in range(FAST_EPOCHS):
            for samples in torch.randperm(bench.size.samples).split(bench.size.batch_size):
                normalize(stored.index_select(0, samples))
                labels[samples]
        return FAST_EPOCHS * bench.size.samples

    return block


def _v2(bench: Bench) -> Callable[[], float]:
    loader = DataLoader(PilImages(bench), batch_size=bench.size.batch_size, shuffle=True, drop_last=True)
    return lambda: float(sum(len(labels) for _, labels in loader))


def _with_transform(bench: Bench) -> Callable[[], float]:
    transform = crop_flip_transform()
    images, labels = pil_images(bench)

    def transformed(examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"images": [transform(image.convert("RGB")) for image in examples["image"]], "labels": examples["label"]}

    dataset: Any = HuggingFaceDataset.from_dict({"image": images, "label": labels}).with_transform(transformed)
    loader = DataLoader(dataset, batch_size=bench.size.batch_size, shuffle=True, drop_last=True)
    return lambda: float(sum(len(batch["labels"]) for batch in loader))


if __name__ == "__main__":
    main()
