"""Exchange of one number between the ranks after each step, without waiting for a device.

An exchange that begins after one step is read after the next step, so it takes place while that step is computed. All ranks
read the same result after the same step and can act on it together. The exchange is between CPUs (gloo).
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch

from kd_accel.distributed import Accelerator, peer_timeout_s


class StepExchange:
    """Maximum of a number over the ranks, one step late. Every rank must create it, and call its methods, at the same places.

    Args:
        accelerator: The launch's `Accelerator`.
        timeout_s: Timeout of an exchange in seconds, `train.timeout_s`; None = the default.
    """

    def __init__(self, accelerator: Accelerator, *, timeout_s: float | None = None) -> None:
        self._group: Any = None
        self._pending: tuple[Any, torch.Tensor] | None = None
        if accelerator.num_processes > 1:
            timeout = timedelta(seconds=peer_timeout_s(timeout_s))
            self._group = torch.distributed.new_group(backend="gloo", timeout=timeout)

    def exchange(self, number: int) -> int:
        """Begin the exchange of a number.

        Args:
            number: This rank's number, at least 0.

        Returns:
            The maximum of the numbers of the previous call; 0 for the first call. In a single process, `number`.
        """
        if self._group is None:
            return number
        maximum = self.finish()
        values = torch.tensor([number])
        work = torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = work, values
        return maximum

    def finish(self) -> int:
        """Wait for the pending exchange and return its maximum; 0 without a pending exchange."""
        if self._pending is None:
            return 0
        work, values = self._pending
        self._pending = None
        work.wait()
        return int(values)
