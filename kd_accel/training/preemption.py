"""Preemption: SIGTERM, SIGINT or SIGUSR1 (the warning of a cluster) ends a training after a step and a checkpoint.

Signals reach the ranks at different moments, and a rank that stops alone leaves its peers without its gradients. So after each
step the ranks exchange one number, the signal that each has received, while the next step runs. All ranks act on the result of
the same exchange, hence at the same step. The exchange runs on CPUs (gloo) and never synchronizes a device.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

import torch

from kd_accel.distributed import Accelerator, peer_timeout_s
from kd_accel.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
FAILED = 1000
"""Number in place of a signal for a rank that cannot read a batch; larger than any signal."""
_SAME_REQUEST_S = 2.0
_AGREEMENT_S = 20.0


class PreemptionHandler:
    """Handler of the signals that stop a training, on all ranks after the same step.

    A second signal, more than two seconds after the first, ends the process at once. The constructor creates a process group,
    so every rank must call it at the same place.

    Args:
        accelerator: Accelerator of the launch.
        timeout_s: Timeout of the exchange in seconds, `train.timeout_s`; None = the default.
    """

    def __init__(self, accelerator: Accelerator, *, timeout_s: float | None = None) -> None:
        self._signal = 0
        self._signaled_at = 0.0
        self._group: Any = None
        self._exchange: tuple[Any, torch.Tensor] | None = None
        self._is_installed = False
        os.register_at_fork(after_in_child=self._block_in_worker)
        if accelerator.num_processes > 1:
            timeout = timedelta(seconds=peer_timeout_s(timeout_s))
            self._group = torch.distributed.new_group(backend="gloo", timeout=timeout)

    @contextlib.contextmanager
    def installed(self) -> Iterator[PreemptionHandler]:
        """Handle the signals inside the `with` block, and restore the earlier handlers after it."""
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._is_installed = True
        try:
            yield self
            self._exchanged()
        finally:
            self._is_installed = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def requested(self, *, has_failed: bool = False) -> int | None:
        """Return the signal to act on now, the same on every rank, or None.

        Every rank must call this after the same steps. The result is that of the exchange which the previous call has begun.

        Args:
            has_failed: Whether this rank cannot read a batch of a later step; the result is then `FAILED` on every rank.
        """
        own = FAILED if has_failed else self._signal
        if self._group is None:
            return own or None
        agreed = self._exchanged()
        number = torch.tensor([own])
        work = torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._exchange = work, number
        return agreed or None

    def _exchanged(self) -> int:
        """Return the result of the exchange that the last call of `requested` has begun: a signal, or 0."""
        if self._exchange is None:
            return 0
        work, number = self._exchange
        self._exchange = None
        if self._signal:
            # A launcher kills this process 30 seconds after the signal: an exchange with a peer that hangs must fail before.
            work.wait(timedelta(seconds=_AGREEMENT_S))
        else:
            work.wait()
        return int(number)

    def _block_in_worker(self) -> None:
        """Block the signals in a process that was forked to load data, except for SIGTERM from its parent.

        A launcher signals process groups, workers included, and the steps until the checkpoint still need their batches.
        """
        if self._is_installed:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._signal:
            self._signal, self._signaled_at = number, now
        elif now - self._signaled_at > _SAME_REQUEST_S:
            # An earlier one is the same request: a launcher forwards the signal that a terminal sends to all processes.
            os._exit(128 + number)


def _obey_parent(parent: int) -> None:
    """End a worker on SIGTERM from its parent, which at its own exit sends it and waits for the worker without a timeout."""
    while signal.sigwaitinfo(SIGNALS).si_pid != parent:
        pass
    os._exit(128 + signal.SIGTERM)


def preempted(number: int, *, step: int) -> Preempted:
    """Build the exception of a training that has stopped for a signal, with a checkpoint after `step`."""
    name = signal.Signals(number).name
    return Preempted(number, f"stopped by {name} after step {step}, with a checkpoint; run the same command again to resume")
