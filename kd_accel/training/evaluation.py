"""Accuracy, loss and agreement with the teacher on a held-out split, with each sample counted once for any number of processes.

Every rank sums over its share of the samples, and the sums are added. So batches need no padding, gathering or trimming, and
shares may differ in length. An evaluation draws no random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional

from kd_accel.data.loader import EvalLoader
from kd_accel.errors import UserError
from kd_accel.training.unreadable import failing_together
from kd_accel.types import Batch, TeacherSource

Forward = Callable[[Tensor], Tensor]
"""Function from uint8 images [B, 3, H, W] to logits [B, C]."""

Record = Callable[[Batch, Tensor, Tensor | None], None]
"""Function of a batch on the host, its logits [B, C] on the device, and the teacher's logits [B, C] or None."""


class HeldOut:
    """A held-out split with the teacher's logits, which are computed once and kept in host memory, as the split has one view.

    Args:
        loader: Loader of this rank's batches.
        teacher: Source of the teacher's output for a batch; None without a teacher.
        padded_to: Number of images of each forward, at least the loader's batch size, for compiled networks: smaller batches
            are padded, because a network is compiled again for another number. None = the images of the batch.
    """

    def __init__(self, loader: EvalLoader, *, teacher: TeacherSource | None = None, padded_to: int | None = None) -> None:
        self.loader = loader
        self._padded_to = padded_to
        self._teacher = teacher
        self._teacher_logits: list[Tensor] | None = None
        self._correct: dict[str, int] = {}

    @property
    def has_teacher(self) -> bool:
        """True if the agreement with a teacher is measured."""
        return self._teacher is not None

    def teacher_logits(self, accelerator: Accelerator) -> list[Tensor | None]:
        """Return the teacher's logits [B, C] for each batch of this rank; None for each batch without a teacher."""
        if self._teacher is None:
            return [None] * len(self.loader)
        if self._teacher_logits is None:
            found = []
            for batch in self.loader:
                on_device = batch.to(accelerator.device)
                output = self._teacher(replace(on_device, images=self.padded(on_device.images)))
                assert output.logits is not None, "each source has logits for held-out samples"
                found.append(output.logits[: len(batch.index)].cpu())
                for name, logits in output.members.items():
                    correct = (logits[: len(batch.index)].argmax(1).cpu() == batch.labels).sum()
                    self._correct[name] = self._correct.get(name, 0) + int(correct)
            self._teacher_logits = found
        return list(self._teacher_logits)

    def correct(self, accelerator: Accelerator) -> dict[str, int]:
        """Return the number of correct predictions of each of several teachers by name, on the samples of this rank."""
        self.teacher_logits(accelerator)
        return dict(self._correct)

    def padded(self, images: Tensor) -> Tensor:
        """Append black images to a batch [B, 3, H, W], up to the number of images of each forward."""
        if self._padded_to is None:
            return images
        return functional.pad(images, (0, 0, 0, 0, 0, 0, 0, self._padded_to - len(images)))


@torch.no_grad()
def evaluate(
    forward: Forward, held_out: HeldOut, *, accelerator: Accelerator, record: Record | None = None
) -> dict[str, float]:
    """Evaluate a forward on a held-out split. Every rank must call it.

    Args:
        forward: Function from uint8 images [B, 3, H, W] to logits [B, C]; its model must be in evaluation mode.
        held_out: The split.
        accelerator: The launch's `Accelerator`.
        record: Function that is called with each batch of this rank, and must not communicate with other ranks.

    Returns:
        `samples` (their number), `loss` (mean cross-entropy), `accuracy` and, with a teacher, `agreement`, as fractions of 1;
        without `loss` and `accuracy` if the samples have no labels.

    Raises:
        UserError: If the split has no samples.
        UnreadableImage: On all ranks, if an image cannot be read on one of them.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=accelerator.device)
    with failing_together(accelerator):
        for batch, teacher_logits in zip(held_out.loader, held_out.teacher_logits(accelerator), strict=True):
            on_device = batch.to(accelerator.device, non_blocking=True)
            with accelerator.autocast():
                logits = forward(held_out.padded(on_device.images))[: len(on_device.labels)].float()
            sums += _batch_sums(logits, on_device.labels, teacher_logits)
            if record is not None:
                record(batch, logits, teacher_logits)
    total = accelerator.reduce(sums, "sum")
    samples, labeled, loss, correct, agreeing = total.tolist()
    if not samples:
        raise UserError("evaluation: the split has no samples; raise data.val_fraction or data.limit_test")
    result: dict[str, float] = {"samples": int(samples)}
    if labeled:
        result |= {"loss": loss / labeled, "accuracy": correct / labeled}
    return {**result, "agreement": agreeing / samples} if held_out.has_teacher else result


@torch.no_grad()
def teacher_accuracy(held_out: HeldOut, *, accelerator: Accelerator) -> float | None:
    """Compute the teacher's accuracy on a split, a fraction of 1; None without labels. Every rank must call it."""
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    with failing_together(accelerator):
        for batch, logits in zip(held_out.loader, held_out.teacher_logits(accelerator), strict=True):
            assert logits is not None
            correct = (logits.argmax(1) == batch.labels).sum()
            sums += torch.tensor([(batch.labels >= 0).sum(), correct], dtype=torch.float64).to(sums.device)
    labeled, total = accelerator.reduce(sums, "sum").tolist()
    return total / labeled if labeled else None


def member_accuracies(held_out: HeldOut, *, labeled: int, accelerator: Accelerator) -> dict[str, float]:
    """Compute the accuracy of each of several teachers on a split, fractions of 1. Every rank must call it.

    Args:
        held_out: The split.
        labeled: Number of its samples with a label, at least 1.
        accelerator: The launch's `Accelerator`.

    Returns:
        Accuracies by name of the teacher; empty for one teacher.
    """
    ranks: list[dict[str, int]] = gather_object([held_out.correct(accelerator)])
    return {name: sum(own.get(name, 0) for own in ranks) / labeled for name in ranks[0]}


def synchronize_buffers(module: nn.Module, *, accelerator: Accelerator) -> None:
    """Broadcast the buffers of rank 0 before an evaluation.

    BatchNorm statistics differ between the ranks, and only those of rank 0 are saved. Without the broadcast each rank would
    evaluate another model.
    """
    if accelerator.num_processes > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)


def _batch_sums(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> Tensor:
    predicted = logits.argmax(1)
    agreeing = torch.zeros((), device=logits.device)
    if teacher_logits is not None:
        agreeing = (predicted == teacher_logits.to(logits.device).argmax(1)).sum()
    loss = functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-1)
    samples = torch.full((), len(labels), device=logits.device)
    sums = (samples, (labels >= 0).sum(), loss, (predicted == labels).sum(), agreeing)
    return torch.stack([value.double() for value in sums])
