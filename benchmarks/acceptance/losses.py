"""Item c, losses of 30 steps of ResNet-18 on the device against those on the CPU, with and without TF32.

`float32` runs with NVIDIA_TF32_OVERRIDE=0 and `train.tf32: false`, `tf32` with `train.tf32: true`. Without TF32 only the order
of summation differs.

Many trainings amplify rounding until it hides errors: with its usual initial weights ResNet-18 has such large gradients on
32x32 images that two orders of summation differ by 1e-2 after four steps. Here the residual branches start at zero, and SGD has
a small constant learning rate, no momentum, and enough weight decay to be seen. Largest relative difference of the 30 losses of
this training, measured on a CPU:

    channels_last, another order of summation                                                 7.0e-7
    operands of all convolutions and matrix products rounded to TF32, also in the backward    1.5e-3
    learning rate 1 % too large                                                               9.9e-4
    no weight decay                                                                           2.4e-3

So `float32` detects errors of this size; `tf32` detects coarser errors of the TF32 kernels. Once in a while rounding moves an
activation across the zero of a ReLU, which shows in all later losses and is why the tolerance is not tighter.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.acceptance.guard import Cases
from benchmarks.acceptance.record import Figures, Setting
from benchmarks.acceptance.runs import IMAGES, UNTRACKED, losses, relative_difference
from benchmarks.acceptance.starting import Started, Starter

TOLERANCES = {"float32": 3e-4, "tf32": 5e-3}
"""Largest relative difference of a loss that is accepted as rounding."""
STABLE = (
    *("--model.arch=torchvision/resnet18", "--model.arch_args={zero_init_residual: true}"),
    *("--optim.lr=0.0005", "--optim.momentum=0", "--optim.schedule=constant", "--optim.weight_decay=1.0"),
)
"""Flags of a training that does not amplify rounding."""
_LIMIT_S = 120.0


def build(setting: Setting, starter: Starter) -> Cases:
    """Start all three trainings at once, and return the cases."""
    flags = [
        *("train", *UNTRACKED, *IMAGES, "--data.limit_train=640", *STABLE),
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
