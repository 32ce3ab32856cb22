"""Exchange of a number between the ranks every few steps, without waiting for a device.

An exchange that begins after one step is read after the next step, so it takes place while that step is computed. All ranks
read the same result after the same step and can act on it together. The exchange is between CPUs (gloo).

A step of a small network is shorter than an exchange. So an exchange begins only after as many steps as fit into a second,
together with the step that it takes. The ranks measure different times; each exchange also yields the longest of them, from
which all ranks compute the same interval.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch

from kd_accel.distributed import Accelerator, peer_timeout_s

_LATENCY_US = 1_000_000
_MOST_STEPS = 8
"""Longest interval, because the next exchange is late by as many steps if these suddenly become slower."""


class StepExchange:
    """Maximum of a number over the ranks. Every rank must create it, and call its methods, at the same places.

    Args:
        accelerator: The launch's `Accelerator`.
        timeout_s: Timeout of an exchange in seconds, `train.timeout_s`; None = the default.
        every_step: Whether this rank needs an exchange after each step; all ranks then make one.
    """

    def __init__(self, accelerator: Accelerator, *, timeout_s: float | None = None, every_step: bool = False) -> None:
        self._group: Any = None
        self._every_step = every_step
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._interval_steps, self._steps, self._began_at = 1, 0, time.perf_counter()
        if accelerator.num_processes > 1:
            timeout = timedelta(seconds=peer_timeout_s(timeout_s))
            self._group = torch.distributed.new_group(backend="gloo", timeout=timeout)

    def exchange(self, number: int, *, timeout_s: float | None = None) -> int:
        """Read the exchange that began after the previous step, if one did, and begin the next one if it is due.

        Args:
            number: This rank's number, at least 0. It must not fall before it was exchanged.
            timeout_s: Timeout of the read in seconds; None = that of the exchange.

        Returns:
            The maximum of the ranks' numbers after the previous step; 0 without an exchange. In a single process, `number`.
        """
        if self._group is None:
            return number
        maximum = self.finish(timeout_s=timeout_s)
        self._steps += 1
        if self._steps >= self._interval_steps:
            self._begin(number)
        return maximum

    def finish(self, *, timeout_s: float | None = None) -> int:
        """Wait for the pending exchange and return its maximum; 0 without a pending exchange."""
        if self._pending is None:
            return 0
        work, values = self._pending
        self._pending = None
        work.wait(*([] if timeout_s is None else [timedelta(seconds=timeout_s)]))
        maximum, step_us = values.tolist()
        # The interval at most doubles: the first steps on a GPU are only queued, in a fraction of the time that they take.
        fitting_steps = _LATENCY_US // max(step_us, 1) - 1
        self._interval_steps = max(1, min(2 * self._interval_steps, _MOST_STEPS, fitting_steps))
        return int(maximum)

    def _begin(self, number: int) -> None:
        now = time.perf_counter()
        step_us = _LATENCY_US if self._every_step else int((now - self._began_at) / self._steps * 1e6)
        values = torch.tensor([number, step_us])
        work = torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = work, values
        self._began_at, self._steps = now, 0
