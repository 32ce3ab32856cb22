"""Item c, losses: 30 steps of ResNet-18 on the device against the same on the CPU, with TF32 and without.

`float32` runs with NVIDIA_TF32_OVERRIDE=0 and `train.tf32: false`, `tf32` with `train.tf32: true`. Without TF32 only the order
of sums differs, which 30 steps with BatchNorm amplify.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.acceptance.guard import Cases
from benchmarks.acceptance.record import Figures, Setting
from benchmarks.acceptance.runs import IMAGES, UNTRACKED, losses, relative_difference
from benchmarks.acceptance.starting import Started, Starter

LARGEST = {"float32": 1e-3, "tf32": 3e-2}
"""Relative differences of a loss that count as rounding."""
_LIMIT_S = 120.0


def build(setting: Setting, starter: Starter) -> Cases:
    """Start all three trainings at once. The override is read while CUDA's libraries are loaded: in a new interpreter."""
    flags = [
        *("train", *UNTRACKED, *IMAGES, "--data.limit_train=640", "--model.arch=torchvision/resnet18", "--optim.lr=0.01"),
        *(f"--train.batch_size={setting.size(32, 4)}", f"--train.max_steps={setting.size(30, 10)}"),
        *("--train.epochs=30", "--train.log_every_steps=1"),
    ]
    run_dirs = {name: setting.scratch / f"losses-{name}" for name in ("cpu", *LARGEST)}
    argv = {name: [*flags, f"--run_dir={run_dir}"] for name, run_dir in run_dirs.items()}
    full = "--train.tf32=false"
    started = {
        "float32": starter.fresh_command("c-float32", *argv["float32"], full, env={"NVIDIA_TF32_OVERRIDE": "0"}),
        "tf32": starter.command("c-tf32", *argv["tf32"], "--train.tf32=true"),
        "cpu": starter.command("c-cpu", *argv["cpu"], full, env={"CUDA_VISIBLE_DEVICES": ""}),
    }
    return {name: partial(_compared, name, started, run_dirs) for name in LARGEST}


def _compared(name: str, started: dict[str, Started], run_dirs: dict[str, Path]) -> Figures:
    for one in (name, "cpu"):
        started[one].finish(_LIMIT_S)
    on_device, on_cpu = (losses(run_dirs[one]) for one in (name, "cpu"))
    difference = relative_difference(on_device, on_cpu)
    return {"ok": difference <= LARGEST[name], "largest_relative_difference": difference, "steps": len(on_cpu)}
