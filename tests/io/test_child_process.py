"""Child processes: exit codes, and signals that are forwarded."""

import os
import signal
import sys
import threading
import time

import pytest

from kd_accel.errors import Preempted
from kd_accel.io.child_process import run_child

CHILD = """
import pathlib, signal, sys, time
def stop(number, frame):
    time.sleep(0.1)
    pathlib.Path(sys.argv[1] + ".ended").touch()
    sys.exit(0)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, stop)
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_forwarded_and_raised_after_the_end_of_the_child(tmp_path, number):
    ready = tmp_path / "ready"

    def send():
        while not ready.exists():
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    with pytest.raises(Preempted, match=number.name) as stop:
        run_child([sys.executable, "-S", "-c", CHILD, str(ready)])
    assert stop.value.number == number and (tmp_path / "ready.ended").exists()
    assert signal.getsignal(number) == handler


def test_exit_codes_are_returned():
    def code(text):
        return run_child([sys.executable, "-S", "-c", text])

    assert (code(""), code("raise SystemExit(2)")) == (0, 2)
    assert code("import os; os.kill(os.getpid(), 9)") == -signal.SIGKILL
    with pytest.raises(Preempted) as stop:
        code(f"raise SystemExit({128 + signal.SIGTERM})")
    assert stop.value.number == signal.SIGTERM
