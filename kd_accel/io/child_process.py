"""Child process that ends before its parent: a signal to stop is forwarded, and the parent stops once the child has stopped."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from kd_accel.errors import Preempted

_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that end a training after a checkpoint."""


def run_child(command: Sequence[str]) -> int:
    """Run a command to its end, in the main thread of this process.

    Args:
        command: Program and arguments.

    Returns:
        The exit code of the child; -N after its end by signal N.

    Raises:
        Preempted: If this process has received a signal to stop, or the child ended with the code of one.
    """
    received: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if child is not None:
            child.send_signal(number)

    with _handled(forward):
        child = subprocess.Popen(command)
        if received:  # before `child` was set
            child.send_signal(received[0])
        code = child.wait()
    stop = received[0] if received else code - 128
    if stop in _STOPS:
        name = signal.Signals(stop).name
        raise Preempted(stop, f"stopped by {name}; run the same command again to continue with the unfinished runs")
    return code


@contextmanager
def _handled(handler: signal._HANDLER) -> Iterator[None]:
    """Handle the signals inside the `with` block, and restore the earlier handlers after it."""
    before = {number: signal.signal(number, handler) for number in _STOPS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
