"""Timers of a forward, on the host's clock and by CUDA events, and the time limit that ends a measurement."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Forward = Callable[[], Tensor]


class TimeLimitSpent(Exception):  # noqa: N818  (not an error)
    """End of the time of a measurement."""


class TimeLimit:
    """Time limit that runs from the creation of this object.

    Args:
        limit_s: Limit in seconds; None = no limit.
    """

    def __init__(self, limit_s: float | None) -> None:
        self._ends_at = None if limit_s is None else time.monotonic() + limit_s

    def check(self) -> None:
        """Raise TimeLimitSpent if the limit is reached."""
        if self._ends_at is not None and time.monotonic() >= self._ends_at:
            raise TimeLimitSpent


@dataclass(frozen=True)
class Timer:
    """Timer of forwards on one device.

    Args:
        device: Device of the forwards.
        limit: Limit that is checked before each forward, outside of the time of the forward.
    """

    device: torch.device
    limit: TimeLimit

    def times_ms(self, forward: Forward, iterations: int) -> list[float]:
        """Time each forward on its device, in milliseconds."""
        time_each = self.event_times_ms if self.device.type == "cuda" else self.host_times_ms
        return time_each(forward, iterations)

    def host_times_ms(self, forward: Forward, iterations: int) -> list[float]:
        """Time each forward on the host's clock, with a synchronization, in milliseconds."""
        times_ms = []
        for _ in range(iterations):
            self.limit.check()
            started_at = time.perf_counter()
            forward()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times_ms.append(1000 * (time.perf_counter() - started_at))
        return times_ms

    def event_times_ms(self, forward: Forward, iterations: int) -> list[float]:
        """Time each forward with CUDA events, in milliseconds."""
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(iterations)]
        for begin, end in pairs:
            self.limit.check()
            begin.record()
            forward()
            end.record()
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) for begin, end in pairs]
