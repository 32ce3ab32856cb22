"""Preemption: SIGTERM, SIGINT or SIGUSR1 (the warning of a cluster) ends a training after a step and a checkpoint.

Signals reach the ranks at different moments, and a rank that stops alone leaves its peers without its gradients. So the ranks
exchange one number, the signal that each has received, and all act on the result of the same exchange, hence at the same step:
within a second, or after the next step if a step takes longer (`StepExchange`). A failure of one rank is a number too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from kd_accel.distributed import Accelerator
from kd_accel.errors import Preempted
from kd_accel.training.agreement import StepExchange

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
UNREADABLE, UNWRITTEN = 1000, 1001
"""Numbers for a rank that cannot read a batch, or write a checkpoint; larger than any signal."""
_SAME_REQUEST_S = 2.0
_AGREEMENT_S = 20.0


class PreemptionHandler:
    """Handler of the signals that stop a training, on all ranks after the same step.

    A second signal, more than two seconds after the first, ends the process at once. The constructor creates a process group,
    so every rank must call it at the same place.

    Args:
        accelerator: Accelerator of the launch.
        timeout_s: Timeout of the exchange in seconds, `train.timeout_s`; None = the default.
        every_step: Whether the ranks make an exchange after each step, as `ReadAhead` needs it.
    """

    def __init__(self, accelerator: Accelerator, *, timeout_s: float | None = None, every_step: bool = False) -> None:
        self._signal = 0
        self._signaled_at = 0.0
        self._is_installed = False
        os.register_at_fork(after_in_child=self._block_in_worker)
        self._exchange = StepExchange(accelerator, timeout_s=timeout_s, every_step=every_step)

    @contextlib.contextmanager
    def installed(self) -> Iterator[PreemptionHandler]:
        """Handle the signals inside the `with` block, and restore the earlier handlers after it.

        Only the main thread can handle signals: in another one, as in a worker of Optuna, they are left to the program.
        """
        is_main = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, self._handle) for number in SIGNALS} if is_main else {}
        self._is_installed = True
        try:
            yield self
            self._exchange.finish(timeout_s=self._timeout_s)
        finally:
            self._is_installed = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def requested(self, failure: int = 0) -> int | None:
        """Return the signal or failure to act on now, the same on every rank, or None.

        Every rank must call this after each step.

        Args:
            failure: UNREADABLE or UNWRITTEN for this rank, from the first such call on; 0 without a failure.
        """
        return self._exchange.exchange(failure or self._signal, timeout_s=self._timeout_s) or None

    @property
    def _timeout_s(self) -> float | None:
        # A launcher kills this process 30 seconds after the signal: an exchange with a peer that hangs must fail before.
        return _AGREEMENT_S if self._signal else None

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
