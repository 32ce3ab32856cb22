"""The values that cross the borders between packages. No torch is imported here at run time.

Shape letters, used everywhere: B batch, C classes, D channels, H W, N samples, K views.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One view of some samples.

    images: uint8 [B, 3, H, W], the pixels of the view, laid out channels_last.
    labels: int64 [B].
    samples: int64 [B], each image's index in its source split, before any cut. A cached teacher answers by (samples, view). They
        stay on the host, where it looks them up: reading them back from a GPU would wait for all queued work.
    view: which view of the samples these pixels are.
    """

    images: Tensor
    labels: Tensor
    samples: Tensor
    view: int

    def to(self, device: Any, *, non_blocking: bool = False) -> Batch:
        images, labels = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.images, self.labels))
        return Batch(images, labels, self.samples, self.view)

    def pin_memory(self) -> Batch:
        """In host memory from which a GPU copies without waiting."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.samples, self.view)


@dataclass(frozen=True)
class TeacherOutput:
    """What the teacher says about one batch; the same type whether it answers live or from a cache.

    logits: [B, C], never probabilities, so that the temperature can change later; None where there is no teacher.
    features: the teacher's side of each layer pair, by the student's layer name, [B, D, H, W]: raw, or already projected
        where the teacher's projector is frozen.
    """

    logits: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StudentOutput:
    """What one forward of the trained module gives.

    logits: [B, C]. pairs: for each layer, the (student, target) feature maps in the channels in which they are compared;
    their heights and widths may still differ.
    """

    logits: Tensor
    pairs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class LossTerms:
    """The summands of the loss, scalars, each before its weight; `total` is the weighted sum that is minimized."""

    total: Tensor
    hard: Tensor
    response: Tensor | None = None
    feature: Tensor | None = None


TeacherSource = Callable[[Batch], TeacherOutput]
"""Anything that answers for a batch: a live teacher, a cached one, or `no_signals`."""

LossFunction = Callable[[StudentOutput, TeacherOutput, "Tensor"], LossTerms]
"""(output, signals, labels) -> terms."""


def no_teacher(batch: Batch) -> TeacherOutput:
    """The signal source of a run without a teacher."""
    return TeacherOutput()
