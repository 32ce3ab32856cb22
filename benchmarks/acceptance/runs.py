"""Flags of the trainings of the acceptance test, and readers of their run directories."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.acceptance.record import Setting
from benchmarks.acceptance.starting import Starter

SYNTHETIC = "import:benchmarks.synthetic"
UNTRACKED = ("--tracking.wandb=disabled",)
_VIEWS = ("--data.val_fraction=0", "--data.limit_test=64", "--data.transform=crop_flip")
IMAGES = (f"--data.source={SYNTHETIC}:images", *_VIEWS)
MANY_IMAGES = (f"--data.source={SYNTHETIC}:many_images", *_VIEWS)
_ARCH_ARGS = {"zero_init_residual": True}
_LOCK = threading.Lock()


def networks(setting: Setting) -> tuple[str, str]:
    """Return the architectures (student, teacher), small networks in a trial. Both have the layers `layer1` and `layer2`."""
    if setting.is_trial:
        return f"{SYNTHETIC}:student", f"{SYNTHETIC}:teacher"
    return "torchvision/resnet18", "torchvision/resnet50"


def features_flag(layers: int, *, pca_images: int) -> str:
    """Return the flag of a feature loss with direction `both` on the first `layers` layers."""
    names = ", ".join(f"layer{number}" for number in range(1, layers + 1))
    return f"--distill.features.mse={{layers: [{names}], args: {{direction: both, pca_images: {pca_images}}}}}"


def losses(run_dir: Path) -> list[float]:
    """Return the loss of each training line in metrics.jsonl."""
    return [line["loss"] for line in metrics(run_dir) if line["split"] == "train"]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without the speed, which differs between equal trainings."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def relative_difference(values: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest relative difference between the losses of two trainings."""
    return max(abs(value - other) / abs(other) for value, other in zip(values, expected, strict=True))


def model_bytes(run_dir: Path) -> bytes:
    """Return the bytes of the trained model."""
    return (run_dir / "model.safetensors").read_bytes()


def teacher_flags(setting: Setting, starter: Starter, arch: str) -> list[str]:
    """Return the flags of a teacher with its initial weights, which are written to a file at the first call."""
    arch_args = _ARCH_ARGS if arch == "torchvision/resnet50" else {}
    path = setting.scratch / f"{arch.rpartition(':')[2].replace('/', '-')}.safetensors"
    with _LOCK:
        if not path.exists():
            starter.start(f"weights-{path.stem}", save_weights, arch, arch_args, path).finish(60)
    flags = [
        f"--teacher.arch={arch}",
        f"--teacher.weights={path}",
        "--teacher.mean=[0.5, 0.5, 0.5]",
        "--teacher.std=[0.25, 0.25, 0.25]",
        "--teacher.min_accuracy=null",
    ]
    return [*flags, f"--teacher.arch_args={json.dumps(arch_args)}"] if arch_args else flags


def save_weights(arch: str, arch_args: dict[str, Any], path: Path) -> None:
    """Build a network and save its initial weights."""
    from safetensors.torch import save_file

    from kd_accel.models.factory import build_model

    model = build_model(arch, num_classes=10, arch_args=arch_args)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
