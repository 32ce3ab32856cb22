"""Accuracy, loss and agreement with the teacher on a held-out split, each row counted once at any number of processes.

Every rank sums over its share of the rows and the sums are added, so no padding, gathering or trimming of batches is needed,
and shares may differ in length. Nothing here draws a random number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from kd_accel.data.loader import EvalLoader
from kd_accel.types import SignalSource, UserError

Forward = Callable[[Tensor], Tensor]
"""uint8 images [B, 3, H, W] -> logits [B, C]."""


class HeldOut:
    """A held-out split, and the teacher's answers on it: one view each, so they are asked for once and kept (host memory)."""

    def __init__(self, loader: EvalLoader, *, signals: SignalSource | None = None) -> None:
        self.loader = loader
        self._signals = signals
        self._teacher_logits: list[Tensor] | None = None

    @property
    def has_teacher(self) -> bool:
        return self._signals is not None

    def teacher_logits(self, accelerator: Accelerator) -> list[Tensor | None]:
        """One [B, C] per batch of this rank, or None for each where there is no teacher."""
        if self._signals is None:
            return [None] * len(self.loader)
        if self._teacher_logits is None:
            answers = (self._signals(batch.to(accelerator.device)).logits for batch in self.loader)
            self._teacher_logits = [answer.cpu() for answer in answers if answer is not None]
        return list(self._teacher_logits)


@torch.no_grad()
def evaluate(forward: Forward, held_out: HeldOut, *, accelerator: Accelerator) -> dict[str, float]:
    """{"rows", "loss", "accuracy"} and, where there is a teacher, "agreement": fractions of 1. The loss is the cross-entropy.

    rows: how many were counted.

    The caller puts the model in evaluation mode. Every rank must call this.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    for batch, teacher_logits in zip(held_out.loader, held_out.teacher_logits(accelerator), strict=True):
        on_device = batch.to(accelerator.device, non_blocking=True)
        with accelerator.autocast():
            logits = forward(on_device.images).float()
        sums += _batch_sums(logits, on_device.labels, teacher_logits)
    total = accelerator.reduce(sums, "sum")
    rows, loss, correct, agreeing = total.tolist()
    if not rows:
        raise UserError("evaluation: the split has no rows; raise data.val_fraction or data.limit_test")
    result = {"rows": int(rows), "loss": loss / rows, "accuracy": correct / rows}
    return {**result, "agreement": agreeing / rows} if held_out.has_teacher else result


@torch.no_grad()
def teacher_accuracy(held_out: HeldOut, *, accelerator: Accelerator) -> float:
    """The teacher's own accuracy on the split, from the answers that are kept for the agreement."""
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch, logits in zip(held_out.loader, held_out.teacher_logits(accelerator), strict=True):
        assert logits is not None
        sums += torch.tensor([len(batch.rows), (logits.argmax(1) == batch.labels).sum()], dtype=torch.float64).to(sums.device)
    rows, correct = accelerator.reduce(sums, "sum").tolist()
    return correct / rows


def synchronise_buffers(module: nn.Module, *, accelerator: Accelerator) -> None:
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
    rows = torch.full((), len(labels), device=logits.device)
    return torch.stack([value.double() for value in (rows, loss, (answer == labels).sum(), agreeing)])
