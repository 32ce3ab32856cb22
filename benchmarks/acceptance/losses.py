"""Item c, losses of 30 steps of ResNet-18 on the device against those on the CPU, with and without TF32.

`float32` runs with NVIDIA_TF32_OVERRIDE=0 and `train.tf32: false`, `tf32` with `train.tf32: true`. Without TF32 only the order
of summation differs, which 30 steps with BatchNorm amplify.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.acceptance.guard import Cases
from benchmarks.acceptance.record import Figures, Setting
from benchmarks.acceptance.runs import IMAGES, UNTRACKED, losses, relative_difference
from benchmarks.acceptance.starting import Started, Starter

TOLERANCES = {"float32": 1e-3, "tf32": 3e-2}
"""Largest relative difference of a loss that is accepted as rounding."""
_LIMIT_S = 120.0


def build(setting: Setting, starter: Starter) -> Cases:
    """Start all three trainings at once, and return the cases."""
    flags = [
        *("train", *UNTRACKED, *IMAGES, "--data.limit_train=640", "--model.arch=torchvision/resnet18", "--optim.lr=0.01"),
        *(f"--train.batch_size={setting.size(32, 4)}", f"--train.max_steps={setting.size(30, 10)}"),
        *("--train.epochs=30", "--train.log_every_steps=1"),
    ]
    run_dirs = {name: setting.scratch / f"losses-{name}" for name in ("cpu", *TOLERANCES)}
    argv = {name: [*flags, f"--run_dir={run_dir}"] for name, run_dir in run_dirs.items()}
    no_tf32 = "--train.tf32=false"
    started = {
        # The CUDA libraries read the override when they are loaded, so this training needs a new interpreter.
        "float32": starter.fresh_command("c-float32", *argv["float32"], no_tf32, env={"NVIDIA_TF32_OVERRIDE": "0"}),
        "tf32": starter.command("c-tf32", *argv["tf32"], "--train.tf32=true"),
        "cpu": starter.command("c-cpu", *argv["cpu"], no_tf32, env={"CUDA_VISIBLE_DEVICES": ""}),
    }
    return {name: partial(_compare, name, started, run_dirs) for name in TOLERANCES}


def _compare(name: str, started: dict[str, Started], run_dirs: dict[str, Path]) -> Figures:
    for training in (name, "cpu"):
        started[training].finish(_LIMIT_S)
    on_device, on_cpu = losses(run_dirs[name]), losses(run_dirs["cpu"])
    difference = relative_difference(on_device, on_cpu)
    return {"ok": difference <= TOLERANCES[name], "largest_relative_difference": difference, "steps": len(on_cpu)}
