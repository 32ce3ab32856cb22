"""Images that become unreadable during a training: all ranks stop at the same step, after a checkpoint.

A rank without its batch cannot take part in the gradient exchange, and its peers would wait for it. So each rank reads two
steps ahead. When a read fails, the ranks agree to stop in the exchange of `PreemptionHandler`, which they then make after each
step. Its result is known one step later, before the step that lacks its batch. The first steps of an epoch are read before any
is made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from kd_accel.distributed import Accelerator, gathered
from kd_accel.errors import UnreadableImage
from kd_accel.types import Batch

AHEAD_STEPS = 2


class ReadAhead:
    """Iterator over the micro-batches of each step that reads some steps ahead, and holds back the failure of a read.

    Args:
        steps: Micro-batches of each step.
        ahead_steps: Number of steps that are read before they are needed.

    Attributes:
        failure: Error of the first step that could not be read, which follows the steps that are read already.
    """

    def __init__(self, steps: Iterable[Sequence[Batch]], *, ahead_steps: int) -> None:
        self.failure: UnreadableImage | None = None
        self._steps, self._ahead_steps = iter(steps), ahead_steps
        self._read: deque[Sequence[Batch]] = deque()

    def __iter__(self) -> Iterator[Sequence[Batch]]:
        return self

    def __next__(self) -> Sequence[Batch]:
        self.fill(self._ahead_steps + 1)
        if self._read:
            return self._read.popleft()
        raise self.failure or StopIteration

    def fill(self, count: int) -> None:
        """Read until `count` steps are ready, unless the steps end or cannot be read."""
        try:
            while self.failure is None and len(self._read) < count:
                self._read.append(next(self._steps))
        except UnreadableImage as error:
            self.failure = error
        except StopIteration:
            return


@contextmanager
def failing_together(accelerator: Accelerator) -> Iterator[None]:
    """Inside the `with` block, hold back an unreadable image of this rank, and raise it on all ranks at the end of the block.

    The block must not communicate with other ranks.
    """
    failure = None
    try:
        yield
    except UnreadableImage as error:
        failure = error
    raise_on_all_ranks(failure, accelerator)


def raise_on_all_ranks(failure: UnreadableImage | None, accelerator: Accelerator) -> None:
    """Raise the failure of the first rank that has one. Every rank must call it.

    Args:
        failure: Failure of this rank, or None.
        accelerator: The launch's `Accelerator`.

    Raises:
        UnreadableImage: On all ranks, if one of them has failed.
    """
    found = [args for args in gathered([None if failure is None else failure.args]) if args is not None]
    if found:
        raise UnreadableImage(*found[0]) from None
