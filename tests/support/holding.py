"""Trainings that are held before a step, so that a fault can be placed there, however slow the machine is."""

import time
from pathlib import Path

DIRECTORY, STEP = "KD_TEST_HOLD", "KD_TEST_HOLD_STEP"


class Hold:
    """Hold of a training of the program `tests.support.patched_program holds`.

    Each rank waits after `step` steps, until it receives a signal, or until `release` is called.

    Args:
        directory: Directory for the files by which the processes communicate; shared by all nodes.
        step: Number of steps that are done when the ranks wait.
    """

    def __init__(self, directory, step):
        self.step = step
        self._directory = Path(directory)
        self._directory.mkdir()
        self.environment = {DIRECTORY: str(directory), STEP: str(step)}

    def wait_for_ranks(self, *launchers, ranks=2):
        """Wait until all ranks are held. Every launcher must be running."""

        def are_held():
            for launcher in launchers:
                assert launcher.poll() is None, launcher.communicate()
            return all((self._directory / f"held-{rank}").exists() for rank in range(ranks))

        wait_until(are_held)

    def release(self):
        mark(self._directory / "released")


def mark(path):
    path.touch()


def wait_until(condition, *, timeout_s=240):
    """Wait for a condition. The timeout only detects a program that hangs."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.01)


def handles(pid, number):
    """Return whether a process has a handler of its own for a signal."""
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
