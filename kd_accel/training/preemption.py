"""Being asked to stop: SIGTERM, SIGINT or SIGUSR1 (the warning of a cluster) ends a training after a step and a checkpoint.

Signals reach the ranks at different moments, and a rank that stops alone leaves the others waiting for its gradients. So every
rank tells the others after each step whether it was signaled, by an exchange of one number that runs beside the next step; all
act on the same exchange, hence at the same step. The exchange is between CPUs: no device waits for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

import torch

from kd_accel.distributed import Accelerator, peer_timeout_s
from kd_accel.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SAME_REQUEST_S = 2.0
_AGREEMENT_S = 20.0


class PreemptionHandler:
    """Whether the ranks were asked to stop. A second signal, over two seconds after the first, ends the process at once."""

    def __init__(self, accelerator: Accelerator, *, timeout_s: float | None = None) -> None:
        """Every rank must make one at the same place. timeout_s: how long a rank waits for the others' answers."""
        self._signal = 0
        self._signalled_at = 0.0
        self._group: Any = None
        self._exchange: tuple[Any, torch.Tensor] | None = None
        self._is_listening = False
        os.register_at_fork(after_in_child=self._spare_worker)
        if accelerator.num_processes > 1:
            timeout = timedelta(seconds=peer_timeout_s(timeout_s))
            self._group = torch.distributed.new_group(backend="gloo", timeout=timeout)

    @contextlib.contextmanager
    def listening(self) -> Iterator[PreemptionHandler]:
        """Handle the signals inside the block, as before outside of it."""
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._is_listening = True
        try:
            yield self
            self._agreed()
        finally:
            self._is_listening = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def requested(self) -> int | None:
        """The signal to act on now, the same on every rank. To be called by all of them after the same steps."""
        if self._group is None:
            return self._signal or None
        agreed = self._agreed()
        number = torch.tensor([self._signal])
        work = torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._exchange = work, number
        return agreed or None

    def _agreed(self) -> int:
        """What the exchange of the step before came to.

        Once signaled, a rank does not wait for ever: a launcher signals all survivors when one rank has died, and then there
        is nobody to agree with.
        """
        if self._exchange is None:
            return 0
        work, number = self._exchange
        self._exchange = None
        if self._signal:
            work.wait(timedelta(seconds=_AGREEMENT_S))
        else:
            work.wait()
        return int(number)

    def _spare_worker(self) -> None:
        """In a process that was forked to load data: a launcher signals it too, and the last steps still need its batches."""
        if self._is_listening:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._signal:
            self._signal, self._signalled_at = number, now
        elif now - self._signalled_at > _SAME_REQUEST_S:
            os._exit(128 + number)


def preempted(number: int, *, step: int) -> Preempted:
    name = signal.Signals(number).name
    return Preempted(number, f"stopped by {name} after step {step}, with a checkpoint; start the same command again to go on")
