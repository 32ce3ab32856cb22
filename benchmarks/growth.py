"""Growth of cost with images, views, classes and layers: `python -m benchmarks.growth`.

Each case is a `cache build` and a training of one epoch from that cache (ResNet-50 teaches ResNet-18, hybrid, 32x32, random
pixels), each command in a process of its own, with one of the numbers changed:
    base          1,024 samples, 1 view, 10 classes, 4 layers
    samples_...   more images           views_...     more views
    classes_...   more classes          layers_...    fewer layers
Medians are microseconds of a sample and view in the build (its own figure), and of a sample in the training; the notes hold the
largest resident memory of both commands, in MiB, and the bytes of a sample and view. The cases take turns. Run it alone.
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

from benchmarks.harness import Result, cpu_threads, finish, suite_parser
from kd_accel.models.factory import build_model

_SAMPLES, _CLASSES = "KD_GROWTH_SAMPLES", "KD_GROWTH_CLASSES"
_PCA_SAMPLES = 640
"""More than the 512 directions of the last layer, whose map has one pixel."""
_ARGS = {"zero_init_residual": True}


@dataclass(frozen=True)
class Case:
    """Numbers of one build and training.

    Args:
        samples: of training.
        views: of each sample.
        classes: of the labels.
        layers: that are compared, from the last one on.
    """

    samples: int
    views: int = 1
    classes: int = 10
    layers: int = 4


def images(split: str, image_size: int) -> dict[str, object]:
    """Make a split of random pixels, as `data.source` expects it; the environment has the numbers."""
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
    parser = suite_parser(__doc__, repeats=2)
    parser.add_argument("--cases", nargs="+", help="some of them; default: all")
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {}
    notes: dict[str, Any] = {}
    for turn in range(arguments.repeats):
        for name, case in cases(Case(max(_PCA_SAMPLES, arguments.batch_size * arguments.steps))).items():
            if arguments.cases and name not in arguments.cases:
                continue
            with tempfile.TemporaryDirectory() as directory:
                measured = run_case(case, Path(directory), batch_size=arguments.batch_size, threads=arguments.threads)
            for key in ("build_us", "train_us"):
                found.setdefault(f"{name}/{key}", []).append(measured.pop(key))
            notes[name] = measured
            print(f"{turn} {name}: {measured}", file=sys.stderr)
    finish(Result.of_repeats("growth", found, notes=notes, unit="us"), threads=arguments.threads)


def run_case(case: Case, directory: Path, *, batch_size: int, threads: int) -> dict[str, float]:
    """Build a cache and train from it. Returns times, memory and bytes."""
    weights = directory / "teacher.safetensors"
    teacher = build_model("torchvision/resnet50", num_classes=case.classes, arch_args=_ARGS)
    save_file({name: value.contiguous() for name, value in teacher.state_dict().items()}, weights)
    flags = [
        *("--data.source=import:benchmarks.growth:images", "--data.val_fraction=0", f"--data.views={case.views}"),
        *("--teacher.arch=torchvision/resnet50", f"--teacher.weights={weights}", f"--teacher.arch_args={json.dumps(_ARGS)}"),
        *("--teacher.mean=[0.5, 0.5, 0.5]", "--teacher.std=[0.25, 0.25, 0.25]", "--teacher.outputs=cached"),
        *(f"--teacher.cache.dir={directory / 'cache'}", f"--train.batch_size={batch_size}", "--train.epochs=1"),
    ]
    if case.layers:
        layers = [f"layer{number}" for number in range(5 - case.layers, 5)]
        flags.append(f"--distill.features.mse={{layers: {layers}, args: {{pca_images: {_PCA_SAMPLES}}}}}")
    environment = {**cpu_threads(threads), _SAMPLES: str(case.samples), _CLASSES: str(case.classes)}
    printed, build_mib = _run(["cache", "build", *flags], environment)
    rate = float(re.findall(r"([0-9.]+) samples/s", printed)[-1])
    run_dir = directory / "run"
    own = ["--tracking.wandb=disabled", "--checkpoint.every_epochs=null", "--train.log_every_steps=1"]
    _, train_mib = _run(["train", f"--run_dir={run_dir}", *own, *flags], environment)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rates = [line["images_per_second"] for line in lines if line["split"] == "train"][1:]
    info, _ = _run(["cache", "info", "--json", *flags], environment)
    return {
        "build_us": 1e6 / rate,
        "train_us": 1e6 / float(np.median(rates)),
        "build_mib": round(build_mib),
        "train_mib": round(train_mib),
        "sample_bytes": json.loads(info[info.index("{") :])["bytes_per_sample_and_view"]["all"],
    }


def _run(command: list[str], environment: dict[str, str]) -> tuple[str, float]:
    """Run a command. Returns (what it printed, its largest resident memory in MiB)."""
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
