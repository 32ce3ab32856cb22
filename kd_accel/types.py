"""Data types of several packages: a batch of images and the teacher's output for it.

Shape letters of the package: B batch, C classes, D channels, H height, W width, N samples, K views, S image size.

torch is imported for type checkers only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """A batch of samples in one view.

    Attributes:
        images: Pixels of the view, [B, 3, H, W]: uint8, or float32 in 0..255 in each training batch of a transform with mixup.
            Dense, and either contiguous (decoded images held in memory, uncropped or cropped) or channels_last (images
            decoded on demand, resized crops, TrivialAugment, crops made on a GPU). Code that needs one memory format must
            convert.
        labels: Class indices, int64 [B]; -1 = no label. In each training batch of a transform with mixup or cutmix the share
            of each class, float32 [B, C]: rows sum to 1, or are zero if a sample or its partner has no label.
        index: Each sample's position in its source split, before any subset, int64 [B]; 2**40 is added for samples of
            `data.unlabeled`. Always in host memory: a cache is
            read by (index, view), and a copy from a GPU would synchronize the device.
        view: Number of the view that the pixels show.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    view: int

    def to(self, device: Any, *, non_blocking: bool = False) -> Batch:
        """Return the batch with images and labels on `device`; `index` stays in host memory."""
        images, labels = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.images, self.labels))
        return Batch(images, labels, self.index, self.view)

    def pin_memory(self) -> Batch:
        """Return the batch with images and labels in page-locked memory, which a GPU copies asynchronously."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.index, self.view)


@dataclass(frozen=True)
class TeacherOutput:
    """Logits and features of the teacher for one batch, from a live forward or from a cache.

    Attributes:
        logits: Logits [B, C], before the division by a temperature; None without a teacher.
        features: Feature maps [B, D, H, W] by the teacher's layer name: unchanged, or already mapped by the frozen target
            function of the feature loss. With several teachers by "TEACHER/LAYER".
        members: Logits [B, C] of each of several teachers by name, which the distiller combines; empty for one teacher.
    """

    logits: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)
    members: dict[str, Tensor] = field(default_factory=dict)


TeacherSource = Callable[[Batch], TeacherOutput]
"""Function that returns the teacher's output for a batch: a live teacher, a cache, or `no_teacher`."""


@runtime_checkable
class StagedTeacher(Protocol):
    """Teacher source in two parts, of which the second can be replayed as a CUDA graph."""

    def fetch(self, batch: Batch) -> tuple[Tensor, ...]:
        """Do what needs the host. Returns tensors on the device of the batch, of the same shapes for each batch of a size."""

    def finish(self, batch: Batch, fetched: tuple[Tensor, ...]) -> TeacherOutput:
        """Compute the output on the device, from what `fetch` has returned; `batch.index` and `batch.view` are not read."""


def no_teacher(batch: Batch) -> TeacherOutput:
    """Return an empty output, for a training without a teacher."""
    return TeacherOutput()
