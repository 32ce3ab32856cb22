"""Accuracy, loss and agreement with the teacher on a held-out split, each sample counted once at any number of processes.

Every rank sums over its share of the samples and the sums are added, so no padding, gathering or trimming of batches is needed,
and shares may differ in length. Nothing here draws a random number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from kd_accel.config.schema import RunConfig
from kd_accel.data.datamodule import Data
from kd_accel.data.loader import EvalLoader
from kd_accel.errors import UserError
from kd_accel.types import TeacherSource

HeldOutSplit = Literal["val", "test"]
Forward = Callable[[Tensor], Tensor]
"""uint8 images [B, 3, H, W] -> logits [B, C]."""


class HeldOut:
    """A held-out split, and the teacher's answers on it: one view each, so they are asked for once and kept (host memory)."""

    def __init__(self, loader: EvalLoader, *, teacher: TeacherSource | None = None) -> None:
        self.loader = loader
        self._teacher = teacher
        self._teacher_logits: list[Tensor] | None = None

    @property
    def has_teacher(self) -> bool:
        return self._teacher is not None

    def teacher_logits(self, accelerator: Accelerator) -> list[Tensor | None]:
        """One [B, C] per batch of this rank, or None for each where there is no teacher."""
        if self._teacher is None:
            return [None] * len(self.loader)
        if self._teacher_logits is None:
            answers = (self._teacher(batch.to(accelerator.device)).logits for batch in self.loader)
            self._teacher_logits = [answer.cpu() for answer in answers if answer is not None]
        return list(self._teacher_logits)


@torch.no_grad()
def evaluate(forward: Forward, held_out: HeldOut, *, accelerator: Accelerator) -> dict[str, float]:
    """{"samples", "loss", "accuracy"} and, where there is a teacher, "agreement": fractions of 1. The loss is the cross-entropy.

    samples: how many were counted.

    The caller puts the model in evaluation mode. Every rank must call this.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    for batch, teacher_logits in zip(held_out.loader, held_out.teacher_logits(accelerator), strict=True):
        on_device = batch.to(accelerator.device, non_blocking=True)
        with accelerator.autocast():
            logits = forward(on_device.images).float()
        sums += _batch_sums(logits, on_device.labels, teacher_logits)
    total = accelerator.reduce(sums, "sum")
    samples, loss, correct, agreeing = total.tolist()
    if not samples:
        raise UserError("evaluation: the split has no samples; raise data.val_fraction or data.limit_test")
    result = {"samples": int(samples), "loss": loss / samples, "accuracy": correct / samples}
    return {**result, "agreement": agreeing / samples} if held_out.has_teacher else result


@torch.no_grad()
def teacher_accuracy(held_out: HeldOut, *, accelerator: Accelerator) -> float:
    """The teacher's own accuracy on the split, from the answers that are kept for the agreement."""
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch, logits in zip(held_out.loader, held_out.teacher_logits(accelerator), strict=True):
        assert logits is not None
        sums += torch.tensor([len(batch.samples), (logits.argmax(1) == batch.labels).sum()], dtype=torch.float64).to(
            sums.device
        )
    samples, correct = accelerator.reduce(sums, "sum").tolist()
    return correct / samples


def synchronize_buffers(module: nn.Module, *, accelerator: Accelerator) -> None:
    """Give every rank the buffers of rank 0 (BatchNorm statistics drift apart until the next wrapped forward).

    Without it the ranks would evaluate models that differ from each other and from the one that is saved.
    """
    if accelerator.num_processes > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)


def _batch_sums(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> Tensor:
    answer = logits.argmax(1)
    agreeing = torch.zeros((), device=logits.device)
    if teacher_logits is not None:
        agreeing = (answer == teacher_logits.to(logits.device).argmax(1)).sum()
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    samples = torch.full((), len(labels), device=logits.device)
    return torch.stack([value.double() for value in (samples, loss, (answer == labels).sum(), agreeing)])


def held_out(
    data: Data, config: RunConfig, accelerator: Accelerator, *, split: HeldOutSplit, teacher: TeacherSource | None
) -> HeldOut:
    """A held-out split with, where there is a teacher, what it says about it."""
    loader = EvalLoader(
        data.train if split == "val" else data.test,
        samples=data.splits.val if split == "val" else data.splits.test,
        batch_size=config.train.eval_batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=config.data.num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    return HeldOut(loader, teacher=teacher)
