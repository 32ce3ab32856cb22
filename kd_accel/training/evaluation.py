"""Accuracy, loss and agreement with the teacher on a held-out split, each sample counted once at any number of processes.

Every rank sums over its share of the samples and the sums are added, so no padding, gathering or trimming of batches is needed,
and shares may differ in length. An evaluation draws no random numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from kd_accel.data.loader import EvalLoader
from kd_accel.errors import UserError
from kd_accel.types import TeacherSource

Forward = Callable[[Tensor], Tensor]
"""uint8 images [B, 3, H, W] -> logits [B, C]."""


class HeldOut:
    """A held-out split with the teacher's logits on it, computed once and kept in host memory: the split has one view.

    Args:
        loader: batches of this rank.
        teacher: gives the teacher's output for a batch, None without a teacher.
    """

    def __init__(self, loader: EvalLoader, *, teacher: TeacherSource | None = None) -> None:
        self.loader = loader
        self._teacher = teacher
        self._teacher_logits: list[Tensor] | None = None

    @property
    def has_teacher(self) -> bool:
        """Whether the agreement with a teacher is measured."""
        return self._teacher is not None

    def teacher_logits(self, accelerator: Accelerator) -> list[Tensor | None]:
        """Return [B, C] for each batch of this rank, or None for each without a teacher."""
        if self._teacher is None:
            return [None] * len(self.loader)
        if self._teacher_logits is None:
            outputs = (self._teacher(batch.to(accelerator.device)).logits for batch in self.loader)
            self._teacher_logits = [logits.cpu() for logits in outputs if logits is not None]
        return list(self._teacher_logits)


@torch.no_grad()
def evaluate(forward: Forward, held_out: HeldOut, *, accelerator: Accelerator) -> dict[str, float]:
    """Evaluate a forward on a held-out split. Every rank must call it; the caller puts the model in evaluation mode.

    Returns:
        `samples` (their number), `loss` (mean cross-entropy), `accuracy` and, with a teacher, `agreement`: fractions of 1.
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
    """Compute the teacher's accuracy on the split, from the logits that are kept for the agreement. Every rank must call it."""
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch, logits in zip(held_out.loader, held_out.teacher_logits(accelerator), strict=True):
        assert logits is not None
        sums += torch.tensor([len(batch.index), (logits.argmax(1) == batch.labels).sum()], dtype=torch.float64).to(sums.device)
    samples, total = accelerator.reduce(sums, "sum").tolist()
    return total / samples


def synchronize_buffers(module: nn.Module, *, accelerator: Accelerator) -> None:
    """Broadcast the buffers of rank 0, before an evaluation.

    BatchNorm statistics differ between the ranks: each would evaluate another model, and only rank 0's is saved.
    """
    if accelerator.num_processes > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)


def _batch_sums(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> Tensor:
    predicted = logits.argmax(1)
    agreeing = torch.zeros((), device=logits.device)
    if teacher_logits is not None:
        agreeing = (predicted == teacher_logits.to(logits.device).argmax(1)).sum()
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    samples = torch.full((), len(labels), device=logits.device)
    return torch.stack([value.double() for value in (samples, loss, (predicted == labels).sum(), agreeing)])
