"""The values that cross the borders between packages. No torch is imported here at run time.

Shape letters, used everywhere: B batch, C classes, D channels, H W, N rows, K views.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class UserError(Exception):
    """The user's mistake: one paragraph that says field, value, rule and remedy. The program exits with 2."""


class Interrupted(Exception):  # noqa: N818  (it is no error)
    """A signal has ended the work at a place from which it can go on. The program exits with 128 + number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class PeerLost(Exception):  # noqa: N818  (the machine's fault, not the program's)
    """Another process of the launch does not answer any more. The program exits with 1 and no traceback."""


@dataclass(frozen=True)
class Batch:
    """One view of some rows.

    images: uint8 [B, 3, H, W], the pixels of the view, laid out channels_last.
    labels: int64 [B].
    rows: int64 [B], each image's index in its source split, before any cut. A cached teacher answers by (rows, view). They
        stay on the host, where it looks them up: reading them back from a GPU would wait for all queued work.
    view: which view of the rows these pixels are.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor
    view: int

    def to(self, device: Any, *, non_blocking: bool = False) -> Batch:
        images, labels = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.images, self.labels))
        return Batch(images, labels, self.rows, self.view)

    def pin_memory(self) -> Batch:
        """In host memory from which a GPU copies without waiting."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.rows, self.view)


@dataclass(frozen=True)
class Signals:
    """What the teacher says about one batch; the same type whether it answers live or from a cache.

    logits: [B, C], never probabilities, so that the temperature can change later; None where there is no teacher.
    features: the teacher's side of each tap pair, by the student's tap name, [B, D, H, W]: raw, or already projected
        where the teacher's projector is frozen.
    """

    logits: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StudentOutput:
    """What one forward of the trained module gives.

    logits: [B, C]. pairs: for each tap, the (student, target) feature maps in the channels in which they are compared;
    their heights and widths may still differ.
    """

    logits: Tensor
    pairs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class LossTerms:
    """The summands of the loss, scalars, each before its weight; `total` is the weighted sum that is minimised."""

    total: Tensor
    hard: Tensor
    response: Tensor | None = None
    feature: Tensor | None = None


SignalSource = Callable[[Batch], Signals]
"""Anything that answers for a batch: a live teacher, a cached one, or `no_signals`."""

LossFunction = Callable[[StudentOutput, Signals, "Tensor"], LossTerms]
"""(output, signals, labels) -> terms."""


def no_signals(batch: Batch) -> Signals:
    """The signal source of a run without a teacher."""
    return Signals()
