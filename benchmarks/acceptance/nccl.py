"""Item d, NCCL: training with DistributedDataParallel over NCCL with one rank must equal training without a launch.

On a CPU the process group uses gloo.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.acceptance.guard import Cases
from benchmarks.acceptance.record import Figures, Setting
from benchmarks.acceptance.starting import launch_environment
from benchmarks.jobs import Bench, Size, epochs_of, open_bench
from benchmarks.training_case import CaseBuilder


def build(setting: Setting, part: str) -> Cases:
    """Return the case."""
    return {"nccl": partial(one_rank_over_nccl, setting)}


def one_rank_over_nccl(setting: Setting) -> Figures:
    """Train without a launch, then train the same in a process group of one rank, and compare the weights."""
    size, directory = Size(setting.size(128, 2), 5), setting.scratch / "nccl"
    expected = _train_epoch(open_bench(size, deterministic=True), directory / "alone")
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.update(launch_environment(1)[0])
    bench = open_bench(size, deterministic=True)
    weights = _train_epoch(bench, directory / "launched")
    difference = max((expected[name].double() - weights[name].double()).abs().max().item() for name in expected)
    backend = torch.distributed.get_backend()
    torch.distributed.destroy_process_group()
    is_expected = backend == ("nccl" if bench.device.type == "cuda" else "gloo")
    return {"ok": is_expected and difference == 0, "backend": backend, "largest_difference": difference}


def _train_epoch(bench: Bench, directory: Path) -> dict[str, Tensor]:
    """Train for an epoch, with DistributedDataParallel if there is a process group; return the state dict."""
    trainer = CaseBuilder(bench, directory).training("plain", directory, blocks=1)
    # Several ranks train without a graph.
    trainer.step.replay = None
    train_state = trainer.train_state
    # Accelerate does not use DistributedDataParallel for one rank on a GPU.
    if torch.distributed.is_initialized() and not isinstance(train_state.module, DistributedDataParallel):
        train_state.module = DistributedDataParallel(
            train_state.module, device_ids=[bench.device.index], gradient_as_bucket_view=True, broadcast_buffers=True
        )
    epochs_of(trainer)()
    return bench.accelerator.unwrap_model(train_state.module).state_dict()
