"""Scaling of time and memory with samples, views, classes and layers: `python -m benchmarks.growth`.

Each case is a `cache build` and a training of one epoch that reads the cache, each a command in a new process: hybrid
distillation of ResNet-50 into ResNet-18 on random 32x32 images. The cases differ from `base` in one number:
    base          1,024 samples, 1 view, 10 classes, 4 layers
    samples_...   more samples          views_...     more views
    classes_...   more classes          layers_...    fewer layers
`.../build_us` is the median time of a sample and view in the build, as `cache build` reports it, and `.../train_us` that of a
sample in the training, both in microseconds. The notes have the peak resident memory of both commands in MiB, and the bytes of
a sample and view in the cache. The cases take turns. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from benchmarks.harness import Result, benchmark_parser, cpu_threads, finish, training_rates
from kd_accel.models.factory import build_model

_SAMPLES, _CLASSES = "KD_GROWTH_SAMPLES", "KD_GROWTH_CLASSES"
_PCA_SAMPLES = 640
"""More than the 512 components of layer4, whose output has one pixel per sample."""
_ARCH_ARGS = {"zero_init_residual": True}


@dataclass(frozen=True)
class Case:
    """Numbers of one build and training.

    Args:
        samples: Training samples.
        views: Views of each sample.
        classes: Classes of the labels.
        layers: Compared layers, counted from the last one.
    """

    samples: int
    views: int = 1
    classes: int = 10
    layers: int = 4


def images(split: str, image_size: int) -> dict[str, object]:
    """Return a split of random images in the format of `data.source`; environment variables set its size."""
    generator = np.random.default_rng(0)
    samples, classes = int(os.environ[_SAMPLES]) if split == "train" else 16, int(os.environ[_CLASSES])
    pixels = generator.integers(0, 256, (samples, image_size, image_size, 3), dtype=np.uint8)
    return {
        "images": pixels,
        "labels": generator.integers(0, classes, samples).tolist(),
        "label_names": [str(label) for label in range(classes)],
    }


def cases(base: Case) -> dict[str, Case]:
    """Return all cases by name."""
    return {
        "base": base,
        **{f"samples_{factor}x": replace(base, samples=factor * base.samples) for factor in (2, 4, 8)},
        **{f"views_{views}": replace(base, views=views) for views in (2, 4)},
        **{f"classes_{classes}": replace(base, classes=classes) for classes in (100, 1000)},
        **{f"layers_{layers}": replace(base, layers=layers) for layers in (0, 1, 2)},
    }


def main() -> None:
    parser = benchmark_parser(__doc__, repeats=2)
    parser.add_argument("--cases", nargs="+", help="cases to measure (default: all)")
    arguments = parser.parse_args()
    times_us: dict[str, list[float]] = {}
    notes: dict[str, Any] = {}
    for turn in range(arguments.repeats):
        for name, case in cases(Case(max(_PCA_SAMPLES, arguments.batch_size * arguments.steps))).items():
            if arguments.cases and name not in arguments.cases:
                continue
            with tempfile.TemporaryDirectory() as directory:
                measured = run_case(case, Path(directory), batch_size=arguments.batch_size, threads=arguments.threads)
            for key in ("build_us", "train_us"):
                times_us.setdefault(f"{name}/{key}", []).append(measured.pop(key))
            notes[name] = measured
            figures = ", ".join(f"{key} {value:g}" for key, value in measured.items())
            print(f"turn {turn + 1} of {arguments.repeats}, {name}: {figures}", file=sys.stderr)
    finish(Result.of_repeats("growth", times_us, notes=notes, unit="us"), threads=arguments.threads)


def run_case(case: Case, directory: Path, *, batch_size: int, threads: int) -> dict[str, float]:
    """Build a cache and train with it; return the times, peak memory and bytes by name."""
    weights = directory / "teacher.safetensors"
    teacher = build_model("torchvision/resnet50", num_classes=case.classes, arch_args=_ARCH_ARGS)
    save_file({name: value.contiguous() for name, value in teacher.state_dict().items()}, weights)
    flags = [
        *("--data.source=import:benchmarks.growth:images", "--data.val_fraction=0", f"--data.views={case.views}"),
        *("--teacher.arch=torchvision/resnet50", f"--teacher.weights={weights}"),
        f"--teacher.arch_args={json.dumps(_ARCH_ARGS)}",
        *("--teacher.mean=[0.5, 0.5, 0.5]", "--teacher.std=[0.25, 0.25, 0.25]"),
        *("--teacher.min_accuracy=null", "--teacher.outputs=cached"),
        *(f"--teacher.cache.dir={directory / 'cache'}", f"--train.batch_size={batch_size}", "--train.epochs=1"),
    ]
    if case.layers:
        layers = [f"layer{number}" for number in range(5 - case.layers, 5)]
        flags.append(f"--distill.features.mse={{layers: {layers}, args: {{pca_images: {_PCA_SAMPLES}}}}}")
    environment = {**cpu_threads(threads), _SAMPLES: str(case.samples), _CLASSES: str(case.classes)}
    printed, build_mib = _run(["cache", "build", *flags], environment)
    rate = float(re.findall(r"([0-9.]+) samples/s", printed)[-1])
    run_dir = directory / "run"
    train_flags = ["--tracking.wandb=disabled", "--checkpoint.every_epochs=null", "--train.log_every_steps=1"]
    _, train_mib = _run(["train", f"--run_dir={run_dir}", *train_flags, *flags], environment)
    info, _ = _run(["cache", "info", "--json", *flags], environment)
    # The first line of metrics includes the warm-up.
    return {
        "build_us": 1e6 / rate,
        "train_us": 1e6 / float(np.median(training_rates(run_dir)[1:])),
        "build_mib": round(build_mib),
        "train_mib": round(train_mib),
        "sample_bytes": json.loads(info[info.index("{") :])["bytes_per_sample_and_view"]["all"],
    }


def _run(command: list[str], environment: dict[str, str]) -> tuple[str, float]:
    """Run a command; return (its output, its peak resident memory in MiB). A failure ends this process."""
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen([sys.executable, "-m", "kd_accel", *command], env=environment, stdout=out, stderr=out)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        printed = out.read()
    if process.returncode:
        raise SystemExit(printed[-4000:])
    return printed, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
