"""A checkpoint at the present position, once it is sure that it is one to go on from."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_accel.distributed import gathered, on_main_process
from kd_accel.errors import UserError
from kd_accel.io.hashing import tensors_digest
from kd_accel.profiling import profiler_range
from kd_accel.training.job import Job
from kd_accel.training.nonfinite import diverged, own_name
from kd_accel.training.state import capture


def save(job: Job) -> None:
    """Begin to write a checkpoint of this moment. Every rank must call it.

    Raises UserError for numbers that went wrong, on any rank, and where the disk has refused the checkpoint before.
    """
    with profiler_range("checkpoint"):
        _save(job)


def _save(job: Job) -> None:
    look(job)
    weights = {
        own_name(name): weight.detach() for name, weight in job.train_state.module.named_parameters() if weight.requires_grad
    }
    _refuse_broken(weights, step=job.train_state.position.step)
    _refuse_drifted(weights, step=job.train_state.position.step)
    tensors, state = capture(job.train_state, job.accelerator)
    on_main_process(
        job.accelerator,
        lambda: job.writer.write(
            job.checkpoint_dir,
            step=job.train_state.position.step,
            tensors={**tensors, **job.checkpoint_tensors},
            state={**state, **job.checkpoint_extra, "metrics_bytes": job.metrics_log.length_bytes()},
            keep=job.checkpoint.keep,
        ),
    )


def settle(job: Job) -> None:
    """Wait until the last checkpoint is on the disk. Every rank must call it. Raises UserError when the disk has refused it."""
    with profiler_range("checkpoint"):
        on_main_process(job.accelerator, job.writer.wait)


def look(job: Job) -> None:
    """Count the fp16 overflows since the last look toward the next line of metrics. Every rank must call it.

    Raises UserError, on all ranks alike, for a step that is not finite for another reason.
    """
    overflowed = job.guard.look()
    if job.accelerator.scaler is not None and job.accelerator.is_main_process:
        job.train_state.meters.count_overflows(overflowed)


def _refuse_broken(weights: dict[str, Tensor], *, step: int) -> None:
    """An update of finite numbers may be too large for the weights."""
    if not torch.stack([weight.isfinite().all() for weight in weights.values()]).all():
        name = next(name for name, weight in weights.items() if not weight.isfinite().all())
        raise diverged(f"{name} is not finite after step {step}")


def _refuse_drifted(weights: dict[str, Tensor], *, step: int) -> None:
    """Ranks start from the same weights and apply the same gradients; what differs was changed by something else."""
    digests = gathered([tensors_digest(weights)])
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        own = gathered([{name: tensors_digest({name: weight}) for name, weight in weights.items()}])
        names = [name for name in weights if own[others[0]][name] != own[0][name]]
        raise UserError(
            f"the weights of rank {', '.join(map(str, others))} differ from those of rank 0 after step {step} (first in "
            f"{names[0]}): the model changes its own weights, or a device, driver or network has computed wrongly. Mend that "
            "and start again: the last checkpoint is from before, and is untouched"
        )
